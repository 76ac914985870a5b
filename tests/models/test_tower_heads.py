"""The heads of towers: a projection, and a perceptron that is added to it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipx.errors import ConfigError
from clipx.models.base import HEAD
from clipx.models.text import TextTransformer
from clipx.training.step import row_keys

TOWER = TextTransformer(
    vocab_size=40, context=5, eot_id=39, width=16, depth=1, heads=2, embed_dim=8, dtype="float32"
)
MLP = TOWER.clone(head="mlp", head_width=12, head_dropout=0.4, projection_bias=True)
IDS = np.arange(15, dtype=np.int32).reshape(3, 5)


@pytest.fixture(scope="module")
def params():
    return jax.jit(MLP.init)(jax.random.key(0), IDS)["params"]


def test_an_mlp_starts_as_the_projection(params):
    """And only entries of `HEAD` are above the features."""
    linear = {k: v for k, v in params.items() if k != "projection_mlp"}
    plain = TOWER.clone(projection_bias=True)
    expected = jax.jit(plain.apply)({"params": linear}, IDS)
    found = jax.jit(MLP.apply)({"params": params}, IDS)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    below = jax.eval_shape(MLP.headless.init, jax.random.key(0), IDS)["params"]
    assert params.keys() - below.keys() == set(HEAD)


def test_what_an_mlp_computes(params):
    """The projection plus two dense layers around a GELU, of features with the mean taken out."""
    noise = np.random.default_rng(0)
    moved = jax.tree.map(lambda x: x + 0.3 * noise.normal(size=x.shape).astype("f4"), params)
    found = jax.jit(MLP.apply)({"params": moved}, IDS)
    x, head = np.asarray(found.backbone, np.float64), moved["projection_mlp"]
    norm = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    y = norm * head["ln"]["scale"] + head["ln"]["bias"]
    y = jax.nn.gelu(y @ head["fc"]["kernel"] + head["fc"]["bias"], approximate=False)
    y = y @ head["proj"]["kernel"] + head["proj"]["bias"]
    y = y + x @ moved["projection"]["kernel"] + moved["projection"]["bias"]
    np.testing.assert_allclose(found.raw, y, rtol=1e-4, atol=1e-5)


def test_a_row_depends_on_its_features_and_key_alone(params):
    """With dropout, which is that of the head alone; `backbone` stays whole."""
    noise = np.random.default_rng(0)
    moved = {"params": jax.tree.map(lambda x: x + 0.3 * noise.normal(size=x.shape), params)}
    rows = jnp.asarray(noise.normal(size=(4, 16)), jnp.float32)
    project = jax.jit(
        lambda x, keys: MLP.apply(moved, x, train=True, keys=keys, method="project").raw
    )
    one, two = project(rows, row_keys(0, 0, 4)), project(rows, row_keys(0, 1, 4))
    assert np.all(np.any(one != two, axis=1))
    changed = project(rows.at[1:].set(0), row_keys(0, 0, 4).at[1:].set(row_keys(0, 1, 4)[1:]))
    np.testing.assert_array_equal(changed[0], one[0])
    whole = MLP.apply(moved, rows, method="project")
    np.testing.assert_array_equal(whole.backbone, rows)
    assert np.all(np.any(one != whole.raw, axis=1))


@pytest.mark.parametrize("field", [{"head": "mlp"}, {"head_dropout": 0.1}, {"head_init": "cca"}])
def test_no_head_without_a_width(field):
    with pytest.raises(ConfigError, match="TextTransformer.embed_dim"):
        TOWER.clone(embed_dim=0, **field)
