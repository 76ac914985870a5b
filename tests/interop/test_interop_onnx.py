"""ONNX: every kind of tower is converted, and onnxruntime says what clipx says."""

import re

import jax
import numpy as np
import pytest
from PIL import Image
from support import encoders
from support.exports import CLASS, save
from support.libraries import asked, missing
from support.runs import small
from support.towers import BOTH, RESNET, TEXT, VIT, model

from clipx.errors import ConfigError, MissingLibrary, install_hint
from clipx.interop import libraries, load, onnx, verify
from clipx.interop.model import Words
from clipx.models.convnext import ConvNeXt
from clipx.models.efficientnet import EfficientNet
from clipx.models.eva import EVA
from clipx.models.resnet import ResNet
from clipx.models.t5 import T5
from clipx.models.text import TextTransformer
from clipx.models.vit import ViT
from clipx.models.vitamin import ViTamin
from clipx.serving.export import Options, export

with_onnx = asked(missing("jax2onnx", "onnxruntime"))
WORDS = Words("clip_bpe", 40, 16, 0, 37, 38, 39, True)  # the last is the mask's
SMALL = {"image_size": 32, "width": 16, "depth": 1, "heads": 2, "mlp_ratio": 2.0}
PLAIN = {"vocab_size": 40, "eot_id": 38}
IMAGES = {
    "ViT": ViT(**VIT, **BOTH),
    "SigLIP": ViT(**VIT, pool="attention", pre_norm=False, **BOTH | {"embed_dim": 0}),
    "CoCa": ViT(**VIT, pool="query", pool_width=24, pool_heads=2, class_token=True, **BOTH),
    "RN50": ResNet(**RESNET, **BOTH),
    "resnet18": ResNet(variant="resnet18", image_size=40, blocks=(1, 1), **BOTH),
    "resnet18d": ResNet(
        variant="resnet18", image_size=40, blocks=(1, 1, 1), deep_stem=True, **BOTH
    ),
    "EfficientNet": EfficientNet(
        variant="efficientnet_lite2", image_size=32, width=0.1, depth=0.1, **BOTH
    ),
    "ConvNeXt": ConvNeXt(variant="tiny", image_size=32, width=4, blocks=(1, 1, 1, 1), **BOTH),
    "EVA-02": EVA(**SMALL, projection_bias=True, pool_heads=2, **BOTH),
    "PE-Core": EVA(
        **SMALL, gated=False, sub_norms=False, key_bias=True, pre_norm=True, pool="attention",
        **BOTH,
    ),
    "ViTamin": ViTamin(variant="small", image_size=32, widths=(4, 8, 16), depth=1, heads=2, **BOTH),
}  # fmt: skip
TEXTS = {
    "CLIP": TextTransformer(**TEXT, **PLAIN, **BOTH),
    "SigLIP": TextTransformer(**TEXT, **PLAIN, causal=False, pool="last", **BOTH),
    "masked": TextTransformer(**TEXT, **PLAIN, pool="last", mask_padding=True, **BOTH),
    "CoCa": TextTransformer(**TEXT, **PLAIN, pool="class", **BOTH),
    "NLLB": TextTransformer(
        **TEXT, vocab_size=40, eot_id=2, pad_id=1, pool="first", causal=False, mask_padding=True,
        activation="relu", **BOTH,
    ),
    "mT5": T5(
        vocab_size=40, context=16, width=32, depth=1, heads=2, head_width=8, mlp_width=40,
        dense_width=28, dropout=0.0, **BOTH,
    ),
    "BERT": encoders.bert_tower("bert", **BOTH),
}  # fmt: skip


def _texts(tower, rows):
    ids = np.random.default_rng(3).integers(4, 36, (rows, tower.context)).astype(np.int32)
    for row, end in zip(ids, (4, 9, tower.context - 1)):
        row[end], row[end + 1 :] = getattr(tower, "eot_id", 2), getattr(tower, "pad_id", 0)
    return ids


@pytest.mark.slow
@with_onnx
@pytest.mark.parametrize("name", [*IMAGES, *(f"{name} text" for name in TEXTS)])
def test_a_tower_as_a_graph(name, tmp_path):
    """Of one row and of several: the graph leaves the batch's size open."""
    runtime = libraries.require("onnxruntime")
    runtime.set_default_logger_severity(3)
    image = IMAGES.get(name, IMAGES["ViT"])
    text = TEXTS.get(name.removesuffix(" text"), TEXTS["CLIP"])
    if not name.endswith(" text"):
        text = TEXTS["CLIP"].clone(embed_dim=image.output_width)
    made = model(image, text, WORDS, bias=-3.0)
    which = "text" if name.endswith(" text") else "image"
    ids, pictures = _texts(text, 3), verify.pictures(image.image_size)[:3]
    expected = getattr(verify.ours(made, pictures, ids), which)
    tower, (file, key, output) = (text, onnx.TEXT) if which == "text" else (image, onnx.IMAGE)
    side = image.image_size
    shape = ("batch", text.context) if which == "text" else ("batch", 3, side, side)
    onnx._convert(made, which, shape, "int32" if which == "text" else "float32", tmp_path)
    pixels = (np.stack(pictures) / 255 - np.array(made.mean)) / np.array(made.std)
    x = ids if which == "text" else pixels.transpose(0, 3, 1, 2).astype(np.float32)
    session = runtime.InferenceSession(tmp_path / file, providers=["CPUExecutionProvider"])
    assert np.ptp(expected) > 0.1, tower
    for rows in (1, 3):
        (got,) = session.run([output], {key: x[:rows]})
        np.testing.assert_allclose(got, expected[:rows], atol=1e-5 * np.abs(expected).max())


@pytest.mark.slow
@with_onnx
@pytest.mark.parametrize("mask", [False, True])
def test_a_run_is_exported_and_proven(mask, tmp_path, monkeypatch):
    """Through the tokenizer of the folder, whose ids have no mask; and by the card's own code."""
    config = small(CLASS, ("train.best", ""))
    config["tokenizer"] |= {"mask": mask}
    folder = save(tmp_path / "run", config)
    done = export(folder, Options("onnx", tmp_path / "a", verify=True))
    assert done.proof is not None and done.proof.logits < 1e-5
    text = (tmp_path / "a" / "README.md").read_text()
    assert "Loaded by onnxruntime" in text and "init_from" not in text
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.jpg")
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    found = {}
    exec(code, found)
    assert found["unit"][0].shape == (1, 16) and found["unit"][1].shape == (2, 16)
    with pytest.raises(ConfigError, match="an ONNX graph|open_clip_config.json"):
        load.load(tmp_path / "a")


def test_without_the_converter(tmp_path, monkeypatch):
    """The error names the extra, and no folder is left."""

    def none(name):
        raise MissingLibrary(f"{name} is not installed")

    folder = save(tmp_path / "run", small(CLASS, ("train.best", "")), devices=jax.devices()[:1])
    monkeypatch.setattr(libraries, "require", none)
    with pytest.raises(ConfigError, match="jax2onnx is not installed") as caught:
        export(folder, Options("onnx", tmp_path / "a"))
    assert caught.value.fix == install_hint("onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
