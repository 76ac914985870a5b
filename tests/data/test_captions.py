"""Captions are read as they were meant, or the row or the set is refused."""

import csv
import io
import json
import tarfile

import pytest

from clipx.data.captions import Reader, Texts, decode
from clipx.data.evaluation import EvaluationSet
from clipx.data.sources.files import Files
from clipx.data.sources.mixture import Mixture
from clipx.data.sources.table import Table
from clipx.data.sources.webdataset import WebDataset
from clipx.errors import BadSample, DataError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPX_CACHE", str(tmp_path / "cache"))


def opened(tmp_path, rows: list[dict[str, object]], **settings) -> WebDataset:
    """A source of pictures, each with these members by ending; what is not bytes becomes JSON."""
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for i, members in enumerate(rows):
            for ending, data in {"jpg": b"picture", **members}.items():
                data = data.encode() if isinstance(data, str) else data
                data = data if isinstance(data, bytes) else json.dumps(data).encode()
                info = tarfile.TarInfo(f"{i:03}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return WebDataset(str(tmp_path / "x.tar"), **settings)


def guessed(source) -> dict[str, object]:
    return {guess.field: guess.value for guess in source.guesses()}


@pytest.mark.parametrize("words", ["a dog", "ein Käse — 12 €", "一只狗", "a 🐕"])
@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be-mark", "utf-32", "plain 16"]
)
def test_text_with_and_without_a_mark(words, encoding):
    if encoding == "utf-16-be-mark":
        data = b"\xfe\xff" + words.encode("utf-16-be")
    elif encoding == "plain 16":
        words = "a dog"
        data = words.encode("utf-16-le")
        assert decode(words.encode("utf-16-be")) == words
    else:
        data = words.encode(encoding)
    assert decode(data) == words


@pytest.mark.parametrize(
    "data", [b"caf\xe9", b"\xff\xfea", b"a d\0og", "一只狗\0a".encode("utf-16-le"), b"\xff\xfd"]
)
def test_other_bytes_make_a_bad_row(tmp_path, data):
    source = opened(tmp_path, [{"txt": data}, {"txt": "a cat"}])
    with pytest.raises(BadSample, match="the caption cannot be read"):
        source[0]
    assert source[1].texts == ("a cat",)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\n\n", " \n"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_caption_a_line_is_guessed_and_said(tmp_path, end, encoding):
    words = [[f"{i} seen from {side}" for side in range(2 + i % 3)] for i in range(6)]
    rows = [{"txt": (end.join(texts) + end).encode(encoding)} for texts in words]
    source = opened(tmp_path, rows)
    assert [list(row.texts) for row in source] == words
    assert guessed(source) == {"txt_lines": "each"}
    assert source.guesses()[0].reason == "each of 6 .txt looked at has several lines"
    source = opened(tmp_path, rows, txt_lines="each")
    assert [list(row.texts) for row in source] == words and not source.guesses()
    assert len(opened(tmp_path, rows, txt_lines="one")[0].texts) == 1


