"""The tokenizer files of a foreign folder are used, or named: their ids are never guessed."""

import io
import json
import re

import numpy as np
import pytest
import sentencepiece
from safetensors.numpy import load_file, save_file
from support import encoders, foreign_tokenizers
from support.libraries import with_transformers
from support.towers import BOTH, TEXT, VIT, model, words_of

from clipx.data.text import tokenizers, vocabulary
from clipx.data.text.tokenizers import TokenizerConfig
from clipx.errors import ConfigError
from clipx.interop import foreign_tokenizer, huggingface, libraries, open_clip, tokenizer
from clipx.models.text import TextTransformer
from clipx.models.vit import ViT
from clipx.serving.evaluation import open_foreign
from clipx.training import pretrained

LETTERS = "abcdefghijklmnopqrstuvwxyz"
MERGES = [f"{a} {b}" for a in LETTERS[:9] for b in LETTERS[:9]]
SIZE = 514 + len(MERGES)
TEXTS = ["a bad cab", "DEAF hedge!", "x"]


@pytest.fixture(scope="module")
def own():
    """A CLIP model whose vocabulary has merges of its own."""
    words = words_of(tokenizers.TokenizerConfig("clip_bpe", SIZE, 16, "merges.txt"), plain=False)
    text = TextTransformer(**TEXT | {"vocab_size": SIZE, "eot_id": SIZE - 1}, **BOTH)
    return model(ViT(**VIT, **BOTH), text, words)


@pytest.fixture
def folder(own, tmp_path):
    """A folder of transformers' CLIP, with `vocab.json` and `merges.txt`."""
    huggingface.HuggingFace().write(own, tmp_path, str(tmp_path))
    ids = vocabulary.byte_pairs("\n".join(MERGES)).get_vocab()
    for name, text in tokenizer.clip_files("\n".join(MERGES), ids, 16).items():
        (tmp_path / name).write_text(text)
    return tmp_path


def expected(tmp_path):
    (tmp_path / "elsewhere.txt").write_text("#version\n" + "\n".join(MERGES) + "\n")
    config = tokenizers.TokenizerConfig("clip_bpe", SIZE, 16, str(tmp_path / "elsewhere.txt"))
    return tokenizers.build(config)(TEXTS)


