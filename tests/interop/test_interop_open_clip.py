"""open_clip's format: written models are read back to the bit, and open_clip's outputs are ours."""

import base64
import functools
import types

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.libraries import with_open_clip
from support.towers import BOTH, RESNET, TEXT, VIT, few_words, model, words_of

from clipx.data.text import tokenizers, vocabulary
from clipx.errors import ConfigError, NotExpressible, NotProven
from clipx.interop import libraries, load, open_clip, tokenizer, verify
from clipx.interop import model as models
from clipx.models.bert import BERT
from clipx.models.efficientnet import EfficientNet
from clipx.models.resnet import ResNet
from clipx.models.text import TextTransformer
from clipx.models.vit import ViT

FORMAT = open_clip.OpenClip()


def clip_words(mask=False):
    """(CLIP's tokenizer config, its `Words`, the fields of a text tower for them)."""
    config = tokenizers.TokenizerConfig("clip_bpe", context=16, mask=mask)
    fields = TEXT | {"vocab_size": config.vocab_size, "eot_id": config.eot_id}
    return config, words_of(config), fields


def write(folder, written, files=None):
    folder.mkdir(exist_ok=True)
    FORMAT.write(written, folder, str(folder))
    for name, text in (files or {}).items():
        (folder / name).write_text(text)
    return folder


TOWERS = {
    "vit": (ViT, VIT | {"activation": "quick_gelu", "norm_eps": 1e-6, "mlp_ratio": 2.5}),
    "vit without a norm before": (ViT, VIT | {"pre_norm": False, "activation": "gelu_tanh"}),
    "resnet": (ResNet, RESNET),
    # built by timm, whose norms have an epsilon of 1e-6
    "vit of attention": (ViT, VIT | {"pool": "attention", "pre_norm": False, "norm_eps": 1e-6}),
    "vit of the mean": (
        ViT,
        VIT | {"pool": "mean", "norm_eps": 1e-6, "activation": "gelu_tanh", "mlp_ratio": 2.5},
    ),
}


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("scan", [False, True])
def test_written_and_read_again(name, scan, tmp_path):
    """The arrays come back to the bit and describe the same towers; the mask's row is left out."""
    cls, fields = TOWERS[name]
    words, text = few_words()
    text |= {"activation": fields.get("activation", "gelu"), "projection_bias": scan}
    scans = {"scan": scan} if cls is ViT else {}
    image = cls(**fields, **scans, **BOTH)
    first = model(image, TextTransformer(**text, scan=scan, **BOTH), words, bias=-3.0)
    folder = write(tmp_path / "a", first)
    again = load.load(folder)
    second = write(tmp_path / "b", again)
    a, b = (load_file(f / open_clip.WEIGHTS) for f in (folder, second))
    assert a.keys() == b.keys()
    assert all(a[k].tobytes() == b[k].tobytes() for k in a)
    first_config, second_config = (
        (f / open_clip.CONFIG).read_text().replace(str(f), "") for f in (folder, second)
    )
    assert first_config == second_config
    assert a["token_embedding.weight"].shape == (39, 32)
    fitted = load.fit(again, image, TextTransformer(**text, scan=scan, **BOTH), mask_id=37)
    table = first.params["text"]["token_embedding"]
    fitted_table = np.asarray(fitted["params"]["text"]["token_embedding"])
    np.testing.assert_array_equal(np.delete(fitted_table, 37, 0), np.delete(table, 37, 0))
    third = models.make_model(image, first.text, fitted, **rest(first))
    for path, x in first.flat.items():
        if not path.endswith("token_embedding"):
            np.testing.assert_array_equal(third.flat[path], x, err_msg=path)


@pytest.mark.slow  # full-size names; smaller guests are tested beside
def test_timms_resnet_and_bert_come_back(tmp_path):
    """CLIP-Lite's towers have different widths: zeros pad the output of the narrower one."""
    fields = {"vocab_size": 150, "width": 32, "depth": 2, "heads": 2, "positions": 20}
    none = {"embed_dim": 0, "dtype": "float32"}
    words = models.Words("wordpiece", 150, 16, 0, 101, 102, 103, plain=False)
    image = ResNet(variant="resnet18", image_size=32, **none)
    first = model(image, BERT(context=16, **fields, **none), words)
    folder = write(tmp_path / "a", first)
    again = load.load(folder)
    second = write(tmp_path / "b", again)
    a, b = (load_file(f / open_clip.WEIGHTS) for f in (folder, second))
    assert a.keys() == b.keys() and all(a[k].tobytes() == b[k].tobytes() for k in a)
    assert again.words.kind == "wordpiece" and again.text.positions == 20
    ids = np.array([[101, 110, 120, 102, *[0] * 12]], np.int32)
    said, same = (verify.ours(m, verify.pictures(32)[:2], ids) for m in (first, again))
    np.testing.assert_allclose(said.logits, same.logits, rtol=1e-5)


