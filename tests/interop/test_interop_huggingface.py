"""transformers' format: written models are read back to the bit, and transformers' outputs are
ours."""

import base64
import dataclasses
import json

import numpy as np
import pytest
from support.libraries import with_transformers
from support.towers import BOTH, RESNET, TEXT, VIT, few_words, model, words_of

from clipx.data.text import tokenizers, vocabulary
from clipx.errors import NotExpressible
from clipx.interop import huggingface, libraries, load, tokenizer, verify
from clipx.models.resnet import ResNet
from clipx.models.text import TextTransformer
from clipx.models.vit import ViT

FORMAT = huggingface.HuggingFace()
SIGLIP = (  # with GELU by tanh, as in Google's models
    ViT(
        **VIT | {"pool": "attention", "pre_norm": False, "activation": "gelu_tanh"},
        dtype="float32",
        embed_dim=0,
    ),
    {"causal": False, "pool": "last", "embed_dim": 32, "dtype": "float32"}
    | {"activation": "gelu_tanh"},
)


def write(folder, written, files=None):
    folder.mkdir(exist_ok=True)
    FORMAT.write(written, folder, str(folder))
    for name, text in (files or {}).items():
        (folder / name).write_text(text)
    return folder


def both_kinds():
    words, text = few_words()
    yield model(ViT(**VIT, **BOTH), TextTransformer(**text, **BOTH), words)
    image, fields = SIGLIP
    text |= fields | {"projection_bias": True}
    words = dataclasses.replace(words, kind="sentencepiece", plain=False)
    yield model(image, TextTransformer(**text), words, bias=-4)


@pytest.mark.parametrize("kind", [0, 1])
def test_written_and_read_again(kind, tmp_path):
    first = list(both_kinds())[kind]
    again = load.load(write(tmp_path / "a", first))
    a, b = (FORMAT.arrays(m) for m in (first, again))
    assert a.keys() == b.keys()
    assert all(a[k].tobytes() == b[k].tobytes() for k in a)
    a, b = (FORMAT.configs(m, "") for m in (first, again))
    assert a[huggingface.PREPROCESSOR] == b[huggingface.PREPROCESSOR]
    for section in ("text_config", "vision_config"):
        a_section, b_section = (x[huggingface.CONFIG][section] for x in (a, b))
        same = {k: v for k, v in a_section.items() if not k.endswith("token_id")}
        assert same == {k: b_section[k] for k in same}


@pytest.mark.parametrize(
    "image, text, bias, says",
    [
        (ResNet(**RESNET, **BOTH), {}, None, "ResNet.*--format=open_clip"),
        (ViT(**VIT, pool="mean", **BOTH), {}, None, "pools by the mean"),
        (ViT(**VIT, pre_norm=False, **BOTH), {}, None, "LayerNorm before.*--format=open_clip"),
        (ViT(**VIT, **BOTH), {"projection_bias": True}, None, "bias.*--format=open_clip"),
        (ViT(**VIT, **BOTH), {"causal": False}, None, "without a causal mask"),
        (ViT(**VIT, **BOTH), {}, -3.0, "logit bias.*--format=open_clip"),
        (ViT(**VIT, pool="attention", **BOTH), {}, None, "config.image.embed_dim=0"),
    ],
)
def test_what_has_no_place_is_refused(image, text, bias, says):
    words, fields = few_words()
    written = model(image, TextTransformer(**fields | BOTH | text), words, bias)
    with pytest.raises(NotExpressible, match=says):
        FORMAT.arrays(written)


def test_padding_that_counts_must_be_trainings():
    """The text tower reads padding, and transformers' CLIP tokenizer pads with another id."""
    first = list(both_kinds())[1]
    words = dataclasses.replace(first.words, kind="clip_bpe")
    with pytest.raises(NotExpressible, match="SentencePiece"):
        FORMAT.arrays(dataclasses.replace(first, words=words))


def saved_by_transformers(folder, written):
    """Checks that the files that transformers itself saves are read to the bit, as the same
    towers."""
    transformers = libraries.require("transformers")
    with libraries.quiet():
        transformers.AutoModel.from_pretrained(folder / "a").save_pretrained(folder / "b")
    again, gone = load.load(folder / "b"), written.words.dropped
    for path, x in written.flat.items():
        if path.endswith("token_embedding") and gone is not None:
            x = np.delete(x, gone, axis=0)
        assert x.tobytes() == again.flat[path].tobytes(), path
    for name in ("image", "text"):
        tower, other = getattr(written, name), getattr(again, name)
        assert (tower.activation, tower.norm_eps) == (other.activation, other.norm_eps)


