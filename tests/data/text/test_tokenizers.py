"""CLIP's ids are OpenAI's, truncation keeps the end mark, and a saved tokenizer stays the same."""

from __future__ import annotations

import dataclasses
import gzip
import json
import pathlib
import pickle

import numpy as np
import pytest

from clipx.config import binding as configs
from clipx.data.text import tokenizers
from clipx.data.text.tokenizers import TokenizerConfig
from clipx.errors import ConfigError, DataError

NO_WHEEL = "instant_clip_tokenizer, which carries CLIP's vocabulary, has no wheel for this Python"

# openai/CLIP's ids between the marks; 49407 in the fourth is the end mark, spelled by the text
OPENAI = {
    "a photo of a dog": [320, 1125, 539, 320, 1929],
    "It's the dog's  HOUSE &amp; café 2021!!": [
        *(585, 568, 518, 1929, 568, 1212, 261, 15304, 273, 271, 273, 272, 748)
    ],
    "hello <|mask|> world": [3306, 27, 347, 8306, 91, 285, 1002],
    "a <|endoftext|> b": [320, 49407, 321],
    "猫 🐱 emoji": [163, 234, 360, 22979, 16327],
    "": [],
}
HARD = [
    "cafe\u0301 x\u0302 हिन्दी مرحبا 日本語 ½ ٣",
    "&amp;amp; &lt;b&gt; “curly” ﬁne ＦＵＬＬ schÃ¶n",
    "<start_of_text> x<end_of_text>y",
    "!!<|endoftext|> a<|endoftext|><|startoftext|>b_<|endoftext|>",
    "it's we're I'LL they've don''t 's's _a_b",
    "👨‍👩‍👧 🇩🇪 İstanbul ẞ",
    "\t a \n b\r\n\u200b\u0000",
    "a" * 300,
]
CAPTIONS = [f"a {size} {shape} Café" for size in ("large", "small") for shape in ("dog", "cat")]


@pytest.fixture(scope="module")
def merges(tmp_path_factory) -> pathlib.Path:
    """OpenAI's merges file, extracted from the library of instant_clip_tokenizer."""
    package = pytest.importorskip("instant_clip_tokenizer", reason=NO_WHEEL)
    for file in pathlib.Path(package.__file__).parent.glob("*.so"):
        _, header, text = file.read_bytes().partition(b"#version: 0.2\n")
        if header:
            lines = text.split(b"\n", 48895)[:48894]
            path = tmp_path_factory.mktemp("bpe") / "bpe_simple_vocab_16e6.txt.gz"
            path.write_bytes(gzip.compress(header + b"\n".join(lines) + b"\nnot used\n", 1))
            return path
    pytest.skip("this build of instant_clip_tokenizer stores its vocabulary in another form")


@pytest.fixture(scope="module")
def routes(merges):
    return [
        tokenizers.build(TokenizerConfig("clip_bpe")),
        tokenizers.build(TokenizerConfig("clip_bpe", path=str(merges))),
    ]


@pytest.fixture(scope="module")
def vocab(tmp_path_factory) -> pathlib.Path:
    """A vocab.txt whose marks have the ids of bert-base-uncased."""
    lines = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    lines += [
        "a",
        "dog",
        "cafe",
        "##s",
        "play",
        "##ing",
        "!",
        ",",
        "[",
        "]",
        "mask",
        "猫",
        "\u2028",
    ]
    path = tmp_path_factory.mktemp("bert") / "vocab.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def word_pieces(vocab):
    return tokenizers.build(TokenizerConfig("wordpiece", path=str(vocab), context=8))


@pytest.fixture(scope="module")
def pieces():
    return tokenizers.build(TokenizerConfig("sentencepiece", vocab_size=4096, context=24), CAPTIONS)


def test_ids_are_openais(routes):
    for tokenizer in routes:
        for text, ids in OPENAI.items():
            assert tokenizer.body(text) == ids, text
        assert tokenizer(["a photo of a dog"])[0, :8].tolist() == [
            *(49406, 320, 1125, 539, 320, 1929, 49407, 0)
        ]