def rest(written):
    names = ("logit_scale", "logit_bias", "mean", "std", "words")
    return {name: getattr(written, name) for name in names}


def test_names_are_open_clips():
    """Names and shapes are those that open_clip 3 lists for such a model."""
    words, text = few_words()
    written = model(ViT(**VIT, **BOTH), TextTransformer(**text, **BOTH), words)
    arrays = FORMAT.arrays(written)
    shapes = {name: x.shape for name, x in arrays.items()}
    block = "visual.transformer.resblocks.1"
    expected = {
        "logit_scale": (),
        "text_projection": (32, 24),
        "visual.proj": (32, 24),
        "visual.conv1.weight": (32, 3, 16, 16),
        "visual.class_embedding": (32,),
        "visual.positional_embedding": (5, 32),
        f"{block}.attn.in_proj_weight": (96, 32),
        f"{block}.attn.in_proj_bias": (96,),
        f"{block}.mlp.c_fc.weight": (128, 32),
        "transformer.resblocks.0.attn.out_proj.weight": (32, 32),
        "ln_final.bias": (32,),
    }
    assert {name: shapes[name] for name in expected} == expected
    assert len(shapes) == 8 + 2 * 24 + 6


@pytest.mark.parametrize(
    "image, text, says",
    [
        ({}, {"pool": "mean"}, "no mean over tokens"),
        ({}, {"causal": False, "mask_padding": True}, "padding"),
        ({"activation": "quick_gelu"}, {}, "--format=huggingface"),
        ({}, {"activation": "quick_gelu"}, "--format=huggingface"),
        ({"embed_dim": 20}, {}, "20 channels"),
    ],
)
def test_what_has_no_place_is_refused(image, text, says):
    words, fields = few_words()
    written = model(ViT(**VIT | BOTH | image), TextTransformer(**fields | BOTH | text), words)
    with pytest.raises(NotExpressible, match=says):
        FORMAT.arrays(written)


@with_open_clip
def test_proof_vit(tmp_path):
    """QuickGELU, another epsilon, a bias in the text's projection; OpenAI's token ids, shifted by a
    mask token."""
    config, words, text = clip_words(mask=True)
    both = BOTH | {"activation": "quick_gelu", "norm_eps": 1e-6}
    image, text = ViT(**VIT, **both), TextTransformer(**text, projection_bias=True, **both)
    written = model(image, text, words)
    proof = verify.prove(FORMAT, write(tmp_path / "a", written), written, tokenizers.build(config))
    assert proof.image_cosine > 0.9999999 and proof.logits < 1e-5 and not proof.odd


@with_open_clip
def test_proof_resnet(tmp_path):
    """The modified ResNet, a scanned text tower with GELU that pools at the end mark, SigLIP's
    bias, and a SentencePiece model that open_clip reads."""
    config = tokenizers.TokenizerConfig("sentencepiece", vocab_size=120, context=16, mask=True)
    words = words_of(config, plain=False)
    made = tokenizers.build(config, ["a dog runs", "two men ride a horse", "the café 12"] * 9)
    fields = TEXT | {"vocab_size": 120, "eot_id": 3, "scan": True}
    written = model(ResNet(**RESNET, **BOTH), TextTransformer(**fields, **BOTH), words, bias=-3)
    core = tokenizer.sentencepiece(base64.b64decode(made.save()["payload"]))
    files = tokenizer.files(core, words.without_mask(), "clip")
    proof = verify.prove(FORMAT, write(tmp_path / "a", written, files), written, made)
    assert proof.image_cosine > 0.9999999 and proof.logits < 1e-5
    broken = load_file(tmp_path / "a" / open_clip.WEIGHTS)
    broken["visual.layer2.1.conv2.weight"] = broken["visual.layer2.1.conv2.weight"][::-1].copy()
    save_file(broken, tmp_path / "a" / open_clip.WEIGHTS)
    with pytest.raises(NotProven, match="cosine of an image"):
        verify.prove(FORMAT, tmp_path / "a", written, made)


