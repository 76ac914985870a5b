"""Folders as people download them: towers of other libraries, with their tokenizers."""

import json

import jax
import numpy as np
import pytest
from support import encoders, foreign_tokenizers, tiny
from support.libraries import with_open_clip, with_transformers
from support.towers import BOTH, TEXT, VIT, model

from clipx.data.text import cleaning
from clipx.errors import ConfigError
from clipx.interop import libraries, load, named, open_clip, origin, t5_layout, tokenizer, verify
from clipx.interop.model import Words
from clipx.models.convnext import ConvNeXt
from clipx.models.eva import EVA
from clipx.models.t5 import T5
from clipx.models.text import TextTransformer
from clipx.models.vit import ViT
from clipx.serving.evaluation import evaluate_file
from clipx.training import pretrained
from clipx.training.initial import init
from clipx.training.run import assemble, with_data

FORMAT = open_clip.OpenClip()
WORDS = Words("clip_bpe", 40, 16, 0, 38, 39, None, True)
PLAIN = TextTransformer(**TEXT, vocab_size=40, eot_id=39, **BOTH)
IMAGE = ViT(**VIT, **BOTH)
PE = {"gated": False, "sub_norms": False, "key_bias": True, "pre_norm": True, "norm_eps": 1e-5}
CONVNEXT = {"variant": "tiny", "image_size": 32, "width": 4, "blocks": (1, 1, 1, 1)}
EVA_SIZES = {"image_size": 32, "width": 16, "depth": 1, "heads": 2, "mlp_ratio": 2.0}
NLLB = {"width": 64, "causal": False, "pool": "first", "mask_padding": True, "activation": "relu"}
IMAGES = {
    "a grid that leaves pixels out": ViT(**VIT | {"image_size": 40}, uneven=True, **BOTH),
    "CLIPA": ViT(**VIT, pool="mean", class_token=True, norm_pooled=True, pre_norm=False, **BOTH),
    "CoCa": ViT(**VIT, pool="query", pool_width=24, pool_heads=2, class_token=True, **BOTH),
    "CoCa of one width": ViT(
        **VIT, pool="query", pool_heads=2, class_token=True, **BOTH | {"embed_dim": 32}
    ),
    "timm's own head": ViT(**VIT, projection_bias=True, **BOTH),
    "ConvNeXt": ConvNeXt(**CONVNEXT, **BOTH),
    "ConvNeXt with an MLP": ConvNeXt(**CONVNEXT, hidden=48, **BOTH),
    "EVA-02": EVA(**EVA_SIZES, projection_bias=True, pool_heads=2, **BOTH),
    "EVA-02 E": EVA(
        **EVA_SIZES, gated=False, sub_norms=False, post_norm=True, rotary=False, **BOTH
    ),
    "PE-Core": EVA(
        **EVA_SIZES, **PE, rotary_first=1, rotary_x_first=True, pool="attention", **BOTH
    ),
}
TEXTS = {
    "CoCa": TextTransformer(**TEXT, vocab_size=40, eot_id=39, pool="class", **BOTH),
    "no projection": TextTransformer(
        **TEXT | {"width": 24}, vocab_size=40, eot_id=39, **BOTH | {"embed_dim": 0}
    ),
    "RoBERTa": encoders.bert_tower(
        "roberta", pool="mean", dense_width=28, dense_bias=False, dense_activation="gelu", **BOTH
    ),
    "mT5": T5(
        vocab_size=40, context=16, width=32, depth=1, heads=2, head_width=8, mlp_width=40,
        dense_width=28, dropout=0.0, **BOTH,
    ),
    "NLLB": TextTransformer(**TEXT | NLLB, vocab_size=40, eot_id=2, pad_id=1, **BOTH),
}  # fmt: skip


CASES = [*IMAGES, *(f"{name} text" for name in TEXTS)]


def _image(name):
    image = IMAGES[name]
    return model(image, PLAIN.clone(embed_dim=image.output_width), WORDS)


def _text(name):
    text = TEXTS[name]
    made = model(IMAGE.clone(embed_dim=text.output_width), text, WORDS)
    if name == "NLLB":  # whose positions have a formula
        made.params["text"]["positional_embedding"] = t5_layout.positions(text)
    return made


@pytest.mark.parametrize("name", CASES)
def test_towers_come_back_to_the_bit(name, tmp_path):
    """An export is read as the same towers, and exported again as the same files."""
    first = _text(name.removesuffix(" text")) if name.endswith(" text") else _image(name)
    folder, again = tmp_path / "a", tmp_path / "b"
    for at in (folder, again):
        at.mkdir()
    written = FORMAT.write(first, folder, str(folder))
    read = load.load(folder)
    if not name.endswith(" text"):
        fields = {f: getattr(first.image, f) for f in read.image.unseen_settings}
        assert {f: getattr(read.image, f) for f in fields} == fields
    for path, x in first.flat.items():
        np.testing.assert_array_equal(read.flat[path], x, err_msg=path)
    back = FORMAT.write(read, again, str(again))
    assert back.keys() == written.keys()
    assert all(back[k].tobytes() == written[k].tobytes() for k in written)


