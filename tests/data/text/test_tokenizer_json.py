"""The kind `huggingface`: the ids of a model's own tokenizer.json, from config and workdir."""

import concurrent.futures
import dataclasses
import json
import pickle

import numpy as np
import pytest
import tokenizers as library
from support import encoders

from clipx.config import binding as configs
from clipx.data.text import tokenizers
from clipx.data.text.tokenizers import TokenizerConfig
from clipx.errors import ConfigError, DataError
from clipx.ops import tokenizer_json

CONTEXT = 12


def config(folder, **changed) -> TokenizerConfig:
    text = tokenizer_json.read(str(folder))
    values = {
        "name": "huggingface",
        "path": str(folder),
        "vocab_size": tokenizer_json.size(text, str(folder)),
        "context": CONTEXT,
        "cleaning": "raw",
        "ids": tokenizer_json.ids(text, str(folder)),
    }
    return configs.bind(TokenizerConfig, values | changed, where="config.tokenizer")


@pytest.fixture(params=encoders.TOKENIZERS)
def kind(request, tmp_path):
    encoders.write_tokenizer(tmp_path, request.param)
    return request.param


def test_ids_are_the_librarys(kind, tmp_path):
    """Not those of the truncation and padding inside the file, which are others."""
    tokenizer = tokenizers.build(config(tmp_path))
    other = library.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    other.enable_truncation(CONTEXT)
    pad = tokenizer.pad_id
    other.enable_padding(length=CONTEXT, pad_id=pad, pad_token=other.id_to_token(pad))
    expected = [encoding.ids for encoding in other.encode_batch(encoders.ODD)]
    assert len(encoders.ODD) == 40
    assert tokenizer(encoders.ODD).tolist() == expected
    assert tokenizer(["dog " * 50])[0, -1] == tokenizer.eot_id


def test_marks_follow_from_the_config_alone(kind, tmp_path):
    found = config(tmp_path)
    plain = configs.dump(found) | {"path": "not there"}
    again = configs.bind(TokenizerConfig, json.loads(json.dumps(plain)), where="config.tokenizer")
    core = library.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    names = "[PAD] [UNK] [CLS] [SEP] [MASK]" if kind == "bert" else "<pad> <unk> <s> </s> <mask>"
    names = names.replace("<unk>", "[UNK]") if kind == "mpnet" else names
    ids = [again.pad_id, again.unk_id, again.sot_id, again.eot_id, again.mask_id]
    assert ids == [core.token_to_id(name) for name in names.split()] == list(again.special_ids)
    assert again.size == core.get_vocab_size()
    assert hash(again) == hash(dataclasses.replace(again))


def test_a_saved_or_pickled_tokenizer_needs_no_file(kind, tmp_path):
    tokenizer = tokenizers.build(config(tmp_path))
    expected = tokenizer(encoders.ODD)
    (tmp_path / "tokenizer.json").unlink()
    saved = tokenizers.load(json.loads(json.dumps(tokenizer.save())))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        results = list(pool.map(saved, [encoders.ODD] * 8))
    for ids in (*results, pickle.loads(pickle.dumps(tokenizer))(encoders.ODD)):
        np.testing.assert_array_equal(ids, expected)
    text = tokenizer(["a dog"])[0]
    assert saved.decode(text) == tokenizer.decode(text) == "a dog"


def test_texts_are_cleaned_before(tmp_path):
    encoders.write_tokenizer(tmp_path, "roberta")
    raw, strip, clip = (
        tokenizers.build(config(tmp_path, cleaning=rule)) for rule in ("raw", "strip", "clip")
    )
    assert raw.body(" a  dog ") != strip.body(" a  dog ") == raw.body("a  dog")
    assert clip.body(" a  dog &amp;") == raw.body("a dog &")
    assert raw.body("half \ud83d pair") == raw.body("half ? pair")


def test_a_section_without_ids_shows_them(tmp_path):
    encoders.write_tokenizer(tmp_path, "roberta")
    with pytest.raises(ConfigError) as caught:
        TokenizerConfig("huggingface", path=str(tmp_path))
    assert caught.value.where == "config.tokenizer.ids"
    for flag in ("ids.pad=1", "ids.start=0", "ids.end=2", "ids.mask=4", "vocab_size=400"):
        assert f"--config.tokenizer.{flag}" in caught.value.fix


def test_what_does_not_fit_is_named(tmp_path):
    encoders.write_tokenizer(tmp_path, "bert")
    good = config(tmp_path)
    with pytest.raises(ConfigError, match="at least") as caught:
        tokenizers.build(dataclasses.replace(good, vocab_size=20))
    assert caught.value.where == "config.tokenizer.vocab_size"
    wrong = dataclasses.replace(good, ids=dataclasses.replace(good.ids, end=7))
    with pytest.raises(ConfigError) as caught:
        tokenizers.build(wrong)
    assert (caught.value.where, caught.value.fix) == (
        "config.tokenizer.ids.end",
        "config.tokenizer.ids.end=3",
    )
    with pytest.raises(ConfigError, match="a tokenizer that has a mask"):
        unmasked = dataclasses.replace(good.ids, mask=None)
        dataclasses.replace(good, ids=unmasked, mask=True)
    with pytest.raises(ConfigError, match="the kind tells them"):
        TokenizerConfig("wordpiece", path="x", ids=good.ids)
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(DataError, match="not a tokenizer.json"):
        tokenizers.build(good)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="save_pretrained"):
        tokenizers.build(good)


def test_a_file_that_puts_no_end_mark_is_refused(tmp_path):
    core = encoders.bert()
    core.post_processor = library.processors.ByteLevel()
    (tmp_path / "tokenizer.json").write_text(core.to_str())
    with pytest.raises(ConfigError, match="one mark behind a text"):
        config(tmp_path)