@with_open_clip
@pytest.mark.parametrize("pool, pre_norm", [("mean", True), ("attention", False)])
def test_proof_without_a_class_token(pool, pre_norm, tmp_path):
    """timm's ViT, whose norms have another epsilon than clipx's; GELU by tanh in one tower."""
    config, words, text = clip_words()
    acts = ["gelu_tanh", "gelu"] if pre_norm else ["gelu", "gelu_tanh"]
    image = ViT(**VIT, pool=pool, pre_norm=pre_norm, activation=acts[0], **BOTH)
    written = model(image, TextTransformer(**text, activation=acts[1], **BOTH), words)
    folder = write(tmp_path / "a", written)
    proof = verify.prove(FORMAT, folder, written, tokenizers.build(config))
    assert proof.image_cosine > 0.9999999 and proof.logits < 1e-4


GUESTS = {
    "registers": ViT(**VIT, pre_norm=False, registers=2, layer_scale=0.1, **BOTH),
    "norm_pooled": ViT(
        **VIT, pre_norm=False, pool="mean", class_token=True, norm_pooled=True, **BOTH
    ),
    "resnet18d": ResNet(variant="resnet18", deep_stem=True, image_size=32, **BOTH),
    "efficientnet": EfficientNet(
        variant="efficientnet_lite0", image_size=32, padding="same", norm_eps=1e-3, **BOTH
    ),
}


@with_open_clip
@pytest.mark.parametrize("name", GUESTS)
def test_proof_of_towers_that_timm_has(name, tmp_path):
    """Written, judged by open_clip, and read back as a tower of the same output."""
    config, words, text = clip_words()
    written = model(GUESTS[name], TextTransformer(**text, **BOTH), words)
    folder = write(tmp_path / "a", written)
    proof = verify.prove(FORMAT, folder, written, tokenizers.build(config))
    assert proof.image_cosine > 0.9999999 and proof.logits < 1e-4
    read, x = load.load(str(folder)), np.random.default_rng(0).normal(size=(2, 32, 32, 3))
    assert read.image.unseen_settings.keys() == written.image.unseen_settings.keys()

    def encoded(m):
        stats = m.batch_stats.get("image", {})
        variables = {"params": m.params["image"], "batch_stats": stats}
        return jax.jit(m.image.apply)(variables, x).raw

    ours, back = encoded(written), encoded(read)
    np.testing.assert_allclose(back, ours, rtol=1e-4, atol=1e-5)


def test_towers_that_timm_does_not_have_are_refused():
    _, words, text = clip_words()
    for fields, match in (
        ({"width": 0.5}, "width or depth"),
        ({"padding": "same"}, "padding=same and norm_eps=1e-05"),
    ):
        image = EfficientNet(image_size=32, **fields, **BOTH)
        written = model(image, TextTransformer(**text, **BOTH), words)
        with pytest.raises(NotExpressible, match=match):
            FORMAT.configs(written, "")


@with_open_clip
def test_proof_plain_resnet_and_bert(tmp_path):
    """CLIP-Lite's towers have no projections, and different widths."""
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789"]
    marks = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = "\n".join([*marks, *letters, *("##" + c for c in letters), "dog", "two", "men"])
    (tmp_path / "vocab.txt").write_text(pieces)
    config = tokenizers.TokenizerConfig(
        "wordpiece", pieces.count("\n") + 1, 16, str(tmp_path / "vocab.txt"), cleaning="clip_lite"
    )
    none = {"embed_dim": 0, "dtype": "float32"}
    fields = {"width": 32, "depth": 2, "heads": 2, "positions": 20, "context": 16}
    text = BERT(vocab_size=config.vocab_size, **fields, **none)
    words = words_of(config, plain=False)
    written = model(ResNet(variant="resnet18", image_size=32, **none), text, words)
    files = tokenizer.files(vocabulary.word_pieces(pieces), words, "clip_lite")
    folder = write(tmp_path / "a", written, files)
    proof = verify.prove(FORMAT, folder, written, tokenizers.build(config))
    assert proof.image_cosine > 0.9999999 and proof.text_cosine > 0.9999999


@with_open_clip
@pytest.mark.parametrize("side, length", [(2, 9), (3, 20), (6, 5)])
def test_positions_are_resized_as_open_clip_does(side, length):
    """Compares with open_clip's own functions on the same arrays."""
    torch = libraries.require("torch")
    theirs = libraries.require("open_clip.model")
    rng = np.random.default_rng(0)
    grid, line = (rng.normal(size=(n, 5)).astype(np.float32) for n in (17, 11))
    state = {
        "visual.positional_embedding": torch.from_numpy(grid),
        "positional_embedding": torch.from_numpy(line),
    }
    visual = types.SimpleNamespace(grid_size=(side, side))
    towers = types.SimpleNamespace(visual=visual, positional_embedding=torch.zeros(length, 5))
    theirs.resize_pos_embed(state, towers)
    theirs.resize_text_pos_embed(state, towers)
    found = load.resize_grid(grid, 1, side), load.resize_line(line, length)
    np.testing.assert_array_equal(found[0][0], grid[0])
    for ours, name in zip(found, state):
        np.testing.assert_allclose(ours, state[name].numpy(), rtol=1e-5, atol=1e-5)


