"""Every row of every shard is found, and each fault of a data set has one outcome."""

from __future__ import annotations

import concurrent.futures
import io
import json
import os
import pickle
import sys
import tarfile

import fsspec
import pytest

from clipx.data import storage as files
from clipx.data.base import fingerprint
from clipx.data.shard_index import index_shards
from clipx.data.sources.webdataset import WebDataset
from clipx.errors import BadSample, DataError, StorageError, install_hint

NAMES = ("train-000.tar", "train-001.tar", "train-002.tar")


def write(path, members: dict[str, bytes | str]):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(names, **more) -> dict[str, bytes | str]:
    members = {}
    for name in names:
        members |= {f"{name}.jpg": f"picture {name}".encode(), f"{name}.txt": f"a {name}"}
    return members | more


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "index"


@pytest.fixture
def scans(monkeypatch):
    """A list to which the name of every shard is added when its headers are read."""
    opened, open_shard = [], files.open_shard

    def counted(path):
        opened.append(os.path.basename(path))
        return open_shard(path)

    monkeypatch.setattr("clipx.data.tars.open_shard", counted)
    return opened


@pytest.fixture
def bucket(shards):
    """The same shards on a remote filesystem, which is in memory."""
    fs = fsspec.filesystem("memory")
    for name in NAMES:
        fs.pipe(f"/bucket/{name}", (shards / name).read_bytes())
    yield "memory://bucket"
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


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
        ({"b.jpg": b"x", "b.json": '{"caption": 3}'}, "the captions in .json are not a list of st"),
        ({"b.jpg": b"x", "b.json": "{"}, "the caption cannot be read (Expecting property"),
        ({"b.jpg": b"x", "b.txt": b"\xff\xfd"}, "the caption cannot be read ('utf-8' codec"),
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


def test_the_error_without_a_match_names_the_nearest_files(shards):
    said = message(lambda: WebDataset(str(shards / "trian-*.tar")))
    assert said.startswith(f"{shards}/trian-*.tar: no file matches; nearest in {shards}: train-00")
    said = message(lambda: WebDataset(str(shards / "no" / "such" / "*.tar")))
    assert said.endswith(f"its folder does not exist; the nearest folder that does is {shards}")
    assert "nothing given" in message(lambda: WebDataset(()))


@pytest.mark.parametrize("name", ["$NO_SUCH_FOLDER", "${NO_SUCH_FOLDER}"])
def test_a_variable_that_is_not_set_is_named(monkeypatch, name):
    monkeypatch.delenv("NO_SUCH_FOLDER", raising=False)
    said = message(lambda: WebDataset(f"{name}/train-*.tar"))
    assert said.startswith(f"{name}/train-*.tar: the environment variable NO_SUCH_FOLDER is not")


def test_missing_shards_of_a_range_are_named(shards):
    os.remove(shards / "train-001.tar")
    assert message(lambda: WebDataset(str(shards / "train-{000..004}.tar"))) == (
        f"{shards}/train-{{000..004}}.tar: 3 of 5 shards are missing: "
        "train-001.tar, train-003.tar, train-004.tar; copy them, or narrow the range"
    )
    assert "write the smaller number first" in message(lambda: WebDataset("train-{004..000}.tar"))


@pytest.mark.parametrize(
    ("size", "last", "complete"),
    [
        (3585, "b.jpg", 1),  # in the data of b.txt
        (4196, "b.txt", 1),  # in the header of c.jpg
        (4096, "b.txt", 1),  # between two members: the end mark is missing
        (515, "none", 0),
    ],
)
def test_a_truncated_tar_is_refused_at_open(tmp_path, size, last, complete):
    path = write(tmp_path / "x.tar", samples("abc"))
    path.write_bytes(path.read_bytes()[:size])
    assert message(lambda: WebDataset(str(path))) == (
        f"{path}: truncated or damaged; the last complete member is {last}, {complete} complete "
        "samples can be read; copy the shard again, or set truncated='keep' to use these samples"
    )
    if complete:
        data = WebDataset(str(path), truncated="keep")
        assert [data[i].texts for i in range(len(data))] == [("a a",)]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "an empty file (0 bytes), expected a tar"),
        (bytes(10240), "no pictures; found no members at all"),
        (b"x" * 4096, "not a tar"),
        (b"a.jpg" + bytes(95), "truncated to 100 bytes, expected a tar"),
        (b"\x1f\x8b" + b"x" * 4096, "a compressed tar, expected an uncompressed one"),
    ],
)
def test_a_file_that_is_not_a_shard(tmp_path, data, reason):
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
    assert "a folder, expected a tar" in message(lambda: WebDataset(str(shards)))
    data = WebDataset(str(shards / "train-000.tar"))
    os.remove(shards / "train-000.tar")
    said = message(lambda: data[0], StorageError)
    assert said.startswith(f"{shards}/train-000.tar: gone since the data was opened (No such file")


