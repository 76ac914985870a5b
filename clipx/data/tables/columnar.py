"""Reads parquet and arrow files through pyarrow, also those that hold the pictures themselves."""

from __future__ import annotations

import abc
import hashlib
import os
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from clipx.data.base import Skipped
from clipx.data.storage import ABSENT, Shard, cache_folder, recall, remember
from clipx.data.tables.cells import is_picture
from clipx.errors import DataError, optional

_BATCH = 1024  # rows to convert to Python objects at a time
_FEW = 64  # rows at a time where cells are pictures
_VERSION = 1001  # format of what the cache keeps of a file with pictures


class Pictures(NamedTuple):
    """Where the pictures of a column are: bytes of one file that can be read at random."""

    file: str
    places: np.ndarray  # int64 [rows, 2]: offset and size; size `ABSENT` for none
    checks: np.ndarray  # uint32 [rows]: crc32 of each picture
    paths: list[str]  # what the column says about each; '' for nothing


class Columnar(abc.ABC):
    """A table in columns with their types. Subclasses open the file."""

    unit = "row"
    kind = ""  # for errors

    def __init__(self, path: str):
        with optional("parquet", DataError, f"{path}: {self.kind} needs pyarrow"):
            import pyarrow
            import pyarrow.parquet
        self.path, self._arrow = path, pyarrow
        self._errors = (pyarrow.ArrowException, OSError, UnicodeDecodeError)
        try:
            self._schema = self._read_schema()
            self.columns: list[str] = list(self._schema.names)
        except self._errors as error:
            raise self._damaged(error) from None

    def rows(self, names: Sequence[str]) -> Iterator[tuple[int, list[Any]]]:
        number = 0
        for batch in self._guarded(names):
            for cells in zip(*(self._cells(batch, name) for name in names)):
                number += 1
                yield number, list(cells)

    def skipped(self) -> list[Skipped]:
        return []

    def pictures(self, column: str) -> Pictures:
        """The pictures of a column of bytes or of {bytes, path}.

        Pictures that lie in the file as they are stay there. Others are compressed with their
        neighbours: they are copied once to the cache, where every row can be read by itself.
        """
        stat = os.stat(self.path)
        shard = Shard(self.path, stat.st_size, f"{stat.st_mtime_ns} {column}")
        known, copy = recall(shard, _VERSION), self._copy(shard)
        if known is None or not os.path.exists(os.fsdecode(known["container"].tobytes())):
            known = self._extract(column, copy)
            remember(shard, _VERSION, known)
        ends = np.cumsum(known["path_sizes"])
        names = known["paths"].tobytes()
        paths = [names[end - n : end].decode() for n, end in zip(known["path_sizes"], ends)]
        file = os.fsdecode(known["container"].tobytes())
        return Pictures(file, known["places"], known["checks"], paths)

    def _extract(self, column: str, copy: str) -> dict[str, np.ndarray]:
        """The arrays that the cache keeps: `Pictures` with its texts as bytes."""
        places, checks, paths = [], [], []
        folder = os.path.dirname(copy)
        try:
            os.makedirs(folder, exist_ok=True)
            handle, unfinished = tempfile.mkstemp(dir=folder)
        except OSError as error:
            raise self._no_space(folder, error) from None
        try:
            with os.fdopen(handle, "wb") as out:
                for batch in self._guarded([column]):
                    for cell in self._cells(batch, column):
                        data = cell.get("bytes") if isinstance(cell, dict) else cell
                        path = cell.get("path") if isinstance(cell, dict) else ""
                        places.append((out.tell(), len(data)) if data is not None else (0, ABSENT))
                        checks.append(zlib.crc32(data or b""))
                        paths.append((path or "").encode("utf-8", "replace"))
                        out.write(data or b"")
            os.replace(unfinished, copy)
        except OSError as error:
            os.unlink(unfinished)
            raise self._no_space(folder, error) from None
        except BaseException:
            os.unlink(unfinished)
            raise
        return _arrays(copy, places, checks, paths)

    def _copy(self, shard: Shard) -> str:
        """The file of the cache for the pictures of a table."""
        name = hashlib.sha1(repr((os.path.abspath(shard.path), *shard[1:])).encode()).hexdigest()
        return os.path.join(cache_folder(), "pictures", name)

    def _no_space(self, folder: str, error: OSError) -> DataError:
        return DataError(
            f"{self.path}: its pictures cannot be copied to {folder} ({error.strerror}); set "
            f"CLIPX_CACHE to a folder with {os.path.getsize(self.path) / 1e9:.1f} GB of space"
        )

    def _guarded(self, names: Sequence[str]) -> Iterator[Any]:
        """Record batches of some columns."""
        try:
            yield from self._batches(list(names), _FEW if self._heavy(names) else _BATCH)
        except self._errors as error:
            raise self._damaged(error) from None

    def _cells(self, batch: Any, name: str) -> list[Any]:
        """A column of a batch."""
        try:
            return batch.column(name).to_pylist()
        except UnicodeDecodeError as error:
            raise self._damaged(error) from None

    def _heavy(self, names: Sequence[str]) -> bool:
        types = [self._schema.field(name).type for name in names if name in self._schema.names]
        return any("binary" in str(kind) for kind in types)

    def _damaged(self, error: Exception) -> DataError:
        reason = str(error).replace("\n", " ")
        return DataError(f"{self.path}: cannot be read as {self.kind} ({reason})")

    @abc.abstractmethod
    def _read_schema(self) -> Any:
        """pyarrow's schema of the file."""

    @abc.abstractmethod
    def _batches(self, names: list[str], size: int) -> Iterator[Any]:
        """Record batches of at most `size` rows with these columns."""


