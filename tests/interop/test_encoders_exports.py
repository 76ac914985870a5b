"""Runs with text encoders of others are exported to open_clip and to transformers'
`VisionTextDualEncoderModel`, and read again."""

import json

import numpy as np
import pytest
from support import encoders, towers
from support.encoders import bert_tower, content
from support.libraries import with_open_clip, with_transformers

from clipx.data.text import tokenizers
from clipx.data.text.tokenizers import TokenizerConfig
from clipx.errors import NotExpressible
from clipx.interop import formats, load, tokenizer, verify
from clipx.models.vit import ViT
from clipx.ops import tokenizer_json
from clipx.serving.tokenizer_files import tokenizer_files
from clipx.training import pretrained

OPEN_CLIP, HUGGINGFACE = (formats.named(name) for name in ("open_clip", "huggingface"))
BOTH = {"embed_dim": 24, "dtype": "float32"}
PICTURES = {
    "clip": {"pool": "class", "pre_norm": True},
    "dinov2": {"pool": "class", "pre_norm": False, "norm_eps": 1e-6},
    "dinov2 with all": {
        "pool": "class",
        "pre_norm": False,
        "norm_eps": 1e-6,
        "layer_scale": 1.0,
        "registers": 3,
    },
    "siglip": {"pool": "attention", "pre_norm": False, "activation": "gelu_tanh"},
}


def made(tmp_path, kind="bert", picture="clip", bias=None, cleaning="strip", **fields):
    """(a model with random weights, its tokenizer) of a text encoder's kind."""
    tokens = "bert" if kind in ("bert", "distilbert") else kind
    folder = tmp_path / "text"
    encoders.write_tokenizer(folder, tokens)
    ids = tokenizer_json.ids(content(tokens), "")
    own = TokenizerConfig("huggingface", 400, 16, str(folder), cleaning=cleaning, ids=ids)
    text = bert_tower(kind, **{"context": 16, **BOTH} | fields)
    image = ViT(**towers.VIT | PICTURES[picture], **BOTH)
    words = towers.words_of(own, plain=False)
    return towers.model(image, text, words, bias), tokenizers.build(own)


def write(format_, folder, model, own):
    """The files of an export."""
    folder.mkdir()
    format_.write(model, folder, str(folder))
    for name, text in tokenizer_files(format_, model, own).items():
        (folder / name).write_text(text)
    (folder / tokenizer.CLIPX).write_text(json.dumps(own.save()))
    return folder


def same_towers(a, b):
    assert a.text.clone(dropout=0.0) == b.text
    assert a.image.shape == b.image.shape
    assert a.image.unseen_settings == b.image.unseen_settings


@pytest.mark.parametrize(
    ("kind", "picture"),
    [("bert", "clip"), ("bert", "dinov2"), ("bert", "siglip"), ("roberta", "clip"),
     ("mpnet", "dinov2 with all")],
)  # fmt: skip
def test_a_dual_encoder_is_read_again(kind, picture, tmp_path):
    model, own = made(tmp_path, kind, picture, pool="pooler")
    folder = write(HUGGINGFACE, tmp_path / "out", model, own)
    again, found = pretrained.open_model(str(folder))
    same_towers(again, model)
    assert again.flat.keys() == model.flat.keys()
    assert all(again.flat[k].tobytes() == x.tobytes() for k, x in model.flat.items())
    assert again.differences == () and found(encoders.ODD).tolist() == own(encoders.ODD).tolist()
    (folder / tokenizer.CLIPX).unlink()  # as in a folder that clipx did not write
    _, other = pretrained.open_model(str(folder))
    assert other(verify.CAPTIONS).tolist() == own(verify.CAPTIONS).tolist()


@pytest.mark.parametrize("pool", ["pooler", "cls", "mean"])
def test_open_clip_reads_it_again(pool, tmp_path):
    model, own = made(tmp_path, "roberta", pool=pool, cleaning="clip")
    folder = write(OPEN_CLIP, tmp_path / "out", model, own)
    again = load.load(folder)
    same_towers(again, model)
    assert all(again.flat[k].tobytes() == x.tobytes() for k, x in model.flat.items())


