"""transformers' SigLIP tokenizer gives the same ids as ours; a run can start from a folder like
Google's, and can be exported as one."""

import dataclasses
import io
import json
import shutil

import jax
import numpy as np
import pytest
import sentencepiece
from safetensors.numpy import load_file
from support.exports import CLASS, keep, save
from support.libraries import with_open_clip, with_transformers
from support.runs import small

from clipx.errors import ConfigError, DataError, NotProven
from clipx.interop import huggingface, libraries, load, tokenizer, verify
from clipx.ops import photometry
from clipx.serving.evaluation import evaluate_file
from clipx.serving.export import Options, export
from clipx.training import pretrained
from clipx.training.feed import open_data
from clipx.training.initial import init, open_tokenizer
from clipx.training.run import assemble, with_data

CONTEXT = 24
CAPTIONS = [
    "Two men in red shirts, riding horses!",
    "the quick brown fox's 12 friends; it's 3 o'clock",
    "A café in Zürich, with naïve tourists",
    "a dog with a red-and-white ball (in the park)",
] * 20
TEXTS = [
    *CAPTIONS[:4],
    *verify.CAPTIONS,
    *verify.ODD_CAPTIONS,
    *("", " ", "?!", "...", "- a dog", "! ? a dog", '"Dogs," she said', "don't—stop", "<b>dog</b>"),
    *(
        "A  DOG\n\twith\u00a0a\u200bball\u3000",
        "Ｆｕｌｌ ﬁne ½ №",
        "İstanbul ẞ ΣΑΣ",
        "猫 🐱 👨‍👩‍👧",
    ),
    *(
        "a\u2581dog \u2581",
        "a_dog/cat\\fox",
        "$5 + 5% = ~`|^{}[]",
        "a\x00b",
        "dog " * 23,
        "dog " * 99,
    ),
]
SIGLIP = [
    ("image.pool", "attention"),
    ("image.embed_dim", "0"),
    ("image.pre_norm", "False"),
    ("image.activation", "gelu_tanh"),
    ("image.norm_eps", "1e-6"),
    ("text.embed_dim", "32"),
    ("text.causal", "False"),
    ("text.pool", "last"),
    ("text.projection_bias", "True"),
    ("text.activation", "gelu_tanh"),
    ("text.norm_eps", "1e-6"),
    ("text.dropout", "0.0"),
    ("tokenizer.vocab_size", "90"),
    ("tokenizer.cleaning", "siglip"),
    ("tokenizer.marks", "end"),
    ("train.best", ""),
]


def config(*overrides):
    """The config of a run with SigLIP's towers and tokenizer."""
    found = small(*SIGLIP, *overrides)
    return found | {"objective": {"name": "siglip", "augmentation": "none"}}


def pieces(**options):
    """A SentencePiece model with Google's special ids and normalisation."""
    model, marks = io.BytesIO(), {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    usual = {"vocab_size": 90, "hard_vocab_limit": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS), model_writer=model, **usual | marks | options
    )
    return model.getvalue()


def google(folder, model=None, text=(), **settings):
    """Writes the files of a SigLIP model on the Hub, without weights, and returns `folder`."""
    folder.mkdir()
    (folder / tokenizer.PIECES).write_bytes(pieces() if model is None else model)
    words = {"vocab_size": 90, "max_position_embeddings": CONTEXT} | dict(text)
    (folder / huggingface.CONFIG).write_text(
        json.dumps({"model_type": "siglip", "text_config": words})
    )
    given = {"tokenizer_class": "SiglipTokenizer", "do_lower_case": True, "sp_model_kwargs": {}}
    added = {"__type": "AddedToken", "content": "</s>", "lstrip": True, "rstrip": True}
    given |= {"eos_token": "</s>", "pad_token": added | {"normalized": False}}
    given |= {"model_max_length": CONTEXT, "model_input_names": ["input_ids"]}
    (folder / tokenizer.SETTINGS).write_text(json.dumps(given | settings))
    return folder