class Parquet(Columnar):
    """A parquet file."""

    kind = "parquet"

    def _read_schema(self) -> Any:
        with self._arrow.parquet.ParquetFile(self.path) as file:
            return file.schema_arrow

    def _batches(self, names: list[str], size: int) -> Iterator[Any]:
        with self._arrow.parquet.ParquetFile(self.path) as file:
            yield from map(_valid, file.iter_batches(size, columns=names))


class Arrow(Columnar):
    """An arrow file, as Hugging Face's `save_to_disk` writes it."""

    kind = "arrow"

    def _read_schema(self) -> Any:
        with self._arrow.memory_map(self.path) as file, self._open(file) as reader:
            return reader.schema

    def _batches(self, names: list[str], size: int) -> Iterator[Any]:
        with self._arrow.memory_map(self.path) as file, self._open(file) as reader:
            for batch in _all(reader):
                for start in range(0, batch.num_rows, size):
                    yield batch.select(names).slice(start, size)

    def _extract(self, column: str, copy: str) -> dict[str, np.ndarray]:
        """As for other files, but pictures that lie in the file uncompressed are not copied."""
        try:
            with self._arrow.memory_map(self.path) as file:
                whole = file.read_buffer(file.size())
                file.seek(0)
                with self._open(file) as reader:
                    parts = [_in_place(batch.column(column), whole) for batch in _all(reader)]
        except self._errors as error:
            raise self._damaged(error) from None
        if not all(part is not None for part in parts):
            return super()._extract(column, copy)
        places, checks, paths = (sum(x, []) for x in zip(*filter(None, parts)))
        return _arrays(self.path, places, checks, paths)

    def _open(self, file: Any) -> Any:
        """A reader of the stream format, or of the file format."""
        try:
            return self._arrow.ipc.open_stream(file)
        except self._arrow.ArrowInvalid:
            file.seek(0)
            return self._arrow.ipc.open_file(file)


def _all(reader: Any) -> Iterator[Any]:
    """The record batches of a file in the stream format or in the file format."""
    if hasattr(reader, "num_record_batches"):
        return map(lambda i: _valid(reader.get_batch(i)), range(reader.num_record_batches))
    return map(_valid, reader)


def _valid(batch: Any) -> Any:
    """The batch, checked: pyarrow would read beyond the end of a damaged one."""
    batch.validate(full=True)
    return batch


def holds_pictures(cells: Sequence[Any]) -> bool:
    """Whether a column's cells are pictures: most of them, or any of {bytes, path}, where others
    may have a path alone."""
    pictures = [cell for cell in cells if is_picture(cell)]
    return len(pictures) * 2 >= max(len(cells), 1) or any(isinstance(c, dict) for c in pictures)


def _arrays(file: str, places: list, checks: list[int], paths: list[bytes]) -> dict[str, Any]:
    return {
        "container": np.frombuffer(os.fsencode(os.path.abspath(file)), np.uint8),
        "places": np.array(places, np.int64).reshape(-1, 2),
        "checks": np.array(checks, np.uint32),
        "paths": np.frombuffer(b"".join(paths), np.uint8),
        "path_sizes": np.array([len(path) for path in paths], np.int64),
    }


def _in_place(cells: Any, whole: Any) -> tuple[list, list[int], list[bytes]] | None:
    """(places, checks, paths) of the pictures in one batch; None if they are not in the file as
    they are."""
    paths, known = [b""] * len(cells), cells.is_valid().to_pylist()
    if str(cells.type).startswith("struct"):
        names = [field.name for field in cells.type]
        if "path" in names:
            texts = cells.field("path").to_pylist()
            paths = [(path or "").encode("utf-8", "replace") for path in texts]
        cells = cells.field("bytes")
    kind = {"binary": np.int32, "large_binary": np.int64}.get(str(cells.type))
    if kind is None:
        return None
    _, offsets, data = cells.buffers()
    if data is None or not 0 <= data.address - whole.address < whole.size:
        return None
    ends = np.frombuffer(offsets, kind)[cells.offset :][: len(cells) + 1].astype(np.int64)
    start, view = data.address - whole.address, memoryview(data)
    held = cells.is_valid().to_pylist()
    places = [
        (start + int(a), int(b - a)) if all(valid) else (0, ABSENT)
        for a, b, *valid in zip(ends, ends[1:], known, held)
    ]
    return places, [zlib.crc32(view[a:b]) for a, b in zip(ends, ends[1:])], paths
