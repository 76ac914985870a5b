"""Every row of every shard is found, and each thing wrong with a set has one outcome."""

from __future__ import annotations

import concurrent.futures
import io
import json
import os
import pickle
import tarfile

import pytest

from clipx.data.base import BadSample, DataError
from clipx.data.webdataset import WebDataset


def write(path, members: dict[str, bytes | str]):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(names, **more) -> dict[str, bytes | str]:
    found = {}
    for name in names:
        found |= {f"{name}.jpg": f"picture {name}".encode(), f"{name}.txt": f"a {name}"}
    return found | more


@pytest.fixture
def shards(tmp_path):
    """Three shards of 3, 1 and 2 samples."""
    for i, names in enumerate((("a", "b", "c"), ("a",), ("d", "e"))):
        write(tmp_path / f"train-{i:03d}.tar", samples(names))
    return tmp_path


def message(call, error=DataError) -> str:
    with pytest.raises(error) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_rows_are_the_samples_in_order_over_uneven_shards(shards):
    data = WebDataset(str(shards / "train-*.tar"))
    assert [(e.image, e.texts, e.row, e.key) for e in map(data.__getitem__, range(6))] == [
        (f"picture {name}".encode(), (f"a {name}",), row, f"train-00{shard}.tar/{name}")
        for row, (shard, name) in enumerate(["0a", "0b", "0c", "1a", "2d", "2e"])
    ]
    assert len(data) == 6 and data[0].label is None
    for row in (-1, 6):
        with pytest.raises(IndexError):
            data[row]


@pytest.mark.parametrize(
    "path",
    [
        "train-{000..002}.tar",
        "train-00{0..2}.tar",
        "train-{000,001,002}.tar",
        ("train-000.tar", "train-{001..002}.tar"),
        "{train,train}-00[0-2].tar",
    ],
)
def test_ranges_lists_and_globs_name_the_same_files(shards, path):
    paths = [path] if isinstance(path, str) else path
    data = WebDataset(tuple(str(shards / p) for p in paths))
    first = [data[i].key for i in range(6)]
    assert first == [f"train-00{s}.tar/{k}" for s, k in ("0a", "0b", "0c", "1a", "2d", "2e")]


def test_paths_expand_variables_and_home(shards, monkeypatch):
    monkeypatch.setenv("SHARDS", str(shards))
    monkeypatch.setenv("HOME", str(shards))
    assert len(WebDataset("$SHARDS/train-001.tar")) == len(WebDataset("~/train-001.tar")) == 1


def test_captions_come_from_json_if_it_has_some_else_from_txt(tmp_path):
    members = {
        "list.jpg": b"0",
        "list.txt": "not used",
        "list.json": json.dumps({"captions": [" one ", "", "two\0"], "caption": "not used"}),
        "one.PNG": b"1",
        "one.json": json.dumps({"caption": "only"}),
        "folder/meta.webp": b"2",
        "folder/meta.json": json.dumps({"width": 3}),
        "folder/meta.txt": "from txt",
        "labelled.jpeg": b"3",
        "labelled.cls": "7\n",
        "both.v2.jpg": b"not a picture of `both`: the extension starts at the first dot",
        "both.jpg": b"4",
        "both.txt": "b",
        "both.cls": b"1",
    }
    data = WebDataset(str(write(tmp_path / "x.tar", members)))
    rows = [data[i] for i in range(5)]
    assert [row.texts for row in rows] == [("one", "two"), ("only",), ("from txt",), (), ("b",)]
    assert [row.label for row in rows] == [None, None, None, 7, 1]
    assert [row.image for row in rows] == [b"0", b"1", b"2", b"3", b"4"]
    assert rows[2].key == "x.tar/folder/meta"


def test_caption_keys_and_class_names_are_config(tmp_path):
    members = {"a.jpg": b"x", "a.json": json.dumps({"alt": "an alt text", "caption": "c"})}
    path = str(write(tmp_path / "x.tar", members))
    data = WebDataset(path, caption_key="alt", classes=("dog", "cat"))
    assert (data[0].texts, data.classes) == (("an alt text",), ("dog", "cat"))


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"b.jpg": b"x", "b.txt": " \n\0"}, "empty caption"),
        ({"b.jpg": b"x", "b.txt": ""}, "empty caption"),
        ({"b.jpg": b"x", "b.json": '{"captions": ["", " "]}'}, "empty caption"),
        ({"b.jpg": b"x"}, "no caption (.txt or .json)"),
        ({"b.jpg": b"x", "b.json": '{"caption": 3}'}, "the captions in .json are no list of strin"),
        ({"b.jpg": b"x", "b.json": "{"}, "the caption cannot be read (Expecting property"),
        ({"b.jpg": b"x", "b.txt": b"\xff\xfe"}, "the caption cannot be read ('utf-8' codec"),
        ({"b.txt": "words"}, "no picture (.jpg, .jpeg, .png, .webp)"),
        ({"b.jpg": b"", "b.txt": "words"}, "the picture has no bytes"),
        ({"b.jpg": b"x", "b.txt": "words", "b.cls": "dog"}, "the label in .cls is b'dog'"),
    ],
)
def test_a_bad_sample_is_named_and_its_neighbours_are_fine(tmp_path, members, reason):
    path = write(tmp_path / "x.tar", samples("a") | members | samples("c"))
    data = WebDataset(str(path))
    assert len(data) == 3
    assert (data[0].texts, data[2].texts) == (("a a",), ("a c",))
    assert message(lambda: data[1], BadSample).startswith(f"x.tar/b: {reason}")