def test_a_folder_of_transformers_is_read(tmp_path):
    """Neither torch nor transformers is needed."""
    found = pretrained.open_tokenizer(str(google(tmp_path / "a")))
    words = found.config
    assert (words.name, words.vocab_size, words.context) == ("sentencepiece", 90, CONTEXT)
    assert (words.marks, words.cleaning) == ("end", "siglip")
    assert (found(TEXTS)[:, -1] == 1).all()
    (tmp_path / "a" / tokenizer.SETTINGS).unlink()
    assert pretrained.open_tokenizer(str(tmp_path / "a" / "model.safetensors")).config == words
    others = [google(tmp_path / "b", tokenizer_class="T5Tokenizer")]
    others += [google(tmp_path / "c"), google(tmp_path / "d")]
    (tmp_path / "c" / tokenizer.PIECES).unlink()
    (tmp_path / "d" / huggingface.CONFIG).write_text('{"model_type": "clip"}')
    assert [pretrained.open_tokenizer(str(folder)) for folder in others] == [None] * 3


@pytest.mark.parametrize(
    "changed, where, says",
    [
        ({"do_lower_case": False}, "do_lower_case", "True, as Google's"),
        ({"pad_token": "<pad>"}, "pad_token", "'</s>', as Google's"),
        ({"sp_model_kwargs": {"enable_sampling": True}}, "sp_model_kwargs", "{}, as Google's"),
        ({"text": {"vocab_size": 40}}, "vocab_size", "at least"),
        ({"model": b"junk"}, None, "junk|not a SentencePiece model"),
        ({"model": {"eos_id": 3}}, None, "ids are .0, 2, -1, 3., expected .0, 2, -1, 1."),
        ({"model": {"normalization_rule_name": "identity"}}, "spiece.model", "nmt_nfkc"),
        ({"model": {"add_dummy_prefix": False}}, "spiece.model", "nmt_nfkc"),
    ],
)
def test_what_a_folder_says_otherwise_is_refused(changed, where, says, tmp_path):
    if isinstance(changed.get("model"), dict):
        changed = {"model": pieces(**changed["model"])}
    with pytest.raises(DataError if where is None else ConfigError, match=says) as caught:
        pretrained.open_tokenizer(str(google(tmp_path / "a", **changed)))
    if where is not None:
        assert caught.value.where.startswith("config.init_from: ")
        assert caught.value.where.endswith(where)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return save(tmp_path_factory.mktemp("siglip") / "run", config())


def test_an_export_is_such_a_folder(workdir, tmp_path):
    """Without clipx's own tokenizer file the export gives the run's ids, weights and metrics. A run
    with other marks or another cleaning rule is refused, and a missing file is named."""
    export(workdir, Options("huggingface", tmp_path / "a", verify=False))
    text = (tmp_path / "a" / "README.md").read_text()
    assert "rule `siglip` in training. The tokenizer here does the same." in text
    own = pretrained.open_tokenizer(str(tmp_path / "a"))
    (tmp_path / "a" / tokenizer.CLIPX).unlink()
    again = pretrained.open_tokenizer(str(tmp_path / "a"))
    np.testing.assert_array_equal(own(TEXTS), again(TEXTS))
    words = json.loads((tmp_path / "a" / "config.json").read_text())["text_config"]
    assert (words["pad_token_id"], words["bos_token_id"], words["eos_token_id"]) == (1, None, 1)

    def begin(*overrides):
        run = assemble(config(("init_from", str(tmp_path / "a")), *overrides))
        run = with_data(run, 256, open_tokenizer(run, open_data(run).source))
        return run, init(run)

    run, state = begin()
    assert run.tokenizer(TEXTS).tolist() == again(TEXTS).tolist()
    model, _ = pretrained.open_model(str(workdir))
    for name in ("image", "text"):
        found = jax.tree.map(np.asarray, state.params[name])
        jax.tree.map(np.testing.assert_array_equal, found, model.params[name])
    for key, value in (("marks", "both"), ("cleaning", "clip")):
        with pytest.raises(
            ConfigError, match=f"tokenizer.{key}: '(end|siglip)' in the model, '{value}'"
        ):
            begin((f"tokenizer.{key}", value))

    evals = json.loads((workdir / "config.json").read_text())["evals"]
    assert evaluate_file(str(tmp_path / "a"), evals).keys() >= {"zero_shot/top1"}
    (tmp_path / "a" / tokenizer.PIECES).unlink()
    with pytest.raises(ConfigError, match="spiece.model of a SiglipTokenizer in the folder"):
        evaluate_file(str(tmp_path / "a"), evals)


def siglip_tokenizer(path, **options):
    transformers = libraries.require("transformers")
    return transformers.SiglipTokenizer(str(path), **options)


def their_ids(words, texts, context):
    options = {"padding": "max_length", "truncation": True, "max_length": context}
    return np.array(words(list(texts), **options)["input_ids"])