@with_transformers
def test_proof_clip(tmp_path):
    """GELU for pictures, QuickGELU for texts, and a custom vocabulary with a mask."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    merges = [f"{a} {b}" for a in letters[:9] for b in letters[:9]]
    (tmp_path / "merges.txt").write_text("#version\n" + "\n".join(merges) + "\n")
    config = tokenizers.TokenizerConfig(
        "clip_bpe", 515 + len(merges), 16, str(tmp_path / "merges.txt"), mask=True
    )
    words = words_of(config, plain=False)
    fields = TEXT | {"vocab_size": config.vocab_size, "eot_id": config.eot_id}
    text = TextTransformer(**fields, activation="quick_gelu", norm_eps=1e-6, **BOTH)
    written = model(ViT(**VIT, **BOTH), text, words)
    core = vocabulary.byte_pairs("\n".join(merges))
    files = tokenizer.clip_files("\n".join(merges), core.get_vocab(), 16)
    made = tokenizers.build(config)
    proof = verify.prove(FORMAT, write(tmp_path / "a", written, files), written, made)
    saved_by_transformers(tmp_path, written)
    assert proof.image_cosine > 0.9999999 and proof.logits < 1e-5


@with_transformers
@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_proof_siglip(kind, tmp_path):
    """Attention pooling, pooling at the last token, padding that is read, a scale and a bias."""
    config = tokenizers.TokenizerConfig("sentencepiece", 120, 16, model=kind)
    made = tokenizers.build(config, ["a dog runs", "two men ride a horse", "the café 12"] * 9)
    words = words_of(config, plain=False)
    image, fields = SIGLIP
    fields = TEXT | fields | {"vocab_size": 120, "eot_id": 3}
    written = model(image, TextTransformer(**fields), words, bias=-4)
    core = tokenizer.sentencepiece(base64.b64decode(made.save()["payload"]))
    files = tokenizer.files(core, words, "clip", attention_mask=False)
    proof = verify.prove(FORMAT, write(tmp_path / "a", written, files), written, made)
    saved_by_transformers(tmp_path, written)
    assert proof.image_cosine > 0.9999999 and proof.logits < 1e-5


def test_patches_bias_becomes_part_of_positions(tmp_path):
    """Google's SigLIP has a bias of the patch embedding; clipx's towers have none."""
    first = list(both_kinds())[1]
    arrays, configs = FORMAT.arrays(first), FORMAT.configs(first, "")
    bias = np.arange(32, dtype=np.float32)
    arrays["vision_model.embeddings.patch_embedding.bias"] = bias
    again = FORMAT.read(arrays, configs.get)
    np.testing.assert_array_equal(
        again.params["image"]["positional_embedding"],
        first.params["image"]["positional_embedding"] + bias,
    )


@pytest.mark.parametrize("marks", [{}, {"eos_token_id": 49407, "pad_token_id": 1}])
def test_siglips_own_marks_whatever_its_config_says(marks):
    """The defaults of transformers' class are CLIP's ids, which a large vocabulary contains too."""
    first = list(both_kinds())[1]
    arrays, configs = FORMAT.arrays(first), FORMAT.configs(first, "")
    config = configs[huggingface.CONFIG]
    words = {k: v for k, v in config["text_config"].items() if not k.endswith("token_id")}
    arrays["text_model.embeddings.token_embedding.weight"] = np.zeros((50_000, 32), np.float32)
    config["text_config"] = words | {"vocab_size": 50_000} | marks
    text = FORMAT.read(arrays, configs.get).text
    assert (text.vocab_size, text.eot_id, text.pad_id) == (50_000, 1, 1)


def test_a_preprocessor_beside_the_tokenizer(tmp_path):
    """A processor of transformers 5 saves the preprocessor in its own file."""
    first = list(both_kinds())[0]
    folder = write(tmp_path / "a", first)
    settings = json.loads((folder / huggingface.PREPROCESSOR).read_text())
    (folder / huggingface.PREPROCESSOR).unlink()
    assert load.load(folder).mean != first.mean
    (folder / huggingface.PROCESSOR).write_text(json.dumps({"image_processor": settings}))
    again = load.load(folder)
    assert (again.mean, again.std, again.resize) == (first.mean, first.std, first.resize)
