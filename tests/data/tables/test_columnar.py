"""Parquet and arrow files, with the paths of pictures or with the pictures themselves."""

from __future__ import annotations

import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipx.data.sources.table import Table
from clipx.errors import BadSample, DataError

COUNT = 12
BYTES = [b"\xff\xd8\xff picture " + bytes([i]) * (i + 1) for i in range(COUNT)]
WORDS = [f"a dog number {i}" for i in range(COUNT)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(path, columns, *, compression=None):
    """Writes a table by the ending of `path`: parquet, or arrow's stream or file format."""
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=5)
        return str(path)
    options = pa.ipc.IpcWriteOptions(compression=compression)
    opened = pa.ipc.new_file if "file" in path.stem else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as file, opened(file, table.schema, options=options) as out:
        out.write_table(table, max_chunksize=5)
    return str(path)


def structs(paths=None):
    paths = paths or [f"{i}.jpg" for i in range(COUNT)]
    return [{"bytes": data, "path": path} for data, path in zip(BYTES, paths)]


NAMES = ["t.parquet", "stream.arrow", "file.arrow"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_pictures_are_read_from_the_table(tmp_path, name, compression):
    path = write(tmp_path / name, {"image": structs(), "text": WORDS}, compression=compression)
    for _ in range(2):  # anew, and from the cache
        table = pickle.loads(pickle.dumps(Table(path)))
        assert [table[i].image for i in range(COUNT)] == BYTES
        assert [table[i].texts for i in range(COUNT)] == [(text,) for text in WORDS]
        assert list(table.keys()) == [f"{i}.jpg" for i in range(COUNT)]
        assert [g.value for g in table.guesses()] == ["image", ["text"]]


def test_pictures_of_an_arrow_file_are_not_copied(tmp_path, cache):
    Table(write(tmp_path / "t.arrow", {"image": structs(), "text": WORDS}))
    assert not (cache / "pictures").exists()
    Table(write(tmp_path / "t.parquet", {"image": structs(), "text": WORDS}))
    assert len(list((cache / "pictures").iterdir())) == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_column_of_bytes_and_texts_as_bytes(tmp_path, name):
    columns = {"jpg": BYTES, "caption": [text.encode() for text in WORDS]}
    table = Table(write(tmp_path / name, columns))
    assert [table[i].image for i in range(COUNT)] == BYTES
    assert table[3].texts == (WORDS[3],) and table[3].key == f"{name} row 4"


@pytest.mark.parametrize("name", NAMES)
def test_lists_of_captions_and_rows_of_one_picture(tmp_path, name):
    images = structs()
    columns = {"image": [images[0], images[1], images[0]], "caption": [["a", "b"], ["c"], ["d"]]}
    table = Table(write(tmp_path / name, columns))
    assert [table[i].texts for i in range(len(table))] == [("a", "b", "d"), ("c",)]
    nameless = [{"bytes": data, "path": None} for data in (BYTES[0], BYTES[1], BYTES[0])]
    table = Table(write(tmp_path / name, columns | {"image": nameless}))
    assert [table[i].image for i in range(len(table))] == BYTES[:2]
    same_name = [{"bytes": data, "path": "image.jpg"} for data in BYTES[:3]]
    table = Table(write(tmp_path / name, columns | {"image": same_name}))
    assert [table[i].image for i in range(len(table))] == BYTES[:3]


@pytest.mark.parametrize("name", NAMES)
def test_pictures_that_are_missing_or_beside_the_table(tmp_path, name):
    (tmp_path / "1.jpg").write_bytes(b"beside")
    cells = structs()[:4]
    cells[1] = {"bytes": None, "path": "1.jpg"}
    cells[2] = {"bytes": None, "path": None}
    cells[3] = None
    table = Table(write(tmp_path / name, {"image": cells, "caption": WORDS[:4]}))
    assert [table[i].image for i in (0, 1)] == [BYTES[0], b"beside"]
    for row in (2, 3):
        with pytest.raises(BadSample, match=f"{name} row {row + 1}: the path of the picture is em"):
            table[row]


def test_several_files_and_rows_of_a_split(tmp_path):
    for part in range(2):
        columns = {"image": structs()[part::2], "text": WORDS[part::2], "split": ["a", "b"] * 3}
        write(tmp_path / f"{part}.parquet", columns)
    table = Table(str(tmp_path / "?.parquet"), where="split=b")
    assert [table[i].image for i in range(6)] == BYTES[2::4] + BYTES[3::4]


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, cache):
    cache.write_text("a file")
    path = write(tmp_path / "t.parquet", {"image": structs(), "text": WORDS})
    with pytest.raises(DataError, match="its pictures cannot be copied to .*set CLIPX_CACHE to a"):
        Table(path)


def test_what_is_no_arrow_file_is_refused(tmp_path):
    (tmp_path / "t.arrow").write_bytes(b"something else, which is long enough to be a file")
    with pytest.raises(DataError, match="cannot be read as arrow"):
        Table(str(tmp_path / "t.arrow"))
