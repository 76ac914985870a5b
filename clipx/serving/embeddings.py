"""A data set's pictures and captions as a model sees them, in the layout of clip-retrieval:

    img_emb/img_emb_0.npy        float16 [rows, width], of length 1: the pictures
    text_emb/text_emb_0.npy      the same of each row's first caption; only if rows have captions
    metadata/metadata_0.parquet  row (in the source), key, image_path, caption
    embeddings_0.json            what made them

Row i of the arrays and of the table is one row of the data set. Rows that cannot be used have no
row, and `quarantine_0.jsonl` names them. With several shards, the files of shard 3 end in 3.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from clipx.config import reading, secrets
from clipx.data import pictures
from clipx.data.base import Example, Source, fingerprint
from clipx.data.config import TIMEOUT
from clipx.data.quarantine import Quarantine
from clipx.data.reading import patiently
from clipx.data.row_writer import Rows, RowWriter
from clipx.data.threads import in_order, progress_bar
from clipx.errors import BadSample, ConfigError, Interrupted, RunError, optional
from clipx.serving.model import Model

_LOOK = 100  # rows that are looked at for captions
_CHUNK = 65_536  # rows of the metadata that are written at a time
_IMAGE, _TEXT, _META, _ENDS = "img_emb.npy", "text_emb.npy", "metadata.npy", "ends.npy"


class Shard(NamedTuple):
    """One of several parts of a data set's rows."""

    number: int = 0
    of: int = 1

    def rows(self, total: int) -> range:
        """The rows of this part."""
        return range(total * self.number // self.of, total * (self.number + 1) // self.of)

    def name(self, stem: str, ending: str) -> str:
        """The name of a file, whose number has the digits of the last one."""
        return f"{stem}_{self.number:0{len(str(self.of - 1))}d}{ending}"


class _Row(NamedTuple):
    """What is embedded of a row."""

    pixels: UInt8[np.ndarray, "h w 3"]
    caption: str
    about: dict[str, Any]  # of the metadata


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """The embeddings of a source by a model, in a folder.

    section: the source's config section, with which a search opens it again. stop: asked after each
    batch. tell: gets what to print.
    """

    model: Model
    path: str  # of the model
    source: Source
    section: Mapping[str, Any]
    folder: pathlib.Path
    shard: Shard = Shard()
    stop: Callable[[], bool] = lambda: False
    tell: Callable[[str], None] = lambda line: None

    @functools.cached_property
    def about(self) -> dict[str, Any]:
        """What identifies the embeddings."""
        return {
            "model": self.path,
            "step": self.model.step,
            "weights": self.model.digest,
            "width": self.model.width,
            "data": secrets.cut_all(dict(self.section)),
            "rows": len(self.source),
            "fingerprint": fingerprint(self.source),
            "captions": self._captions,
            "shard": list(self.shard),
        }

    @functools.cached_property
    def _captions(self) -> bool:
        """Whether the rows have captions, by a look at the first ones."""
        for row in self._rows[:_LOOK]:
            with contextlib.suppress(BadSample):
                return bool(self.source.glance(row).texts)
        return False

    @functools.cached_property
    def _rows(self) -> range:
        return self.shard.rows(len(self.source))

    @property
    def _aside(self) -> pathlib.Path:
        """Where the arrays lie until they are complete."""
        return self.folder / self.shard.name(".unfinished", "")

    def write(self) -> int:
        """Writes the embeddings, from where an interrupted call has stopped. Returns how many rows
        the folder has of this shard. Complete ones of the same model and data are kept.

        Raises `ConfigError` for a folder with others, `Interrupted` if asked to stop, and
        `RunError` for embeddings that are not finite and if no row can be used.
        """
        if (found := _read(self.folder / self.shard.name("embeddings", ".json"))) is not None:
            if {key: found.get(key) for key in self.about} != json.loads(json.dumps(self.about)):
                other = next(key for key, x in self.about.items() if found.get(key) != x)
                raise ConfigError(
                    "--out",
                    f"{self.folder}, with embeddings of another {other}: {found.get(other)!r}",
                    "a new folder, or that of the same model and data",
                    "--overwrite",
                )
            self.tell(f"{self.folder}: already there, {found['written']:,} rows")
            return found["written"]
        _parquet()  # now, not once all rows are embedded
        started, bad = time.perf_counter(), 0
        self._aside.mkdir(parents=True, exist_ok=True)
        file = self._aside / "embeddings.json"
        if not file.exists():  # else only the moving is left
            with RowWriter(file, self._arrays(), self.about) as writer:
                if first := writer.done:
                    self.tell(f"going on after {first:,} of {len(self._rows):,} rows")
                with progress_bar(len(self._rows), "embedding") as shown:
                    shown.update(first)
                    for done, block, faults in self._blocks(first, writer.written[_META]):
                        writer.write(done, block)
                        bad += faults
                        shown.update(done - shown.n)
                        if done < len(self._rows) and self.stop():
                            raise Interrupted
                if not writer.written[_IMAGE]:
                    raise RunError(f"no row can be used; {self._quarantine_file} names them")
                writer.finish({**self.about, "written": writer.written[_IMAGE]})
        written = self._place()
        seconds = time.perf_counter() - started
        named = f"; {bad:,} bad row(s) left out, named in {self._quarantine_file}" * bool(bad)
        self.tell(f"{written:,} rows in {seconds:,.1f} s, in {self.folder}{named}")
        return written

    def _arrays(self) -> dict[str, Rows]:
        """What each unfinished file holds. The metadata is the bytes of lines of JSON, whose ends
        are counted beside: a table cannot be continued."""
        width = (self.model.width,)
        arrays = {_IMAGE: Rows(np.float16, width), _META: Rows(np.uint8), _ENDS: Rows(np.int64)}
        return arrays | ({_TEXT: Rows(np.float16, width)} if self._captions else {})

    def _blocks(self, first: int, end: int) -> Iterator[tuple[int, dict[str, np.ndarray], int]]:
        """(rows done, new rows of each file, bad rows among them), a batch at a time. end: bytes of
        metadata so far."""
        size = self.model.batch_size
        loaded = in_order(lambda i: self._load(self._rows[i + first]), len(self._rows) - first)
        for start in range(first, len(self._rows), size):
            block = list(itertools.islice(loaded, size))
            good = [row for row in block if isinstance(row, _Row)]
            for row, fault in zip(self._rows[start:], block):
                if isinstance(fault, BadSample):
                    self._report(row, fault)
            lines = [json.dumps(row.about, ensure_ascii=False).encode() for row in good]
            ends = end + np.cumsum([len(line) for line in lines], dtype=np.int64)
            end = int(ends[-1]) if lines else end
            arrays = {_META: np.frombuffer(b"".join(lines), np.uint8), _ENDS: ends}
            if good:
                arrays |= self._encoded(good)
            yield start + len(block), arrays, len(block) - len(good)

    def _encoded(self, rows: list[_Row]) -> dict[str, np.ndarray]:
        arrays = {_IMAGE: self.model.encode_pixels(np.stack([row.pixels for row in rows]))}
        if self._captions:  # a row without one has zeros, which no query is near to
            arrays[_TEXT] = self.model.encode_text([row.caption for row in rows])
            arrays[_TEXT][[not row.caption for row in rows]] = 0
        for name, x in arrays.items():
            if not np.isfinite(x).all():
                raise RunError(f"{name} has NaN or infinity: look at the weights of {self.path}")
        return {name: x.astype(np.float16) for name, x in arrays.items()}

    def _load(self, row: int) -> _Row | BadSample:
        try:
            example = example_of(self.source, row)
            limits, side = self.source.limits, self.model.image_size
            pixels = pictures.evaluation(example, side, limits, self.model.framing)
        except BadSample as error:
            return error
        about = {"row": row, "key": example.key, "image_path": self._file(row)}
        caption = example.texts[0] if example.texts else ""
        return _Row(pixels, caption, {**about, "caption": caption})

    @functools.cached_property
    def _file(self) -> Callable[[int], str]:
        """The path of a row's picture; "" if it lies in a file with others."""
        return getattr(self.source, "file", lambda row: "")

    @property
    def _quarantine_file(self) -> pathlib.Path:
        return self.folder / self.shard.name("quarantine", ".jsonl")

    @functools.cached_property
    def _quarantine(self) -> Quarantine:
        return Quarantine(self._quarantine_file)

    def _report(self, row: int, error: BadSample) -> None:
        fault = {"row": row, "key": error.key, "reason": error.reason}
        for reason in self._quarantine.add(0, [fault]):
            self.tell(f"bad row, left out: {reason}")

    def _place(self) -> int:
        """Moves the complete arrays to their places, and writes the table. Returns the rows."""
        about = _read(self._aside / "embeddings.json") or {}
        names = {_IMAGE: "img_emb", **({_TEXT: "text_emb"} if self._captions else {})}
        for name, folder in names.items():
            (self.folder / folder).mkdir(exist_ok=True)
            if (self._aside / name).exists():
                (self._aside / name).replace(self.folder / folder / self.shard.name(folder, ".npy"))
        (self.folder / "metadata").mkdir(exist_ok=True)
        table = self.folder / "metadata" / self.shard.name("metadata", ".parquet")
        _write_table(self._aside, table)
        final = self.folder / self.shard.name("embeddings", ".json")
        (self._aside / "embeddings.json").replace(final)
        for file in self._aside.iterdir():
            file.unlink()
        self._aside.rmdir()
        return about["written"]


def _parquet() -> Any:
    """The module pyarrow, with its submodule parquet. Raises `RunError` if it is not installed."""
    with optional("parquet", RunError, "metadata in parquet files needs pyarrow"):
        import pyarrow
        import pyarrow.parquet
    return pyarrow


def _write_table(aside: pathlib.Path, file: pathlib.Path) -> None:
    """The unfinished metadata as a parquet file."""
    pyarrow = _parquet()
    text, ends = (np.load(aside / name, mmap_mode="r") for name in (_META, _ENDS))
    fields = {"row": pyarrow.int64(), "key": pyarrow.string(), "image_path": pyarrow.string()}
    schema = pyarrow.schema({**fields, "caption": pyarrow.string()})
    part = file.with_name(f".{file.name}.part")
    with pyarrow.parquet.ParquetWriter(part, schema) as writer:
        for start in range(0, len(ends), _CHUNK):
            stops = np.asarray(ends[start : start + _CHUNK])
            starts = np.append(ends[start - 1] if start else 0, stops[:-1])
            lines = [bytes(text[a:b]) for a, b in zip(starts, stops)]
            rows = [reading.parse_json(line, dict[str, Any]) for line in lines]
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))
    part.replace(file)


def _read(file: pathlib.Path) -> dict[str, Any] | None:
    """The JSON object in a file; None without the file, or for a damaged one."""
    try:
        return reading.read_json(file, dict[str, Any])
    except (OSError, ValueError):
        return None


def example_of(source: Source, row: int) -> Example:
    """The row of a source, read with patience. Raises `BadSample`."""
    return patiently(lambda: source[row], TIMEOUT)
