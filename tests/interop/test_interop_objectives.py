"""A small model of each method, exported to every library that can express it, gives the library's
outputs; with scanned blocks or not, on one device and, trained for two steps, on eight."""

import jax
import pytest
from safetensors.numpy import load_file
from support import tiny
from support.exports import save
from support.libraries import NO_OPEN_CLIP, NO_TRANSFORMERS
from support.runs import small

from clipx.errors import ConfigError
from clipx.interop import load, verify
from clipx.interop.formats import FORMATS
from clipx.serving.export import Options, export

NONE = NO_OPEN_CLIP or NO_TRANSFORMERS
pytestmark = [pytest.mark.interop, pytest.mark.skipif(bool(NONE), reason=NONE or "-")]

PLAIN = {"augmentation": "none"}
RESNET = {"name": "resnet", "variant": "RN50", "width": 4, "blocks": [1, 1, 1, 1]}
RESNET |= {"image_size": 32, "embed_dim": 16, "dtype": "float32"}
MAP = {"pool": "attention", "pre_norm": False, "embed_dim": 0, "activation": "gelu_tanh"}
LAST = {"causal": False, "pool": "last", "embed_dim": 32, "activation": "gelu_tanh"}
SCAN, QUICK = {"scan": True}, {"activation": "quick_gelu"}
# objective, image and text tower, mesh of eight devices (None: one device), and the reason why
# transformers cannot express the model ("": it can)
MODELS = {
    "clip": ({}, {**QUICK, **SCAN}, {**QUICK, **SCAN}, {"data": 4, "fsdp": 2}, ""),
    "siglip": (PLAIN, MAP, LAST, None, ""),
    "clip_lite": (
        {"width": 40},
        {"embed_dim": 0, "pool": "mean"},
        {"embed_dim": 0, "width": 24},
        None,
        "pools by the mean",
    ),
    "declip": (
        {**PLAIN, "simsiam_width": 12, "queue_size": 48},
        {"activation": "gelu_tanh"},
        {"projection_bias": True},
        None,
        "bias in the text's projection",
    ),
    "slip": (
        {**PLAIN, "ssl_augmentation": "none", "head_width": 12, "head_dim": 6},
        {"pre_norm": False, "norm_eps": 1e-6},
        {},
        None,
        "LayerNorm before",
    ),
    "filip": ({**PLAIN, "token_width": 6, "top_k": 3}, {}, SCAN, None, ""),
    "protoclip": (
        {**PLAIN, "k": 5, "projection_dim": 6, "projection_hidden": 12, "episode_size": 64},
        RESNET,
        SCAN,
        None,
        "a ResNet",
    ),
}


def config(name):
    objective, image, text, mesh, _ = MODELS[name]
    found = small(("image.pool", "class"), ("text.dropout", "0.0"), ("train.best", ""))
    image = image if "name" in image else found["image"] | image
    found |= {
        "objective": {"name": name, **objective},
        "image": image,
        "text": found["text"] | text,
        "tokenizer": found["tokenizer"] | {"mask": name in ("declip", "filip")},
        "optimizer": {"learning_rate": 1e-3},
        "mesh": mesh or {},
        "evals": {},
    }
    return found


# of the others, the towers are among the proofs of test_interop_open_clip.py
NIGHTLY = {"declip", "defilip", "filip", "slip", "protoclip"} & set(tiny.OBJECTIVES)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in NIGHTLY)) for n in tiny.OBJECTIVES]
)
def test_trained_and_exported(name, tmp_path):
    mesh, why = MODELS[name][-2:]
    devices = jax.devices()[: 8 if mesh else 1]
    folder = save(tmp_path / "run", config(name), steps=2 if mesh else 0, devices=devices)
    for format_ in FORMATS:
        pt = format_.name == "open_clip"
        options = Options(format_.name, tmp_path / format_.name, verify=True, pt=pt)
        if why and format_.name == "huggingface":
            with pytest.raises(ConfigError, match=why):
                export(folder, options)
            continue
        proof = export(folder, options).proof
        assert proof.image_cosine > verify.COSINE and proof.text_cosine > verify.COSINE
        assert proof.logits < verify.RELATIVE
        again = load.load(options.out)
        arrays = load_file(options.out / format_.weights)
        if pt:
            torchs = load.load(options.out / "open_clip_pytorch_model.bin").flat
            assert all(x.tobytes() == torchs[k].tobytes() for k, x in again.flat.items())
        written = format_.arrays(again)
        assert written.keys() == arrays.keys()
        assert all(x.tobytes() == arrays[k].tobytes() for k, x in written.items())
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["run", "open_clip", *([] if why else ["huggingface"])]
    )