@pytest.mark.parametrize("text", HARD)
def test_both_routes_agree(routes, text):
    bundled, merged = routes
    assert bundled.body(text) == merged.body(text)
    ids = bundled([text])[0]
    assert bundled.decode(ids) == merged.decode(ids)


def test_a_literal_mark_counts_only_where_a_token_starts(routes):
    body = routes[0].body("!!<|endoftext|> a<|endoftext|><|startoftext|>b")
    assert [i for i in body if i > 49405] == [49407, 49406]


def test_with_a_mask_the_marks_shift_and_words_do_not(merges):
    for path in ("", str(merges)):
        config = TokenizerConfig("clip_bpe", mask=True, path=path)
        assert (config.vocab_size, config.mask_id, config.sot_id, config.eot_id) == (
            *(49409, 49406, 49407, 49408),
        )
        tokenizer = tokenizers.build(config)
        for text, ids in OPENAI.items():
            assert tokenizer.body(text) == [i + (i == 49407) for i in ids], text
        assert tokenizer.body("<|startoftext|><|endoftext|>") == [49407, 49408]
        assert 49406 not in tokenizer(HARD)
        ids = tokenizer(["a photo of a dog"])[0]
        assert ids[:8].tolist() == [49407, 320, 1125, 539, 320, 1929, 49408, 0]
        ids[2] = config.mask_id
        assert tokenizer.decode(ids) == "a of a dog"


def test_a_mask_takes_the_last_id_of_a_sentencepiece_model(pieces, tmp_path):
    config = TokenizerConfig("sentencepiece", vocab_size=26, context=32, mask=True, model="bpe")
    tokenizer = tokenizers.build(config, CAPTIONS)
    assert config.mask_id == 25
    assert tokenizer._processor.get_piece_size() == 25
    assert tokenizer(CAPTIONS).max() == 24
    ids = tokenizer(["small dog"])[0]
    masked = np.insert(ids, 1, config.mask_id)
    assert tokenizer.decode(masked) == tokenizer.decode(ids) == "small dog"
    path = tmp_path / "pieces.model"
    path.write_bytes(pieces._model)
    count = pieces._processor.get_piece_size()
    tokenizers.build(TokenizerConfig("sentencepiece", vocab_size=count, path=str(path)))
    with pytest.raises(ConfigError, match=f"{count} pieces in (.|\\n)*at least {count + 1}"):
        tokenizers.build(
            TokenizerConfig("sentencepiece", vocab_size=count, path=str(path), mask=True)
        )


@pytest.fixture(scope="module")
def ended():
    """A tokenizer without a start mark, as SigLIP's, and with a mask."""
    config = TokenizerConfig(
        "sentencepiece", vocab_size=60, context=16, mask=True, cleaning="siglip", marks="end"
    )
    return tokenizers.build(config, CAPTIONS)


def test_without_a_start_mark_the_end_mark_pads(ended):
    pieces = [ended._processor.id_to_piece(i) for i in range(3)]
    assert pieces == ["<pad>", "</s>", "<unk>"]
    body = ended.body("small dog")
    assert min(body) > 2 and len(body) < 15
    texts = ["small dog", "SMALL, dog!", "", "?!", "a large dog " * 9, "dog </s> <pad>", "☃"]
    ids = ended(texts)
    assert ids[0].tolist() == ids[1].tolist() == body + [1] * (16 - len(body))
    assert (ids[2:4] == 1).all()
    assert ids[4].tolist() == [*ended.body("a large dog a large dog"), 1][:15] + [1]
    spelled = ended.body("dog </s> <pad>")  # ordinary text, not marks
    assert spelled == ended.body("dog s pad") and not {0, 1} & set(spelled)
    assert 2 in ids[6] and ids.max() < ended.config.mask_id
    assert ended.decode(ids[1]) == "small dog" and ended.decode(ids[2]) == ""
    assert ended.decode(np.insert(ids[0], 0, ended.config.mask_id)) == "small dog"