@with_transformers
@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize("rule", ["nmt_nfkc", "nmt_nfkc_cf"])
@pytest.mark.parametrize("context", [CONTEXT, 5])
def test_ids_are_transformers(kind, rule, context, tmp_path):
    """Ids are equal for every text, empty and overlong ones included; the end mark is last. The
    only difference is a mark spelled in a text: clipx encodes its letters, transformers its id."""
    model = pieces(model_type=kind, normalization_rule_name=rule)
    folder = google(tmp_path / "a", model, text={"max_position_embeddings": context})
    ours, theirs = pretrained.open_tokenizer(str(folder)), libraries.require("transformers")
    theirs = theirs.AutoTokenizer.from_pretrained(folder)
    assert type(theirs).__name__ == tokenizer.SIGLIP
    np.testing.assert_array_equal(ours(TEXTS), their_ids(theirs, TEXTS, context))
    assert ours(["a </s> dog"]).tolist() != their_ids(theirs, ["a </s> dog"], context).tolist()
    theirs.save_pretrained(tmp_path / "b")  # the files that transformers itself writes
    shutil.copy(folder / huggingface.CONFIG, tmp_path / "b")
    again = pretrained.open_tokenizer(str(tmp_path / "b"))
    assert again.save()["payload"] == ours.save()["payload"]
    assert dataclasses.replace(again.config, path="") == dataclasses.replace(ours.config, path="")


@with_transformers
def test_export_of_a_run_with_its_own_words(workdir, tmp_path):
    """The proof loads `SiglipTokenizer`, and detects other ids, of padding too."""
    proof = export(workdir, Options("huggingface", tmp_path / "a", verify=True)).proof
    assert proof.odd == () and proof.logits < 1e-5
    processor = libraries.require("transformers").AutoProcessor.from_pretrained(tmp_path / "a")
    assert type(processor.tokenizer).__name__ == tokenizer.SIGLIP
    inputs = processor(text=TEXTS, padding="max_length", truncation=True)
    assert inputs.keys() == {"input_ids"}
    model, ours = pretrained.open_model(str(workdir))
    np.testing.assert_array_equal(ours(TEXTS), np.array(inputs["input_ids"]))
    settings = json.loads((tmp_path / "a" / tokenizer.SETTINGS).read_text())
    padded = json.dumps(settings | {"pad_token": "<pad>"})
    (tmp_path / "a" / tokenizer.SETTINGS).write_text(padded)
    with pytest.raises(NotProven, match="cosine of a caption"):
        verify.prove(huggingface.HuggingFace(), tmp_path / "a", model, ours)
    (tmp_path / "a" / tokenizer.PIECES).write_bytes(pieces(vocab_size=70))
    with pytest.raises(NotProven, match="into other tokens"):
        verify.prove(huggingface.HuggingFace(), tmp_path / "a", model, ours)


@with_transformers
@pytest.mark.parametrize("kind", ["cleaned in another way", "with a mask", "of a CLIP"])
def test_export_of_other_words_without_a_start_mark(kind, tmp_path):
    """Another cleaning rule or another model needs another tokenizer class of transformers. The
    mask's row is left out."""
    made = {
        "cleaned in another way": config(("tokenizer.cleaning", "clip")),
        "with a mask": config(("tokenizer.mask", "true")),
        "of a CLIP": small(CLASS, ("tokenizer.marks", "end"), ("tokenizer.cleaning", "siglip")),
    }
    folder = save(tmp_path / "run", made[kind])
    proof = export(folder, Options("huggingface", tmp_path / "a", verify=True)).proof
    assert proof.logits < 1e-5
    theirs = libraries.require("transformers").AutoTokenizer.from_pretrained(tmp_path / "a")
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.bos_token_id) == (1, 1, None)
    assert (type(theirs).__name__ == tokenizer.SIGLIP) == (kind == "with a mask")
    _, ours = pretrained.open_model(str(folder))
    np.testing.assert_array_equal(ours(CAPTIONS[:4]), their_ids(theirs, CAPTIONS[:4], ours.context))


@with_open_clip
@pytest.mark.parametrize("pool", ["last", "eot"])
def test_export_to_open_clip(pool, tmp_path):
    """open_clip uses transformers' fast tokenizer, which cleans and pads as clipx does. open_clip
    itself first decodes entities and replaces quotation marks; such captions are reported."""
    towers = [("image.embed_dim", "32"), ("text.projection_bias", "False"), ("text.pool", pool)]
    folder = save(tmp_path / "run", config(*towers, ("tokenizer.vocab_size", "80")))
    proof = export(folder, Options("open_clip", tmp_path / "a", verify=True)).proof
    assert proof.odd == verify.ODD_CAPTIONS[1:] and proof.logits < 1e-4
    _, ours = pretrained.open_model(str(folder))
    theirs = libraries.require("open_clip").get_tokenizer(f"local-dir:{tmp_path / 'a'}")
    usual = [t for t in TEXTS if t.isascii() and "&" not in t and "\0" not in t]
    np.testing.assert_array_equal(ours(usual), theirs(usual).numpy())