def test_captions_of_lines_equal_those_of_a_table(tmp_path):
    words = [[f"{i} seen from {side}" for side in range(5)] for i in range(4)]
    source = opened(tmp_path, [{"txt": "\n".join(texts)} for texts in words])
    with open(tmp_path / "x.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("image", "caption"))
        for i, texts in enumerate(words):
            (tmp_path / f"{i:03}.jpg").write_bytes(b"picture")
            table.writerows((f"{i:03}.jpg", text) for text in texts)
    pairs = [EvaluationSet(one, 16) for one in (source, Table(str(tmp_path / "x.csv")))]
    assert [pairs[0].texts(i) for i in range(4)] == [pairs[1].texts(i) for i in range(4)]


@pytest.mark.parametrize(("several", "value"), [(0, None), (3, "one"), (5, "one"), (10, "each")])
def test_a_few_captions_of_several_lines_stay_whole(tmp_path, several, value):
    rows = [{"txt": "two\nlines" if i < several else "one line"} for i in range(10)]
    source = opened(tmp_path, rows)
    assert guessed(source).get("txt_lines") == value
    assert source[9].texts == (("two", "lines") if value == "each" else ("one line",))


def test_the_run_asks_where_it_is_unclear(tmp_path):
    rows = [{"txt": "two\nlines" if i < 7 else "one line"} for i in range(10)]
    with pytest.raises(DataError) as error:
        opened(tmp_path, rows)
    said = str(error.value)
    assert said.startswith(f"{tmp_path}/x.tar: 7 of 10 .txt looked at have several lines")
    for value in ("each", "one"):
        assert f"--config.data.txt_lines={value}" in said
        assert len(opened(tmp_path, rows, txt_lines=value)) == 10


@pytest.mark.parametrize("nothing", [{"caption": None}, {"captions": []}, {"captions": [""]}, {}])
@pytest.mark.parametrize("share", [1, 2])
def test_a_json_without_captions_gives_way_to_the_txt_of_the_whole_set(tmp_path, nothing, share):
    rows = [
        {"txt": f"words {i}", "json": nothing if i % share == 0 else {"caption": f"other {i}"}}
        for i in range(12)
    ]
    source = opened(tmp_path, rows)
    assert [row.texts for row in source] == [(f"words {i}",) for i in range(12)]
    assert guessed(source) == {"captions_from": "txt"}
    assert f"{12 // share} of 12 .json looked at have no text" in source.guesses()[0].reason
    source = opened(tmp_path, rows, captions_from="json")
    assert source[1].texts == (("words 1",) if share == 1 else ("other 1",))


def test_a_few_json_without_captions_take_their_txt(tmp_path):
    rows = [{"txt": "first", "json": {"captions": ["first", "second"]}} for _ in range(29)]
    source = opened(tmp_path, [*rows, {"txt": "alone", "json": {"caption": None}}])
    assert source[0].texts == ("first", "second") and source[29].texts == ("alone",)
    assert guessed(source) == {"captions_from": "json"}


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ({"captions": "one string"}, ("one string",)),
        ({"caption": ["a", "list"]}, ("a", "list")),
        ({"captions": ["a", None, "  "]}, ("a",)),
        ({"captions": [], "caption": "one"}, ("one",)),
        ({"captions": ["\ufeffa"]}, ("a",)),
    ],
)
def test_other_spellings_of_captions_in_json(values, texts):
    assert Reader()(Texts(None, json.dumps(values).encode())) == texts
    assert Reader()(Texts(None, json.dumps(values).encode("utf-16"))) == texts


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({"TEXT": "a dog", "url": "http://x.org/a b"}, "caption_key=TEXT"),
        ({"id": "a b", "sentences": ["a dog", "one dog"]}, "captions_key=sentences"),
        ({"alt text": "a dog", "width": 3}, "caption_key='alt text'"),
        ({"caption": None, "TEXT": "a dog"}, "caption_key=TEXT"),
    ],
)
def test_captions_under_another_key_are_named_and_the_advice_works(tmp_path, values, flag):
    rows = [{"json": values}] * 3
    with pytest.raises(DataError) as error:
        opened(tmp_path, rows)
    said = str(error.value)
    assert said.startswith(
        f"{tmp_path}/x.tar: no captions: the .json have the keys {next(iter(values))}"
    )
    assert f"set --config.data.{flag}" in said and "\n" not in said
    key, _, name = flag.partition("=")
    assert opened(tmp_path, rows, **{key: name.strip("'")})[2].texts[0] == "a dog"
    parts = {"web": {"source": "webdataset", "path": str(tmp_path / "x.tar")}}
    with pytest.raises(DataError, match=f"--config.data.parts.web.{key}"):
        Mixture(parts)


def test_labels_with_a_mark_and_other_facts_in_json(tmp_path):
    rows = [{"cls": "3".encode(code), "json": {"width": 4}} for code in ("utf-8-sig", "utf-16")]
    source = opened(tmp_path, rows)
    assert [(row.label, row.texts) for row in source] == [(3, ())] * 2


@pytest.mark.parametrize("half", ["\ud83d", "a \udfff", "\ud800\udc80"])
def test_a_key_with_half_a_surrogate_pair_is_named(tmp_path, half):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(b"x")
        (tmp_path / f"{i}.json").write_text(json.dumps({half: "a dog runs", "n": i}))
    with pytest.raises(DataError, match="the .json have the keys ") as caught:
        Files(str(tmp_path))
    str(caught.value).encode()