def test_the_error_for_a_file_with_other_marks_names_the_config_key(ended, pieces, tmp_path):
    path = tmp_path / "spiece.model"
    for tokenizer, own, other in ((ended, "end", "both"), (pieces, "both", "end")):
        path.write_bytes(tokenizer._model)
        config = TokenizerConfig("sentencepiece", path=str(path), marks=own)
        assert tokenizers.build(config).body("a dog") == tokenizer.body("a dog")
        with pytest.raises(DataError, match=f"expected .*; set config.tokenizer.marks={own}"):
            tokenizers.build(dataclasses.replace(config, marks=other))


def test_word_pieces_are_berts(word_pieces):
    ids = {
        "Dogs, playing!": [105, 107, 111, 108, 109, 110],
        "a CAFÉ dog": [104, 106, 105],
        "猫dog": [115, 105],  # a Chinese character is a word
        "zebra ☃": [100, 100],
        "[MASK]": [112, 114, 113],  # ordinary text, not a mark
        "": [],
    }
    for text, body in ids.items():
        assert word_pieces.body(text) == body, text
    assert word_pieces(["a dog"]).tolist() == [[101, 104, 105, 102, 0, 0, 0, 0]]
    assert word_pieces.decode([101, 105, 107, 103, 111, 102, 0]) == "dogs,"


def test_truncation_keeps_the_end_mark_of_word_pieces(word_pieces):
    assert word_pieces(["a dog " * 10]).tolist() == [[101, 104, 105, 104, 105, 104, 105, 102]]


def test_truncation_keeps_the_end_mark(pieces):
    pytest.importorskip("instant_clip_tokenizer", reason=NO_WHEEL)
    clip = tokenizers.build(TokenizerConfig("clip_bpe", context=5))
    assert clip(["a b c d e f", "a"]).tolist() == [
        [49406, 320, 321, 322, 49407],
        [49406, 320, 49407, 0, 0],
    ]
    assert clip([]).shape == (0, 5)
    ids = pieces(["a large dog " * 10])[0]
    assert (ids[0], ids[-1]) == (pieces.sot_id, pieces.eot_id)
    assert ids.dtype == np.int32


def test_decode_ends_at_the_end_mark(pieces):
    pytest.importorskip("instant_clip_tokenizer", reason=NO_WHEEL)
    clip = tokenizers.build(TokenizerConfig("clip_bpe", context=12))
    assert clip.decode(clip(["Wow! A  Dog!"])[0]) == "wow ! a dog !"
    assert pieces.decode(pieces(["A  large\nDOG"])[0]) == "a large dog"


def test_a_small_corpus_is_enough_and_training_is_deterministic(pieces):
    again = tokenizers.build(pieces.config, iter(CAPTIONS))
    assert again.save() == pieces.save()
    ids = pieces(CAPTIONS)
    assert len(np.unique(ids, axis=0)) == len(CAPTIONS)
    assert ids.max() < 4096
    assert (pieces(["ünknown ☃"]) == 1).any()  # a new character gives `unk_id`, not an error


@pytest.mark.parametrize("model", ["unigram", "bpe"])
def test_each_kind_of_model_decodes_what_it_encoded(model):
    config = TokenizerConfig("sentencepiece", vocab_size=60, context=32, model=model)
    tokenizer = tokenizers.build(config, CAPTIONS)
    assert tokenizer.decode(tokenizer(["small cat"])[0]) == "small cat"


def test_a_saved_or_pickled_tokenizer_is_the_same(routes, pieces, ended, word_pieces):
    masked = tokenizers.build(TokenizerConfig("clip_bpe", mask=True, cleaning="ascii"))
    for tokenizer in (*routes, masked, pieces, ended, word_pieces):
        saved = tokenizers.load(json.loads(json.dumps(tokenizer.save())))
        for other in (saved, pickle.loads(pickle.dumps(tokenizer))):
            assert other.config == tokenizer.config
            assert other(CAPTIONS).tolist() == tokenizer(CAPTIONS).tolist()


