"""The depthwise convolution equals the compiler's, and the EfficientNet treats rows alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipx.config import binding
from clipx.errors import ConfigError
from clipx.models import depthwise
from clipx.models.efficientnet import EfficientNet

TINY = dict(width=0.1, depth=0.1, image_size=32, embed_dim=4, dtype="float32")


@pytest.mark.parametrize("pixels,size,stride", [(5, 3, 1), (9, 5, 2)])
def test_depthwise_convolution_equals_the_compilers(monkeypatch, pixels, size, stride):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x = jnp.asarray(rng.normal(size=(2, pixels, pixels, 3)))
        kernel = jnp.asarray(rng.normal(size=(size, size, 1, 3)))
        padding = (size // 2 - 1, size // 2)

        def both(x, kernel):
            return depthwise.depthwise(x, kernel, stride, padding)

        found, pull = jax.vjp(both, x, kernel)
        monkeypatch.setattr(depthwise, "platform", lambda: "gpu")
        expected, other = jax.vjp(both, x, kernel)
        dy = jnp.asarray(rng.normal(size=expected.shape))
        for a, b in zip((found, *pull(dy)), (expected, *other(dy)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_a_row_depends_on_its_image_alone():
    tower = EfficientNet(variant="efficientnet_b1", padding="same", **TINY)
    images = jax.random.normal(jax.random.key(0), (3, 32, 32, 3))
    shapes = jax.eval_shape(tower.init, jax.random.key(1), images[:1])
    random = np.random.default_rng(0)
    variables = jax.tree.map(lambda v: random.uniform(size=v.shape).astype(v.dtype), shapes)
    apply = jax.jit(lambda x: tower.apply(variables, x))
    whole, changed = apply(images), apply(images.at[1].set(0))
    assert whole.tokens.shape == (3, 1, tower.backbone_width)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(changed), strict=True):
        np.testing.assert_array_equal(a[::2], b[::2])
    assert not np.array_equal(whole.raw[1], changed.raw[1])


def test_sizes_are_the_papers():
    """Parameters without the classifier, in millions (timm's count)."""
    for variant, millions in {"efficientnet_b0": 4.0, "efficientnet_lite4": 11.7}.items():
        tower = EfficientNet(variant=variant, embed_dim=0)
        shapes = jax.eval_shape(tower.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
        found = sum(x.size for x in jax.tree.leaves(shapes["params"]))
        assert abs(found / 1e6 - millions) < 0.06
    assert EfficientNet(variant="efficientnet_b3").backbone_width == 1536


def test_impossible_settings_are_refused():
    with pytest.raises(ConfigError, match="efficientnet_b0"):
        EfficientNet(variant="efficientnet_bo")
    with pytest.raises(ConfigError, match="norm_momentum"):
        EfficientNet(norm_momentum=2.0)
    assert "padding" in binding.fields(EfficientNet)