def fast(folder, merges=MERGES, **changed):
    """Writes `tokenizer.json` in place of the other two files."""
    ids = json.loads((folder / "vocab.json").read_text())
    bpe = {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": ids, "merges": merges}
    (folder / "tokenizer.json").write_text(json.dumps({"model": bpe | changed}))
    (folder / "vocab.json").unlink()
    (folder / "merges.txt").unlink()


def problem(folder):
    """What is said of a tokenizer that cannot be read."""
    given, none = pretrained.open_model(str(folder))
    assert none is None
    (line,) = [x for x in given.differences if x.startswith("tokenizer: ")]
    with pytest.raises(ConfigError) as caught:
        pretrained.sections(str(folder), given, None)
    assert line.partition(": ")[2] in str(caught.value)
    return line


def test_merges_of_its_own_are_used(folder):
    given, found = pretrained.open_model(str(folder))
    np.testing.assert_array_equal(found(TEXTS), expected(folder))
    assert (given.words.eot_id, given.words.plain) == (SIZE - 1, False)
    run, _ = open_foreign(str(folder), {})  # as clipx.evaluate opens it
    np.testing.assert_array_equal(run.tokenizer(TEXTS), expected(folder))


@pytest.mark.parametrize("pairs", [False, True])
def test_a_tokenizer_in_one_file(pairs, folder):
    """Its advice, to write the merges down, works when it is obeyed."""
    fast(folder, [m.split() for m in MERGES] if pairs else MERGES)
    line = problem(folder)
    assert f"write them to {folder / 'merges.txt'}, one in a line, below a line '#version" in line
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    _, found = pretrained.open_model(str(folder))
    np.testing.assert_array_equal(found(TEXTS), expected(folder))


def test_tokenizers_that_clipx_does_not_have_are_named(folder):
    def settings(**values):
        whole = json.loads((folder / tokenizer.SETTINGS).read_text())
        (folder / tokenizer.SETTINGS).write_text(json.dumps(whole | values))

    settings(tokenizer_class="BertTokenizer")
    assert "names a BertTokenizer" in problem(folder)
    settings(tokenizer_class="CLIPTokenizer", model_max_length=8)
    assert "cuts texts to 8 tokens, its text tower has 16" in problem(folder)
    settings(model_max_length=10**30, do_lower_case=False)
    assert "keeps capital letters" in problem(folder)
    settings(do_lower_case=True)
    (folder / "added_tokens.json").write_text(json.dumps({"<new>": SIZE}))
    assert f"has {SIZE + 1} ids for {len(MERGES)} merges" in problem(folder)
    (folder / "added_tokens.json").unlink()
    ids = json.loads((folder / "vocab.json").read_text())
    ids["a"], ids["b"] = ids["b"], ids["a"]
    (folder / "vocab.json").write_text(json.dumps(ids))
    assert "not CLIP's ids of these merges" in problem(folder)
    fast(folder, type="WordPiece")
    assert "no byte pairs like CLIP's" in problem(folder)
    (folder / "tokenizer.json").write_text("{}")
    assert "no byte pairs like CLIP's" in problem(folder)


def test_a_run_with_another_tokenizer_lists_it(folder):
    given, own = pretrained.open_model(str(folder))
    path = folder / "other.txt"
    path.write_text("#version\n" + "\n".join(reversed(MERGES)) + "\n")
    config = tokenizers.TokenizerConfig("clip_bpe", SIZE, 16, str(path))
    (line,) = pretrained._token_faults(given, config, tokenizers.build(config), own)
    assert line.startswith("tokenizer: ") and f"config.tokenizer.path={folder}/merges.txt" in line


def test_what_differs_is_accepted_as_the_message_advises(folder):
    """Of clipx.evaluate: pictures of another size, a setting of no known name, no scale."""
    arrays = load_file(folder / huggingface.WEIGHTS)
    del arrays["logit_scale"]
    save_file(arrays, folder / huggingface.WEIGHTS)
    for name, values in {
        huggingface.CONFIG: {"novel": 1},
        huggingface.PREPROCESSOR: {"size": {"shortest_edge": 48}, "resample": 1},
    }.items():
        whole = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(whole | values))
    with pytest.raises(ConfigError) as caught:
        open_foreign(str(folder), {})
    (flags,) = re.findall(r"--init_ignore=(\S+)", caught.value.fix)
    names = ["preprocessing.size", "preprocessing.resample", "settings.novel", "logit_scale"]
    assert flags.split(",") == names
    run, state = open_foreign(str(folder), {}, flags.split(","))
    np.testing.assert_array_equal(run.tokenizer(TEXTS), expected(folder))
    assert np.isfinite(state.params["logit_scale"])


def test_a_folder_without_a_tokenizer_has_clips(folder):
    for name in ("vocab.json", "merges.txt", tokenizer.SETTINGS):
        (folder / name).unlink()
    given, found = pretrained.open_model(str(folder))
    assert found is None and not given.differences  # the vocabulary has another size
    with pytest.raises(ConfigError, match="a tokenizer that clipx does not have"):
        pretrained.sections(str(folder), given, None)


def pieces(**options):
    """A SentencePiece model with Google's special ids."""
    file, marks = io.BytesIO(), {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    usual = {"vocab_size": 60, "hard_vocab_limit": False, "minloglevel": 2}
    captions = iter(["two men ride a horse", "the quick brown fox", "a dog in a park"] * 30)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=captions, model_writer=file, **usual | marks | options
    )
    return file.getvalue()


SIGLIP_TEXT = {
    "hf_tokenizer_name": "timm/ViT-B-16-SigLIP",
    "tokenizer_kwargs": {"clean": "canonicalize"},
    "pool_type": "last",
    "no_causal_mask": True,
    "vocab_size": 60,
    "context_length": 16,
}


def siglip(folder, **text):
    """open_clip's folder of a SigLIP as on the Hub, with open_clip's own image tower."""
    words = words_of(tokenizers.TokenizerConfig("clip_bpe", 60, 16, "-"), plain=True)
    fields = TEXT | {"vocab_size": 60, "eot_id": 59, "causal": False, "pool": "last"}
    written = model(ViT(**VIT, **BOTH), TextTransformer(**fields, **BOTH), words, bias=-9.0)
    open_clip.OpenClip().write(written, folder, str(folder))
    file = folder / open_clip.CONFIG
    config = json.loads(file.read_text())
    section = config["model_cfg"]["text_cfg"]
    del section["eos_id"], section["pad_id"]
    section |= SIGLIP_TEXT | text
    file.write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / tokenizer.SETTINGS).write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}))
    return folder