KINDS = {
    "gemma": {"clean": "canonicalize"},
    "siglip2": {"clean": "lower"},
    "t5": {"clean": "canonicalize"},
    "xlm-roberta": {},
    "bert": {"strip_sep_token": True},
}
ODD = [
    *encoders.ODD,
    "a" * 10_000,
    "snake_case & co. &lt;b&gt;",
    "it's\r\n\x85",
    "ß ẞ İ ı",
]


@with_open_clip
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_open_clips(kind, tmp_path):
    """Of 60 odd texts, with the folder's own normaliser, marks and length, cleaned as its config
    says."""
    theirs = foreign_tokenizers.made(kind)
    theirs.save_pretrained(tmp_path)
    settings = tmp_path / "tokenizer_config.json"
    values = json.loads(settings.read_text())
    settings.write_text(json.dumps(values | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    words = {
        "vocab_size": 700,
        "context_length": 24,
        "hf_tokenizer_name": "a/b",
        "pool_type": "last",
    }
    config = {"model_cfg": {"text_cfg": words | {"tokenizer_kwargs": KINDS[kind]}}}
    (tmp_path / open_clip.CONFIG).write_text(json.dumps(config))
    ours = pretrained.open_tokenizer(str(tmp_path))
    assert ours is not None, pretrained._find_tokenizer(str(tmp_path))
    judge = libraries.require("open_clip").tokenizer.HFTokenizer
    expected = judge(str(tmp_path), 24, **KINDS[kind])(ODD).numpy()
    for text, a, b in zip(ODD, ours(ODD), expected):
        np.testing.assert_array_equal(a, b, err_msg=repr(text[:60]))


def _npz(made, scanned):
    """A SigLIP in big_vision's names: flax's own layout, so that arrays stay as they are."""
    image, text = made.params["image"], made.params["text"]

    def attention(name, params, parts=("query", "key", "value"), key="qkv"):
        found = {}
        for i, part in enumerate(parts):
            found[f"{name}/{part}/kernel"] = params[key]["kernel"][:, i]
            found[f"{name}/{part}/bias"] = params[key]["bias"][i]
        return found

    def block(name, params):
        mha = f"{name}/MultiHeadDotProductAttention_0"
        found = attention(mha, params["attn"])
        found |= {f"{mha}/out/{leaf}": x for leaf, x in params["attn"]["out"].items()}
        for i, ln in enumerate(("ln_1", "ln_2")):
            found |= {f"{name}/LayerNorm_{i}/{leaf}": x for leaf, x in params[ln].items()}
        for i, fc in enumerate(("fc", "proj")):
            dense = params["mlp"][fc].items()
            found |= {f"{name}/MlpBlock_0/Dense_{i}/{leaf}": x for leaf, x in dense}
        return found

    def blocks(name, params):
        parts = [block(name + "/encoderblock_X", params[f"block_{i}"]) for i in range(2)]
        if scanned:
            keys = {k: k.replace("_X", "") for k in parts[0]}
            return {new: np.stack([part[k] for part in parts]) for k, new in keys.items()}
        return {
            k.replace("_X", f"_{i}"): x for i, part in enumerate(parts) for k, x in part.items()
        }

    bias = np.linspace(-1, 1, 32, dtype=np.float32)
    mha, pool = "img/MAPHead_0/MultiHeadDotProductAttention_0", image["pool"]
    found = {
        "img/embedding/kernel": image["patch_embedding"]["kernel"],
        "img/embedding/bias": bias,
        "img/pos_embedding": (image["positional_embedding"] - bias)[None],
        "img/MAPHead_0/probe": pool["probe"][None],
        f"{mha}/query/kernel": pool["attn"]["q"]["kernel"],
        f"{mha}/query/bias": pool["attn"]["q"]["bias"],
        f"{mha}/out/kernel": pool["out"]["kernel"].reshape(2, 16, 32),
        f"{mha}/out/bias": pool["out"]["bias"],
        "txt/Embed_0/embedding": text["token_embedding"],
        "txt/pos_embedding": text["positional_embedding"][None],
        "t": np.full(1, 2.0, np.float32),
        "b": np.full(1, -9.0, np.float32),
    }
    found |= attention(mha, pool["attn"], ("key", "value"), "kv")
    for i, fc in enumerate(("fc", "proj")):
        dense = pool["mlp"][fc].items()
        found |= {f"img/MAPHead_0/MlpBlock_0/Dense_{i}/{leaf}": x for leaf, x in dense}
    norms = {"img/MAPHead_0/LayerNorm_0": pool["ln"], "txt/head": text["projection"]}
    norms["img/Transformer/encoder_norm"] = image["ln_post"]
    norms["txt/Encoder_0/encoder_norm"] = text["ln_final"]
    found |= {f"{name}/{leaf}": x for name, part in norms.items() for leaf, x in part.items()}
    found |= blocks("img/Transformer", image["transformer"])
    found |= blocks("txt/Encoder_0", text["transformer"])
    return {f"params/{name}": x for name, x in found.items()}


@pytest.mark.parametrize("scanned", [False, True])
def test_a_siglip_of_big_vision(scanned, tmp_path):
    """Its arrays tell sizes and heads; a file that lacks one is refused by name."""
    common = {"activation": "gelu_tanh", "norm_eps": 1e-6}
    image = ViT(**VIT, **BOTH | common | {"embed_dim": 0}, pool="attention", pre_norm=False)
    fields = TEXT | {"vocab_size": 40, "eot_id": 1, "pad_id": 1, "causal": False, "pool": "last"}
    text = TextTransformer(**fields, **BOTH | common | {"embed_dim": 32}, projection_bias=True)
    made = model(image, text, WORDS, bias=-9.0)
    arrays = _npz(made, scanned)
    np.savez(tmp_path / "siglip.npz", **arrays)
    read = load.load(tmp_path / "siglip.npz")
    assert (read.resize, read.image.shape, read.text.heads) == ("squash", image.shape, 2)
    assert read.image.unseen_settings == image.unseen_settings
    for path, x in made.flat.items():
        np.testing.assert_allclose(read.flat[path], x, atol=1e-6, err_msg=path)
    for name in ("params/t", "params/img/embedding/bias"):
        np.savez(tmp_path / "part.npz", **{k: x for k, x in arrays.items() if k != name})
        with pytest.raises(ConfigError, match=rf"part\.npz, without {name}\n.*with Embed_0"):
            load.load(tmp_path / "part.npz")
    np.savez(tmp_path / "part.npz", **{k: x for k, x in arrays.items() if "/encoderb" not in k})
    with pytest.raises(ConfigError, match=r"without params/img/Transformer/encoderblock_0/"):
        load.load(tmp_path / "part.npz")


def test_a_bare_file_with_its_models_name(tmp_path):
    """Arrays do not tell the activation and the heads: a name in front of the file does."""
    first = _image("CoCa")
    folder = tmp_path / "a"
    folder.mkdir()
    FORMAT.write(first, folder, str(folder))
    (folder / open_clip.CONFIG).rename(tmp_path / "mine.json")
    plain = tmp_path / "b"
    plain.mkdir()
    FORMAT.write(model(IMAGE, PLAIN, WORDS), plain, str(plain))
    (plain / open_clip.CONFIG).unlink()
    with pytest.raises(ConfigError, match="(?s)beside it.*ViT-B-32@") as caught:
        load.load(plain / open_clip.WEIGHTS)
    assert caught.value.fix
    read = load.load(f"{tmp_path / 'mine.json'}@{folder / open_clip.WEIGHTS}")
    for path, x in first.flat.items():
        np.testing.assert_array_equal(read.flat[path], x, err_msg=path)
    assert "mean and std" in read.notes[-1]
    with pytest.raises(ConfigError, match="nothing at nowhere.json"):
        load.load(f"nowhere.json@{folder / open_clip.WEIGHTS}")


@with_open_clip
def test_names_of_open_clip(tmp_path):
    given = named.config("ViT-B/32", "-")["model_cfg"]
    assert given["vision_cfg"]["patch_size"] == 32
    assert named.config("ViT-B-16-SigLIP", "-")["preprocess_cfg"]["resize_mode"] == "squash"
    with pytest.raises(ConfigError, match="did you mean ViT-B-32"):
        named.config("ViT-B-33", "-")
    with pytest.raises(ConfigError, match=r"nothing at ViT-B-32\n(.*\n)*.*ViT-B-32@FILE"):
        load.load("ViT-B-32")
    with pytest.raises(ConfigError, match=r"nothing at gs://b/clip\n(.*\n)*.*to a local disk"):
        load.load("gs://b/clip")


@with_transformers
@pytest.mark.parametrize("kind", ["metaclip_2", "siglip2"])
def test_kin_of_transformers(kind, tmp_path):
    """MetaCLIP 2, whose texts end at id 2, and NaFlex SigLIP 2 with its own grid of patches."""
    torch, transformers = libraries.require("torch"), libraries.require("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2}
    words = sizes | {"vocab_size": 90, "max_position_embeddings": 12, "projection_dim": 24}
    if kind == "metaclip_2":
        words |= {"eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1}
        vision = sizes | {"image_size": 32, "patch_size": 8, "projection_dim": 24}
        config = transformers.MetaClip2Config(
            text_config=words, vision_config=vision, projection_dim=24
        )
        cls = transformers.MetaClip2Model
    else:
        words.pop("projection_dim")
        vision = sizes | {"num_patches": 16, "patch_size": 8}
        config = transformers.Siglip2Config(text_config=words, vision_config=vision)
        cls = transformers.Siglip2Model
    torch.manual_seed(0)
    with libraries.quiet(), torch.no_grad():
        theirs = cls(config).eval()
        for x in theirs.parameters():
            x.add_(0.1 * torch.randn(x.shape))
        theirs.save_pretrained(tmp_path)
        read = load.load(tmp_path)
        pixels = np.stack(verify.pictures(32))
        seen = (pixels / 255 - np.array(read.mean)) / np.array(read.std)
        ids = np.array([[0, 40, 89, 7, 2, 1, 1, 1, 1, 1, 1, 1], [0, 30, 2, *[1] * 9]], np.int32)
        given = {"input_ids": torch.tensor(ids).long()}
        x = torch.tensor(seen.astype(np.float32))
        if kind == "metaclip_2":
            given["pixel_values"] = x.permute(0, 3, 1, 2)
        else:
            patches = x.reshape(-1, 4, 8, 4, 8, 3).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, 192)
            shape = torch.tensor([[4, 4]] * len(pixels))
            mask = torch.ones(len(pixels), 16).long()
            given |= {"pixel_values": patches, "spatial_shapes": shape}
            given["pixel_attention_mask"] = mask
        expected = theirs(**given).logits_per_image.numpy()
    got = verify.ours(read, list(pixels), ids).logits
    assert np.ptp(expected) > 0.01
    np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max())


def test_origin_and_licence(tmp_path):
    """Of weights that a run starts from, for the model card."""
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"init_from": f"ViT-B-32@{folder}/epoch.pt", "image": {"init_from": ""}, "text": {}}
    ((said, name),) = origin.origins(config)
    assert name == "" and "its folder does not say" in said
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: 'apple-amlr'\n---\n# x")
    ((said, name),) = origin.origins(config)
    assert name == "apple-amlr" and said.startswith("Both towers start from `ViT-B-32@")
    (folder / "README.md").write_text("# license: mit")
    assert origin.license_of(str(folder)) == ""


def test_exported_normalizers_clean_as_open_clips_rules(tmp_path):
    """But for broken encodings and HTML, which no normalizer mends."""
    from tokenizers import normalizers

    texts = ["Snake_case, it's  a DOG!", " A  b\tC ", "x"]
    for rule in ("canonical", "lower"):
        made = normalizers.Sequence(tokenizer.cleaning(rule, lower=False))
        assert [made.normalize_str(x) for x in texts] == [cleaning.RULES[rule](x) for x in texts]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*IMAGES, "CoCa text"])
