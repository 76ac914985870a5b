"""Files of others are read whole, in a known shape and up to a size, or refused in one line."""

import gzip
import json
import os
import pathlib
import time
import zlib
from typing import Any, NotRequired, TypedDict

import pytest

from clipx.config import reading


class Entry(TypedDict):
    id: int
    score: NotRequired[float | None]


def said(call, *given) -> str:
    with pytest.raises(ValueError) as caught:
        call(*given)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "text, shape",
    [
        ("3", int),
        ("3", float),
        ("null", str | None),
        ('{"a": {"b": 1}}', dict[str, Any]),
        ('[{"id": 1, "more": []}, {"id": 2, "score": null}]', list[Entry]),
        ('["a", ["b", "c"]]', list[str | list[str]]),
        ("[" * 100 + "]" * 100, Any),
    ],
)
def test_shapes_that_fit(text, shape):
    assert reading.parse_json(text, shape) == json.loads(text)


@pytest.mark.parametrize(
    "text, shape, message",
    [
        ("true", int, "true, expected a whole number"),
        ("1.5", int, "1.5, expected a whole number"),
        ('"1"', float | None, '"1", expected a number or null'),
        ("[]", dict[str, Any], "[], expected an object"),
        ('{"a": 1}', dict[str, str], "a is 1, expected a text"),
        ('[{"id": 1}, {}]', list[Entry], "[1] has no 'id', expected an object {\"id\": a whole"),
        ('[{"id": 1, "score": "x"}]', list[Entry], '[0].score is "x", expected a number or null'),
        ('["a", [3]]', list[str | list[str]], "[1] is [3], expected a text or a list of a text"),
        ("[" * 102 + "]" * 102, Any, "nested more than 100 levels deep"),
        ("[" * 100_000, Any, "nested more than 100 levels deep"),
        ('{"a":' * 100_000, Any, "nested more than 100 levels deep"),
        ("9" * 5000, Any, "4300"),
        (b"\xff", Any, "not UTF-8"),
        ("{", Any, "Expecting property name"),
        (json.dumps("x" * 1000), int, "..., expected a whole number"),
    ],
)
def test_other_shapes_are_one_line(text, shape, message):
    assert message in said(reading.parse_json, text, shape)


def test_large_files_and_pipes_are_refused(tmp_path):
    file = tmp_path / "a.json"
    file.write_bytes(b"\xef\xbb\xbf[1]")
    assert reading.read_json(file, list[int]) == [1]
    for path, most, message in (
        (file, 5, "more than 5 bytes"),
        ("/dev/zero", 100, "a character device"),
        (tmp_path / "pipe", 100, "a named pipe"),
        (tmp_path, 100, "directory"),
    ):
        if path == tmp_path / "pipe":
            os.mkfifo(path)
        with pytest.raises(OSError) as caught:
            reading.read_json(path, Any, most)
        assert message in caught.value.strerror.lower()


def test_compressed_files_are_unpacked_up_to_a_size():
    text = b"a b\n" * 1000
    assert reading.unpack(gzip.compress(text) + gzip.compress(b"c") + b"\0\0") == text + b"c"
    assert reading.unpack(zlib.compress(text)) == text
    assert "unpacks to more than 3,999 bytes" in said(reading.unpack, gzip.compress(text), 3999)
    assert "cut short" in said(reading.unpack, gzip.compress(text)[:-1])
    assert "not whole" in said(reading.unpack, gzip.compress(text) + b"more")
    bomb, start = gzip.compress(bytes(1 << 27)), time.perf_counter()
    assert "unpacks to more than 1,000 bytes" in said(reading.unpack, bomb, 1000)
    assert time.perf_counter() - start < 0.1


@pytest.mark.parametrize("name", ["../a", "a/../../b", "/etc/passwd", "a\0b"])
def test_names_that_lead_out_of_a_folder_are_refused(name):
    assert "leads out of the folder" in said(reading.inside, pathlib.Path("models"), name)
    assert reading.inside(pathlib.Path("models"), "a/b") == pathlib.Path("models/a/b")
    assert "a name of 300 characters" in said(reading.inside, pathlib.Path("models"), "a" * 300)