@with_open_clip
def test_proof_tanh_and_torchs_own_file(tmp_path):
    """A class token, and GELU by tanh in both towers. Torch files give the same arrays: a state
    dict, a checkpoint of training, and a TorchScript model such as OpenAI's."""
    torch = libraries.require("torch")
    config, words, text = clip_words()
    both = BOTH | {"activation": "gelu_tanh"}
    written = model(ViT(**VIT, **both), TextTransformer(**text, **both), words)
    folder = write(tmp_path / "a", written)
    proof = verify.prove(FORMAT, folder, written, tokenizers.build(config))
    assert proof.image_cosine > 0.9999999 and proof.logits < 1e-5
    arrays = {k: torch.from_numpy(x) for k, x in load_file(folder / open_clip.WEIGHTS).items()}
    training = {"epoch": 1, "state_dict": {f"module.{k}": x for k, x in arrays.items()}}
    for name, value in {"a.bin": arrays, "b.pt": training}.items():
        torch.save(value, folder / name)
        again = load.load(folder / name)
        assert all(x.tobytes() == again.flat[k].tobytes() for k, x in written.flat.items())
    (folder / "c.pt").write_bytes((folder / "b.pt").read_bytes()[:-999])
    with pytest.raises(ConfigError, match="a complete torch file"):
        load.load(folder / "c.pt")
    open_clip_ = libraries.require("open_clip")
    with libraries.quiet():
        theirs = open_clip_.create_model(f"local-dir:{folder}").eval()
        script = torch.jit.script(theirs)
        script.save(folder / "script.pt")
    again = load.load(folder / "script.pt")
    assert all(x.tobytes() == again.flat[k].tobytes() for k, x in written.flat.items())


def test_what_cannot_be_read_is_one_line(tmp_path):
    words, text = few_words()
    written = model(ViT(**VIT, **BOTH), TextTransformer(**text, **BOTH), words)
    folder = write(tmp_path / "a", written)
    check = functools.partial(pytest.raises, ConfigError)
    with check(match="nothing at"):
        load.load(tmp_path / "nowhere")
    with check(match="nothing in it"):
        (tmp_path / "empty").mkdir()
        load.load(tmp_path / "empty")
    weights = (folder / open_clip.WEIGHTS).read_bytes()
    (folder / open_clip.WEIGHTS).write_bytes(weights[: len(weights) // 2])
    with check(match="a complete safetensors file"):
        load.load(folder)
    arrays, configs = FORMAT.arrays(written), FORMAT.configs(written, "")
    config = configs[open_clip.CONFIG]
    del arrays["ln_final.bias"]
    with check(match=r"no ln_final\.bias"):
        FORMAT.read(arrays, configs.get)
    arrays = FORMAT.arrays(written)
    with check(match="extra"):
        FORMAT.read(arrays | {"extra": np.zeros(3)}, configs.get)
    config["model_cfg"]["text_cfg"]["layers"] = 1
    with check(match=r"transformer\.resblocks\.1"):
        FORMAT.read(arrays, configs.get)
    config["model_cfg"]["vision_cfg"]["qk_norm"] = True
    with check(match="qk_norm"):
        FORMAT.read(arrays, configs.get)


def test_other_towers_are_listed_and_refused():
    words, fields = few_words()
    given = model(ViT(**VIT, **BOTH), TextTransformer(**fields, **BOTH), words)
    image = ViT(**VIT | {"image_size": 48}, **BOTH | {"activation": "quick_gelu"})
    text = TextTransformer(**fields | {"context": 12}, **BOTH | {"embed_dim": 8})
    with pytest.raises(ConfigError) as caught:
        load.fit(given, image, text)
    for line in ("image.activation", "text.projection: (32, 24), and (32, 8)"):
        assert line in str(caught.value)
    allowed = ("image.activation", "text.projection")
    found = load.fit(given, image, text, ignore=allowed)["params"]
    assert "projection" not in found["text"]
    assert found["image"]["positional_embedding"].shape == (10, 32)
    assert found["text"]["positional_embedding"].shape == (12, 32)