def test_siglip_needs_its_pieces_alone(tmp_path):
    """The message asks for `spiece.model`, and that file is enough."""
    folder = siglip(tmp_path)
    line = problem(folder)
    assert f"no spiece.model of a SiglipTokenizer in the folder {folder}" in line
    assert f"nor can its other tokenizer be read: {folder / foreign_tokenizer.FAST}" in line
    (folder / tokenizer.PIECES).write_bytes(pieces())
    given, found = pretrained.open_model(str(folder))
    assert (given.text.eot_id, given.words.eot_id, given.words.kind) == (1, 1, "sentencepiece")
    assert (
        found.config.cleaning == "siglip"
        and found(["a Dog!"]).tolist() == found(["a dog"]).tolist()
    )
    run, _ = open_foreign(str(folder), {})
    np.testing.assert_array_equal(run.tokenizer(TEXTS), found(TEXTS))
    short = {"tokenizer_class": "T5Tokenizer", "model_max_length": 8}
    (folder / tokenizer.SETTINGS).write_text(json.dumps(short))
    with pytest.raises(ConfigError, match="8, with a text tower of 16 tokens"):
        pretrained.open_model(str(folder))
    (folder / tokenizer.PIECES).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ConfigError, match=r"spiece\.model, a pointer of Git LFS"):
        pretrained.open_model(str(folder))


@pytest.mark.parametrize(
    "text, says",
    [
        ({"hf_tokenizer_name": "timm/ViT-B-16-SigLIP2-256"}, "'timm/ViT-B-16-SigLIP2-256' of"),
        ({"hf_tokenizer_name": "xlm-roberta-base", "tokenizer_kwargs": None}, "'xlm-roberta-base'"),
        ({"tokenizer_kwargs": {"clean": "lower"}}, "'timm/ViT-B-16-SigLIP' of"),
        ({"tokenizer_kwargs": {"clean": "canonicalize", "strip_sep_token": True}}, "'timm/ViT-B"),
        ({"hf_tokenizer_name": None}, "cleans captions by 'canonicalize'"),
    ],
)
def test_tokenizers_of_open_clip_that_clipx_does_not_have(text, says, tmp_path):
    """No file beside them is advised: none would be enough."""
    folder = siglip(tmp_path, **text)
    (folder / tokenizer.PIECES).write_bytes(b"")
    assert says in problem(folder)


def test_gemmas_tokenizer_is_named(tmp_path):
    """SigLIP 2, as transformers keeps it: pieces of SigLIP would not help."""
    config = {"model_type": "siglip", "text_config": {"vocab_size": 60}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / tokenizer.SETTINGS).write_text(json.dumps({"tokenizer_class": "GemmaTokenizer"}))
    found = huggingface.HuggingFace().tokenizer_fields(tmp_path, "config.init_from")
    assert isinstance(found, str) and "names a GemmaTokenizer" in found and "spiece" not in found


@with_transformers
def test_siglip2s_own_class_of_transformers(tmp_path):
    """Its ids of odd texts, lower case; without that in the file the folder is refused, and what
    the message advises makes it readable."""
    foreign_tokenizers.siglip2().save_pretrained(tmp_path)
    auto = libraries.require("transformers").AutoTokenizer
    found = foreign_tokenizer.siglip(tmp_path, 700, 24, "-")
    assert isinstance(found, dict), found
    ours = tokenizers.build(TokenizerConfig(**found))
    judge = auto.from_pretrained(tmp_path)
    said = judge(encoders.ODD, padding="max_length", truncation=True, max_length=24)["input_ids"]
    np.testing.assert_array_equal(ours(encoders.ODD), said)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    content["normalizer"] = content["normalizer"]["normalizers"][1]
    file.write_text(json.dumps(content))
    refused = foreign_tokenizer.siglip(tmp_path, 700, 24, "-")
    assert "whose lower case tokenizer.json does not have" in refused
    auto.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert foreign_tokenizer.siglip(tmp_path, 700, 24, "-") == found
    settings = tmp_path / "tokenizer_config.json"
    values = json.loads(settings.read_text())
    settings.write_text(json.dumps({k: x for k, x in values.items() if k != "padding_side"}))
    assert "pads on the left" in foreign_tokenizer.siglip(tmp_path, 700, 24, "-")