def test_it_pickles_and_reads_from_many_threads(shards):
    data = WebDataset(str(shards / "*.tar"))
    copy = pickle.loads(pickle.dumps(data))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        read = list(pool.map(copy.__getitem__, list(range(6)) * 50))
    assert read == [data[i] for i in range(6)] * 50


def test_no_match_names_what_is_there(shards):
    found = message(lambda: WebDataset(str(shards / "trian-*.tar")))
    assert found.startswith(f"{shards}/trian-*.tar: no file matches; nearest in {shards}: train-00")
    found = message(lambda: WebDataset(str(shards / "no" / "such" / "*.tar")))
    assert found.endswith(f"the folder is not there either; what exists of it is {shards}")
    assert "nothing given" in message(lambda: WebDataset(()))


def test_missing_shards_of_a_range_are_named(shards):
    os.remove(shards / "train-001.tar")
    assert message(lambda: WebDataset(str(shards / "train-{000..004}.tar"))) == (
        f"{shards}/train-{{000..004}}.tar: 3 of 5 shards are missing: "
        "train-001.tar, train-003.tar, train-004.tar; copy them, or narrow the range"
    )
    assert "write the smaller end first" in message(lambda: WebDataset("train-{004..000}.tar"))


@pytest.mark.parametrize(
    ("size", "last", "whole"),
    [
        (3585, "b.jpg", 1),  # cut in the data of b.txt
        (4196, "b.txt", 1),  # in the header of c.jpg
        (4096, "b.txt", 1),  # between two members: the end is not marked
        (515, "none", 0),
    ],
)
def test_a_truncated_tar_is_refused_at_open(tmp_path, size, last, whole):
    path = write(tmp_path / "x.tar", samples("abc"))
    path.write_bytes(path.read_bytes()[:size])
    assert message(lambda: WebDataset(str(path))) == (
        f"{path}: truncated or damaged; the last whole member is {last}, {whole} whole samples "
        "are readable; copy the shard again, or set truncated='keep' to use those"
    )
    if whole:
        data = WebDataset(str(path), truncated="keep")
        assert [data[i].texts for i in range(len(data))] == [("a a",)]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "an empty file (0 bytes), expected a tar"),
        (bytes(10240), "no pictures; found no members at all"),
        (b"x" * 4096, "not a tar"),
        (b"a.jpg" + bytes(95), "truncated to 100 bytes, expected a tar"),
        (b"\x1f\x8b" + b"x" * 4096, "a compressed tar, expected a plain one"),
    ],
)
def test_a_file_that_is_no_shard(tmp_path, data, reason):
    path = tmp_path / "x.tar"
    path.write_bytes(data)
    assert message(lambda: WebDataset(str(path))).startswith(f"{path}: {reason}")


def test_a_shard_without_pictures_or_captions(tmp_path):
    path = write(tmp_path / "x.tar", {"a.mp4": b"film", "a.txt": "a"})
    assert message(lambda: WebDataset(str(path))) == (
        f"{path}: no pictures; found .mp4, .txt, expected .jpg, .jpeg, .png, .webp"
    )
    path = write(tmp_path / "x.tar", {"a.jpg": b"x", "a.caption": "a"})
    assert message(lambda: WebDataset(str(path))) == (
        f"{path}: no captions; found .caption, .jpg, expected .txt or .json, or labels in .cls"
    )


def test_a_folder_or_a_shard_that_vanished(shards):
    assert "cannot be read (Is a directory)" in message(lambda: WebDataset(str(shards)))
    data = WebDataset(str(shards / "train-000.tar"))
    os.remove(shards / "train-000.tar")
    assert "cannot be read (No such file" in message(lambda: data[0], BadSample)


@pytest.mark.skipif("FLICKR8K" not in os.environ, reason="FLICKR8K names no folder of shards")
def test_real_shards():
    data = WebDataset("$FLICKR8K/train-{000000..000005}.tar")
    assert len(data) == 6000
    assert {len(data[i].texts) for i in range(0, 6000, 7)} == {5}
    assert all(data[i].image[:2] == b"\xff\xd8" for i in range(0, 6000, 7))