def test_keys_are_those_of_all_examples_bad_ones_included(shards, monkeypatch):
    write(shards / "train-001.tar", {"bad.jpg": b"", "bad.txt": "x", "a.jpg": b"x", "a.txt": "x"})
    data = WebDataset(str(shards / "train-*.tar"))
    read = [data[row].key for row in (0, 1, 2, 4, 5, 6)]
    monkeypatch.setattr("clipx.data.sources.webdataset.read", None)  # nothing is read
    keys = list(data.keys())
    assert keys.pop(3) == "train-001.tar/bad" and keys == read
    assert keys[3] == "train-001.tar/a"


def test_the_fingerprint_does_not_depend_on_where_the_data_is(shards, bucket):
    local, remote = WebDataset(str(shards / "*.tar")), WebDataset(f"{bucket}/*.tar")
    other = WebDataset(f"{bucket}/*1.tar")
    assert fingerprint(local) == fingerprint(remote) != fingerprint(other)


def test_halves_of_surrogate_pairs_become_question_marks(tmp_path):
    captions = json.dumps({"captions": ["a\ud800b", "\N{GRINNING FACE}", "\udfff"]})
    path = write(tmp_path / "x.tar", {"a.jpg": b"x", "a.json": captions})
    assert WebDataset(str(path))[0].texts == ("a?b", "\N{GRINNING FACE}", "?")


def test_too_deeply_nested_json_is_a_bad_sample(tmp_path):
    path = write(tmp_path / "x.tar", {"a.jpg": b"x", "a.json": "[" * 200_000})
    data = WebDataset(str(path))
    assert message(lambda: data[0], BadSample).startswith("x.tar/a: the caption cannot be read")


def test_an_index_is_made_once(shards, cache, scans):
    reports = []
    path = str(shards / "train-*.tar")
    first = index_shards(path, progress=lambda done, total: reports.append((done, total)))
    assert reports == [(1, 3), (2, 3), (3, 3)] and sorted(scans) == list(NAMES)
    assert [file.suffix for file in cache.iterdir()] == [".npz"] * 3
    again = index_shards(path)
    assert len(scans) == 3
    for a, b in zip(first, again, strict=True):
        assert (a.path, a.keys, a.endings) == (b.path, b.keys, b.endings)
        assert (a.last, a.cut, a.account) == (b.last, b.cut, b.account)
        assert (a.places == b.places).all() and (a.key_sizes == b.key_sizes).all()
    assert WebDataset(path)[5].texts == ("a e",)


def test_a_changed_shard_is_indexed_again(shards, scans):
    path = shards / "train-001.tar"
    assert WebDataset(str(path))[0].key == "train-001.tar/a"
    write(path, samples("z"))  # same size, other time
    os.utime(path, ns=(1, 1))
    assert WebDataset(str(path))[0].key == "train-001.tar/z"
    write(path, samples("qrstuvwxyz"))
    os.utime(path, ns=(1, 1))  # same time, other size
    assert len(WebDataset(str(path))) == 10
    assert scans == ["train-001.tar"] * 3


def test_a_truncated_shard_is_refused_from_the_cache_too(tmp_path, scans):
    path = write(tmp_path / "x.tar", samples("abc"))
    path.write_bytes(path.read_bytes()[:4196])
    first, again = (message(lambda: WebDataset(str(path))) for _ in range(2))
    assert first == again and scans == ["x.tar"]
    data = WebDataset(str(path), truncated="keep")
    assert list(data.keys()) == ["x.tar/a"] and scans == ["x.tar"]


@pytest.mark.parametrize("damage", ["cut", "not one", "another version"])
def test_a_damaged_cache_is_made_again(shards, cache, scans, damage, monkeypatch):
    path = str(shards / "train-001.tar")
    WebDataset(path)
    (file,) = cache.iterdir()
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "not one":
        file.write_text("no archive")
    else:
        monkeypatch.setattr("clipx.data.shard_index.VERSION", 0)
    assert WebDataset(path)[0].texts == ("a a",) and len(scans) == 2
    assert WebDataset(path)[0].texts == ("a a",) and len(scans) == 2


def test_a_cache_that_cannot_be_written_is_ignored(shards, tmp_path, monkeypatch, scans):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CLIPX_CACHE", str(tmp_path / "file"))
    for opened in (1, 2):
        assert len(WebDataset(str(shards / "train-001.tar"))) == 1 and len(scans) == opened


