"""Exact search in folders of embeddings in clip-retrieval's layout: `clipx.embed
--layout=clip_retrieval` writes them, and clip-retrieval does."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from clipx.config import reading
from clipx.data import pictures
from clipx.data.base import Example, Source
from clipx.data.row_arrays import load
from clipx.errors import BadSample, ConfigError, DataError, RunError, optional
from clipx.serving import given_source
from clipx.serving.embeddings import example_of
from clipx.serving.model import Model

_TILE = 1 << 16  # rows that are compared at once
_WHERE = "--embeddings"


class Hit(NamedTuple):
    """A row that a search has found."""

    score: float  # the inner product with the query
    row: int  # of the folder
    key: str
    caption: str
    image_path: str


class Index:
    """The embeddings of a folder, which are read from their files a tile at a time.

    Raises `ConfigError` for a folder without them, and for files that do not fit each other.
    """

    def __init__(self, folder: str, tile: int = _TILE):
        self.folder, self._tile = pathlib.Path(folder).expanduser(), tile
        files = sorted((self.folder / "img_emb").glob("*.npy"))
        tables = sorted((self.folder / "metadata").glob("*.parquet"))
        if not files or len(files) != len(tables):
            unfinished = " (an unfinished one: run clipx.embed again)" * any(
                self.folder.glob(".unfinished_*")
            )
            raise ConfigError(
                _WHERE,
                f"{folder} with {len(files)} file(s) in img_emb and {len(tables)} in metadata"
                + unfinished,
                "a folder that `clipx.embed --layout=clip_retrieval` has finished",
            )
        try:
            self._arrays = [load(str(file)) for file in files]
        except DataError as error:
            raise ConfigError(_WHERE, str(error), "the file as clipx.embed wrote it") from None
        self._tables = [_Table(path) for path in tables]
        for file, array, table in zip(files, self._arrays, self._tables):
            if array.ndim != 2 or len(array) != len(table) or array.shape[1] != self.width:
                found = f"{file} of shape {array.shape}, with {len(table):,} rows of metadata"
                raise ConfigError(_WHERE, found, f"[rows, {self.width}], a row for each")
        self._starts = np.cumsum([0, *(len(array) for array in self._arrays)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def width(self) -> int:
        """Numbers of an embedding."""
        return self._arrays[0].shape[1]

    @functools.cached_property
    def about(self) -> dict[str, Any]:
        """What made the embeddings; {} if another program did."""
        for file in sorted(self.folder.glob("embeddings_*.json")):
            try:
                return reading.read_json(file, dict[str, Any])
            except (OSError, ValueError) as error:
                found = f"{file}, which is damaged ({error})"
                raise ConfigError(_WHERE, found, "the file as clipx.embed wrote it") from None
        return {}

    def refuse_other(self, model: Model, path: str) -> None:
        """Raises `ConfigError` for a model other than that of the embeddings."""
        known = self.about.get("weights", model.digest)
        if (model.width, model.digest) != (self.width, known):
            made = self.about.get("model", "another model")
            raise ConfigError(
                "--model",
                f"{path}, step {model.step}, whose embeddings have {model.width} numbers",
                f"the model of the embeddings: {made}, step {self.about.get('step')}, with "
                f"{self.width}",
                f"--model={made}",
            )

    def search(
        self, queries: Float[np.ndarray, "q d"], count: int
    ) -> tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]:
        """(scores, rows) of the `count` rows with the highest inner products, the best first and
        of equal ones the first. Exact: every row is compared."""
        queries = np.asarray(queries, np.float32)
        scores = np.empty((len(queries), 0), np.float32)
        rows = np.empty((len(queries), 0), np.int64)
        for start, tile in self._tiles():
            found = queries @ tile.T
            number = np.broadcast_to(np.arange(start, start + len(tile)), found.shape)
            scores = np.concatenate([scores, found], axis=1)
            rows = np.concatenate([rows, number], axis=1)
            if scores.shape[1] > count:  # those at the border of the best are ordered below
                least = -np.partition(-scores, count - 1, axis=1)[:, count - 1 : count]
                kept = [np.flatnonzero(line >= low) for line, low in zip(scores, least)]
                best = [k[np.lexsort((r[k], -s[k]))][:count]
                        for k, s, r in zip(kept, scores, rows)]  # fmt: skip
                scores = np.stack([s[b] for s, b in zip(scores, best)])
                rows = np.stack([r[b] for r, b in zip(rows, best)])
        order = np.lexsort((rows, -scores))[:, :count]
        return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)

    def _tiles(self) -> Any:
        """(the first row, float32 rows) of each tile."""
        for start, array in zip(self._starts, self._arrays):
            for i in range(0, len(array), self._tile):
                yield int(start) + i, np.asarray(array[i : i + self._tile], np.float32)

    def hits(self, scores: Float[np.ndarray, " k"], rows: Int[np.ndarray, " k"]) -> list[Hit]:
        """What the metadata says of rows."""
        found = []
        for score, row in zip(scores.tolist(), rows.tolist()):
            said = self._said(row)
            words = (str(said.get(key) or "") for key in ("key", "caption", "image_path"))
            found.append(Hit(score, row, *words))
        return found

    def _said(self, row: int) -> dict[str, Any]:
        part = int(np.searchsorted(self._starts, row, "right")) - 1
        return self._tables[part].row(row - int(self._starts[part]))

    @functools.cached_property
    def source(self) -> Source | None:
        """The data that was embedded, open; None if it is gone or not known."""
        try:
            return given_source.opened(self.about["data"], _WHERE)
        except (KeyError, DataError, ConfigError, RunError):
            return None

    def picture(self, row: int) -> UInt8[np.ndarray, "h w 3"] | None:
        """The picture of a row; None if it is gone."""
        said = self._said(row)
        try:
            if self.source is not None and "row" in said:
                return pictures.decode(example_of(self.source, said["row"]))
            data = reading.read_bytes(said.get("image_path") or "", 1 << 28)
            return pictures.decode(Example(data, (), row, str(row)))
        except (BadSample, OSError, ValueError, IndexError, RunError):
            return None


class _Table:
    """A parquet file of metadata, of which row groups are read when they are asked for."""

    def __init__(self, path: pathlib.Path):
        with optional("parquet", RunError, "metadata in parquet files needs pyarrow"):
            import pyarrow
            import pyarrow.parquet
        try:
            self._file = pyarrow.parquet.ParquetFile(path)
        except (pyarrow.ArrowException, OSError) as error:
            found = f"{path}, which cannot be read ({error})"
            raise ConfigError(_WHERE, found, "a parquet file") from None
        self._group = functools.lru_cache(64)(self._file.read_row_group)
        meta = self._file.metadata
        sizes = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
        self._starts = np.cumsum([0, *sizes])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def row(self, row: int) -> dict[str, Any]:
        group = int(np.searchsorted(self._starts, row, "right")) - 1
        return self._group(group).slice(row - int(self._starts[group]), 1).to_pylist()[0]


class Query(NamedTuple):
    """What is searched for, a text or a picture."""

    title: str
    embedding: Float[np.ndarray, " d"]
    picture: UInt8[np.ndarray, "h w 3"] | None = None


def queries(model: Model, texts: Sequence[str], images: Sequence[str]) -> list[Query]:
    """The queries of texts and of picture files. Raises `DataError` for a file that is no
    picture."""
    found = []
    if texts:
        found += [Query(text, x) for text, x in zip(texts, model.encode_text(texts))]
    if images:
        embedded = model.encode_image(list(images))
        for file, x in zip(images, embedded):
            pixels = pictures.decode(Example(reading.read_bytes(file, 1 << 28), (), 0, file))
            found.append(Query(file, x, pixels))
    return found