@with_transformers
def test_transformers_model_is_where_a_run_starts_and_ends(tmp_path):
    """A random `SiglipModel` that transformers saved with its processor gives the same logits, can
    be evaluated, and is exported with the same bits and ids."""
    torch, transformers = libraries.require("torch"), libraries.require("transformers")
    (tmp_path / "spiece.model").write_bytes(pieces())
    words = siglip_tokenizer(
        tmp_path / "spiece.model", model_max_length=CONTEXT, model_input_names=["input_ids"]
    )
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2}
    their_config = transformers.SiglipConfig(
        text_config=sizes | {"vocab_size": 90, "max_position_embeddings": CONTEXT},
        vision_config=sizes | {"image_size": 32, "patch_size": 8},
    )
    torch.manual_seed(0)
    with libraries.quiet():
        theirs = transformers.SiglipModel(their_config).eval()
        with torch.no_grad():
            for x in theirs.parameters():
                x.add_(0.1 * torch.randn(x.shape))
        pictures = transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
        theirs.save_pretrained(tmp_path / "a")
        transformers.SiglipProcessor(pictures, words).save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a" / huggingface.PREPROCESSOR).exists()
    evals = {"retrieval": {"data": {"source": "shapes", "split": "test"}, "limit": 32}}
    found = evaluate_file(str(tmp_path / "a"), evals)
    assert found.keys() >= {"retrieval/mean_recall"}

    values = pretrained.sections(str(tmp_path / "a"), *pretrained.open_model(str(tmp_path / "a")))
    values |= {"train": {"batch_size": 8, "total_steps": 1}, "init_from": str(tmp_path / "a")}
    assert values["data"] == {"resize": "squash", "interpolation": "bicubic"}
    cut = assemble(values | {"data": {"source": "shapes"}})
    with pytest.raises(ConfigError, match="preprocessing: squash, bicubic"):
        init(with_data(cut, 256, open_tokenizer(cut, None)))
    run = assemble(values | {"data": values["data"] | {"source": "shapes"}})
    run = with_data(run, 256, open_tokenizer(run, None))
    state = init(run)
    images = np.stack(verify.pictures(32))
    ids = run.tokenizer(TEXTS)
    np.testing.assert_array_equal(ids, their_ids(words, TEXTS, CONTEXT))
    with libraries.quiet(), torch.no_grad():
        seen = np.array(photometry.normalize(images, (0.5,) * 3, (0.5,) * 3)).transpose(0, 3, 1, 2)
        outputs = theirs(pixel_values=torch.tensor(seen), input_ids=torch.tensor(ids).long())
    model, _ = pretrained.split(run.objective, run.tokenizer, state)
    ours = verify.ours(model, images, ids).logits
    expected = outputs.logits_per_image.numpy()
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(ours, expected, atol=1e-5 * np.abs(expected).max())

    folder = keep(tmp_path / "run", run, state, 0)
    proven = export(folder, Options("huggingface", tmp_path / "b", verify=True)).proof
    assert proven.odd == () and proven.logits < 1e-5
    first, again = (load_file(tmp_path / x / huggingface.WEIGHTS) for x in "ab")
    embeddings = "vision_model.embeddings."
    bias = first[embeddings + "patch_embedding.bias"]  # reading adds it to every position
    positions = embeddings + "position_embedding.weight"
    first[positions] = first[positions] + bias
    first[embeddings + "patch_embedding.bias"] = np.zeros_like(bias)
    assert first.keys() == again.keys()
    assert all(first[k].tobytes() == again[k].tobytes() for k in first)
    (tmp_path / "b" / tokenizer.CLIPX).unlink()
    for folder in "ab":
        loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / folder)
        np.testing.assert_array_equal(their_ids(loaded, TEXTS, CONTEXT), ids)
        np.testing.assert_array_equal(pretrained.open_tokenizer(str(tmp_path / folder))(TEXTS), ids)
    assert load.load(tmp_path / "b").text.eot_id == 1