def test_the_folder_of_the_cache(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("CLIPX_CACHE", "~/mine")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert files.cache_folder() == "/home/me/mine"
    monkeypatch.delenv("CLIPX_CACHE")
    assert files.cache_folder() == "/cache/clipx"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert files.cache_folder() == "/home/me/.cache/clipx"


@pytest.mark.parametrize("path", ["{}/*.tar", "{}/train-{{000..002}}.tar", "{}/tr*-00[0-2].tar"])
def test_remote_shards_read_like_local_ones(shards, bucket, path, scans):
    data = WebDataset(path.format(bucket))
    assert list(data) == list(WebDataset(str(shards / "*.tar")))
    copy = pickle.loads(pickle.dumps(data))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(copy.__getitem__, range(6))) == list(data)
    assert sorted(scans) == sorted(NAMES * 2)
    assert list(WebDataset(path.format(bucket))) == list(data) and len(scans) == 6


def test_a_row_is_one_request_unless_its_members_are_far_apart(tmp_path, monkeypatch):
    members = samples("a") | {"b.jpg": b"x", "b.npy": bytes(100_000), "b.txt": "far"}
    fs = fsspec.filesystem("memory")
    fs.pipe("/apart/x.tar", write(tmp_path / "x.tar", members).read_bytes())
    data, ranges, cat_file = WebDataset("memory://apart/x.tar"), [], fs.cat_file

    def counted(path, start, end):
        ranges.append(end - start)
        return cat_file(path, start, end)

    monkeypatch.setattr(type(fs), "cat_file", lambda self, *where: counted(*where))
    assert data[0].texts == ("a a",) and ranges == [1024 + 3]  # a block, a header, the text
    assert data[1].texts == ("far",) and ranges[1:] == [1, 3]
    fs.rm("/apart", recursive=True)


def test_a_changed_remote_shard_is_indexed_again(bucket, tmp_path):
    WebDataset(f"{bucket}/train-001.tar")
    path = write(tmp_path / "other.tar", samples("z"))
    fsspec.filesystem("memory").pipe("/bucket/train-001.tar", path.read_bytes())
    assert WebDataset(f"{bucket}/train-001.tar")[0].texts == ("a z",)


def test_faults_of_remote_shards(bucket):
    said = message(lambda: WebDataset(f"{bucket}/train-{{000..004}}.tar"))
    assert "2 of 5 shards are missing: train-003.tar, train-004.tar; copy" in said
    assert message(lambda: WebDataset(f"{bucket}/trian-000.tar")) == (
        "memory://bucket/trian-000.tar: no file matches; nearest in memory://bucket: "
        "train-000.tar, train-002.tar, train-001.tar"
    )
    fs = fsspec.filesystem("memory")
    fs.pipe("/bucket/train-000.tar", fs.cat_file("/bucket/train-000.tar", 0, 3585))
    said = message(lambda: WebDataset(f"{bucket}/train-000.tar"))
    assert "truncated or damaged; the last complete member is b.jpg" in said
    fs.pipe("/bucket/train-000.tar", b"")
    assert "an empty file" in message(lambda: WebDataset(f"{bucket}/train-000.tar"))
    data = WebDataset(f"{bucket}/train-001.tar")
    fs.pipe("/bucket/train-001.tar", bytes(600))
    said = message(lambda: data[0], StorageError)
    assert said.startswith(
        f"{bucket}/train-001.tar: ended after 88 of 1,027 bytes of a read; put it"
    )
    fs.rm("/bucket/train-001.tar")
    assert "gone since the data was opened" in message(lambda: data[0], StorageError)


@pytest.mark.parametrize(
    ("missing", "path"), [("fsspec", "memory://a.tar"), ("gcsfs", "gs://a/b.tar")]
)
def test_a_missing_package_is_named(monkeypatch, missing, path):
    monkeypatch.setitem(sys.modules, missing, None)
    said = message(lambda: WebDataset(path))
    assert said.startswith(f"{path}: ") and missing in said
    assert said.endswith(install_hint("remote"))


def test_an_unknown_protocol():
    assert "expected gs://, s3://" in message(lambda: WebDataset("sg://bucket/a.tar"))


def test_a_shortened_shard_is_no_bad_sample(shards):
    data = WebDataset(str(shards / "train-000.tar"))
    os.truncate(shards / "train-000.tar", 600)
    said = message(lambda: data[1], StorageError)
    assert "has changed since the data was opened (600 bytes, where it had 10,240)" in said


@pytest.mark.skipif("FLICKR8K" not in os.environ, reason="FLICKR8K names no folder of shards")
def test_real_shards():
    data = WebDataset("$FLICKR8K/train-{000000..000005}.tar")
    assert len(data) == 6000
    assert {len(data[i].texts) for i in range(0, 6000, 7)} == {5}
    assert all(data[i].image[:2] == b"\xff\xd8" for i in range(0, 6000, 7))