def test_tokenizers_saved_before_the_keys_of_masks_and_marks_still_load(pieces):
    new_keys = ("mask", "cleaning", "marks")
    saved = pieces.save()
    saved["config"] = {k: v for k, v in saved["config"].items() if k not in new_keys}
    assert tokenizers.load(saved)(CAPTIONS).tolist() == pieces(CAPTIONS).tolist()


def test_the_config_selects_how_captions_are_cleaned(vocab):
    text = "a Café's dog &amp; –"
    texts = {
        rule: tokenizers.build(
            TokenizerConfig(
                "sentencepiece", vocab_size=300, context=64, cleaning=rule, model="bpe"
            ),
            [*CAPTIONS, "a café's dog & &amp; –"],
        )
        for rule in ("clip", "ascii", "clip_lite", "siglip", "none")
    }
    assert {rule: t.decode(t([text])[0]) for rule, t in texts.items()} == {
        "clip": "a café's dog & –",
        "ascii": "a caf's dog &",
        "clip_lite": "a cafes dog &amp –",
        "siglip": "a cafés dog amp –",
        "none": "a café's dog &amp; –",
    }
    config = TokenizerConfig("wordpiece", path=str(vocab), cleaning="clip_lite")
    assert tokenizers.build(config).body("(Dog's) café, play-ing!") == [105, 107, 106, 108, 100]


def test_a_model_file_gives_the_ids_of_the_run_that_trained_it(pieces, tmp_path):
    path = tmp_path / "pieces.model"
    path.write_bytes(pieces._model)
    config = TokenizerConfig("sentencepiece", vocab_size=4096, context=24, path=str(path))
    assert (tokenizers.build(config)(CAPTIONS) == pieces(CAPTIONS)).all()


def test_a_small_merges_file(tmp_path):
    path = tmp_path / "merges.txt"
    path.write_text("#version: 0.2\nd o\ndo g</w>\n")
    config = TokenizerConfig("clip_bpe", vocab_size=516, context=6, path=str(path))
    assert (config.sot_id, config.eot_id) == (514, 515)
    assert tokenizers.build(config)(["dog do"]).tolist() == [[514, 513, 67, 256 + 78, 515, 0]]


def test_ids_are_known_without_opening_a_file():
    clip = TokenizerConfig("clip_bpe", path="not there")
    assert (clip.pad_id, clip.sot_id, clip.eot_id, clip.vocab_size) == (0, 49406, 49407, 49408)
    pieces = TokenizerConfig("sentencepiece", vocab_size=4096)
    assert (pieces.pad_id, pieces.sot_id, pieces.eot_id) == (0, 2, 3)
    ended = TokenizerConfig("sentencepiece", vocab_size=4096, marks="end")
    assert (ended.pad_id, ended.sot_id, ended.eot_id, ended.unk_id) == (1, None, 1, 2)
    assert ended.special_ids == (0, 2, 1)
    words = TokenizerConfig("wordpiece", path="not there")
    assert (words.vocab_size, words.sot_id, words.eot_id, words.mask_id) == (30522, 101, 102, 103)
    assert clip.mask_id is pieces.mask_id is None
    assert clip.special_ids == (0, 49406, 49407)
    assert pieces.special_ids == (0, 1, 2, 3)
    assert words.special_ids == (0, 100, 101, 102, 103)
    masked = TokenizerConfig("clip_bpe", mask=True)
    assert masked.special_ids == (0, 49407, 49408, 49406)
    assert dataclasses.replace(pieces, mask=True).special_ids == (0, 1, 2, 3, 4095)
    again = configs.bind(TokenizerConfig, configs.dump(masked), where="config.tokenizer")
    assert again == masked