@pytest.mark.parametrize(
    ("format_", "kind", "fields", "says"),
    [
        (HUGGINGFACE, "bert", {"pool": "mean"}, "pool=mean; use --format=open_clip"),
        (HUGGINGFACE, "bert", {"dense_width": 8}, "a dense layer; use --format=open_clip"),
        (HUGGINGFACE, "bert", {"bias": -4.0}, "no logit bias"),
        (OPEN_CLIP, "bert", {"pool": "max"}, "cannot pool a text by 'max'"),
        (OPEN_CLIP, "bert", {"pool": "mean", "dense_width": 8}, "no dense layer"),
        (OPEN_CLIP, "mpnet", {"pool": "mean"}, "does not build a mpnet"),
        (OPEN_CLIP, "distilbert", {}, "does not build a distilbert"),
        (HUGGINGFACE, "bert", {"projection_bias": True}, "projection has a bias"),
        (OPEN_CLIP, "bert", {"projection_bias": True}, "projection has a bias"),
    ],
)
def test_what_has_no_place_is_refused(format_, kind, fields, says, tmp_path):
    model, _ = made(tmp_path, kind, **fields)
    with pytest.raises(NotExpressible, match=says):
        format_.arrays(model)
        format_.configs(model, "")


def test_spaces_that_open_clip_collapses_are_named(tmp_path):
    model, own = made(tmp_path, "roberta", pool="mean")
    with pytest.raises(NotExpressible, match=r"config\.tokenizer\.cleaning=clip"):
        tokenizer_files(OPEN_CLIP, model, own)


def proved(format_, folder, model, own):
    """The proof of an export, whose numbers are close."""
    write(format_, folder, model, own)
    proof = verify.prove(format_, folder, model, own)
    assert min(proof.image_cosine, proof.text_cosine) > 0.999999 and proof.logits < 2e-5
    return proof


@with_open_clip
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("bert", {"pool": "pooler"}),
        ("bert", {"pool": "mean", "normalize": True, "activation": "gelu_tanh"}),
        ("roberta", {"pool": "mean", "cleaning": "clip"}),
        ("roberta", {"pool": "cls", "cleaning": "clip", "embed_dim": 0, "width": 24}),
    ],
)
def test_proof_open_clip(kind, fields, tmp_path):
    proved(OPEN_CLIP, tmp_path / "out", *made(tmp_path, kind, **fields))


@with_transformers
@pytest.mark.parametrize(
    ("kind", "picture"),
    [("bert", "clip"), ("bert", "dinov2"), ("bert", "siglip"), ("roberta", "clip"),
     ("mpnet", "dinov2 with all")],
)  # fmt: skip
def test_proof_dual_encoder(kind, picture, tmp_path):
    fields = {"pool": "pooler", "normalize": kind == "bert"}
    model, own = made(tmp_path, kind, picture, **fields)
    assert proved(HUGGINGFACE, tmp_path / "out", model, own).odd == ()


@with_transformers
def test_a_real_dinov2_is_read_with_its_scales(tmp_path):
    """Nothing in the folder is 0 or 1. The bias of patches goes to their positions."""
    from clipx.interop import libraries

    torch, transformers = libraries.require("torch"), libraries.require("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = transformers.Dinov2Config(**sizes, mlp_ratio=2, image_size=28, patch_size=14)
    words = transformers.BertConfig(**sizes, intermediate_size=64, vocab_size=300)
    both = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(vision, words)
    model = transformers.VisionTextDualEncoderModel(both).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    encoders.write_tokenizer(tmp_path, "bert")
    again, own = pretrained.open_model(str(tmp_path))
    images, ids = verify.pictures(28), own(verify.CAPTIONS)
    said = verify.ours(again, images, ids)
    mean, std = (np.asarray(x, np.float32) for x in (again.mean, again.std))
    pixels = (np.stack(images).astype(np.float32) / 255 - mean) / std
    with torch.no_grad():
        out = model(
            input_ids=torch.from_numpy(ids).long(),
            attention_mask=torch.from_numpy(ids != own.pad_id).long(),
            pixel_values=torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()),
        )
    np.testing.assert_allclose(said.logits, out.logits_per_image, atol=1e-3)