def test_a_family_is_evaluated_and_trained(name, tmp_path):
    """As clipx.evaluate and clipx.train start from it: towers, tokenizer and preprocessing of the
    folder. Two steps change the loss's parameters, and what they give is finite."""
    words = Words("clip_bpe", 49408, 16, 0, 49406, 49407, None, True)
    text = TextTransformer(**TEXT, vocab_size=49408, eot_id=49407, **BOTH)
    if name == "CoCa text":
        text, image = text.clone(pool="class"), IMAGE
    else:
        image = IMAGES[name]
    text = text.clone(embed_dim=image.output_width)
    FORMAT.write(model(image, text, words), tmp_path, str(tmp_path))
    evals = {"retrieval": {"data": {"source": "shapes", "split": "test"}, "limit": 16}}
    assert 0 <= evaluate_file(str(tmp_path), evals)["retrieval/mean_recall"] <= 1

    values = pretrained.sections(str(tmp_path), *pretrained.open_model(str(tmp_path)))
    values |= {"train": {"batch_size": 8, "total_steps": 2}, "init_from": str(tmp_path)}
    run = assemble(values | {"data": values["data"] | {"source": "shapes"}}, jax.devices()[:1])
    run = with_data(run, 64, pretrained.open_model(str(tmp_path))[1])
    state = init(run)
    before = jax.tree.map(np.asarray, state.params)
    batch = tiny.batch(run.objective, run.batch_size)
    batch = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), batch, run.batch)
    for _ in range(2):
        state, metrics = run.train_step(state, batch)
        assert not metrics["skipped"] and np.isfinite(metrics["loss"])
    moved = jax.tree.map(lambda a, b: bool(np.any(np.asarray(a) != b)), state.params, before)
    assert sum(jax.tree.leaves(moved)) > 0.9 * len(jax.tree.leaves(moved))