@pytest.mark.parametrize(
    ("values", "where"),
    [
        ({"name": "clip_bpe", "vocab_size": 32000}, "config.tokenizer.vocab_size"),
        ({"name": "clip_bpe", "context": 2}, "config.tokenizer.context"),
        ({"name": "sentencepiece", "vocab_size": 3}, "config.tokenizer.vocab_size"),
        ({"name": "clip_bpe", "vocab_size": 49408, "mask": True}, "config.tokenizer.vocab_size"),
        ({"name": "wordpiece"}, "config.tokenizer.path"),
        ({"name": "wordpiece", "path": "x", "marks": "end"}, "config.tokenizer.marks"),
        ({"name": "clip_bpe", "marks": "end"}, "config.tokenizer.marks"),
        ({"name": "wordpiece", "path": "x", "vocab_size": 103}, "config.tokenizer.vocab_size"),
    ],
)
def test_impossible_configs(values, where):
    with pytest.raises(ConfigError) as error:
        configs.bind(TokenizerConfig, values, where="config.tokenizer")
    assert error.value.where == where


def test_bad_files_are_named(tmp_path):
    missing = TokenizerConfig("clip_bpe", path=str(tmp_path / "none.txt"))
    with pytest.raises(ConfigError, match="none.txt.*No such file"):
        tokenizers.build(missing)
    junk = tmp_path / "junk"
    junk.write_bytes(b"\x1f\x8bjunk")
    with pytest.raises(DataError, match="junk: not a merges file"):
        tokenizers.build(TokenizerConfig("clip_bpe", path=str(junk)))
    with pytest.raises(DataError, match="junk: not a SentencePiece model"):
        tokenizers.build(TokenizerConfig("sentencepiece", path=str(junk)))
    short = tmp_path / "short.txt"
    short.write_text("#version: 0.2\nd o\n")
    with pytest.raises(ConfigError, match="49408, with 1 merges in .*short.txt"):
        tokenizers.build(TokenizerConfig("clip_bpe", path=str(short)))


def test_a_vocabulary_of_word_pieces_with_other_marks_or_too_many_is_refused(vocab, tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("[PAD]\n[UNK]\na\n")
    listed = r"vocab\.txt, whose ids of the marks are \[PAD\] 0, \[UNK\] 1, \[CLS\] missing"
    with pytest.raises(ConfigError, match=listed) as error:
        tokenizers.build(TokenizerConfig("wordpiece", path=str(path)))
    assert error.value.where == "config.tokenizer.path"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"vocab\.txt: not a vocabulary of word pieces"):
        tokenizers.build(TokenizerConfig("wordpiece", path=str(path)))
    with pytest.raises(ConfigError, match=r"110, with 117 pieces in (.|\n)*at least 117"):
        tokenizers.build(TokenizerConfig("wordpiece", path=str(vocab), vocab_size=110))
    with pytest.raises(ConfigError, match=r"BERT's vocab\.txt that can be read"):
        tokenizers.build(TokenizerConfig("wordpiece", path=str(tmp_path / "none")))


def test_a_model_with_other_marks_or_too_many_pieces_is_refused(pieces, tmp_path):
    import sentencepiece

    path = tmp_path / "other.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CAPTIONS), model_writer=file, vocab_size=40, minloglevel=2,
            hard_vocab_limit=False,
        )  # fmt: skip
    with pytest.raises(DataError, match=r"eos ids are \(-1, 0, 1, 2\), expected \(0, 1, 2, 3\)"):
        tokenizers.build(TokenizerConfig("sentencepiece", path=str(path)))
    path.write_bytes(pieces._model)
    with pytest.raises(ConfigError, match="10, with .* pieces"):
        tokenizers.build(TokenizerConfig("sentencepiece", vocab_size=10, path=str(path)))


def test_captions_that_give_no_vocabulary():
    config = TokenizerConfig("sentencepiece", vocab_size=10)
    with pytest.raises(DataError, match="there is no text in them"):
        tokenizers.build(config, ["", " \n"])
    with pytest.raises(ConfigError, match="smaller than required_chars"):
        tokenizers.build(config, CAPTIONS)
    with pytest.raises(ConfigError, match="no captions to train on"):
        tokenizers.build(config)
