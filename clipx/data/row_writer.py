"""Writes `.npy` arrays row by row, with a json file beside them, and goes on after an interruption.

Until they are complete, the arrays lie beside their places as `.NAME.part`, and the json file
`.NAME.json.part` says how many rows of each are written, and for what.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import numpy as np

from clipx.config import reading, secrets

_SECONDS = 2.0  # between two times at which what is written is made safe


class Rows(NamedTuple):
    """The rows of an array."""

    dtype: Any
    shape: tuple[int, ...] = ()  # of one row


class RowWriter:
    """Context that appends rows to arrays in the folder of `file`, whose json file is
    `file.with_suffix(".json")`.

    arrays: what each array holds, by its file name. They may have different numbers of rows.
    identity: what the arrays are made of. Parts of the same identity, as after an interruption, are
    continued: the caller goes on after the `done` rows of its own. keep: leave unfinished parts for
    that; False removes them.

    Attributes:
        done: rows of the caller's that are written.
        written: rows of each array.
    """

    def __init__(
        self,
        file: pathlib.Path,
        arrays: Mapping[str, Rows],
        identity: Mapping[str, Any] | None = None,
        *,
        keep: bool = True,
    ):
        self._json, self._keep = file.with_suffix(".json"), keep
        self._progress = _part(self._json)
        self._arrays, self._files = dict(arrays), {name: file.with_name(name) for name in arrays}
        # as JSON gives it back
        self._identity = json.loads(json.dumps(identity))
        self.written = dict.fromkeys(arrays, 0)
        self.done = 0
        self._committed, self._finished = time.monotonic(), False

    def __enter__(self) -> Self:
        self._resume()
        self._open = {}
        for name, file in self._files.items():
            part = _part(file)
            part.touch()
            out = self._open[name] = open(part, "r+b")
            out.write(self._header(name))
            out.truncate(out.tell() + self.written[name] * self._bytes(name))
            out.seek(0, os.SEEK_END)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._keep and not self._finished:
            # a full disk has raised its error already
            with contextlib.suppress(*[OSError] * (kind is not None)):
                self._commit()
        for out in self._open.values():
            with contextlib.suppress(*[OSError] * (kind is not None)):
                out.close()
        if not self._keep:
            self._remove()

    def write(self, done: int, blocks: Mapping[str, np.ndarray]) -> None:
        """Appends rows to the arrays. Afterwards `done` rows of the caller's are written. What was
        written more than some seconds ago survives the end of the process."""
        written = dict(self.written)
        for name, rows in blocks.items():
            self._open[name].write(np.ascontiguousarray(rows, self._arrays[name].dtype).data)
            written[name] += len(rows)
        self.done, self.written = done, written
        if self._keep and time.monotonic() - self._committed > _SECONDS:
            self._commit()

    def _commit(self) -> None:
        """Makes what is written so far what another call goes on after."""
        for out in self._open.values():
            out.flush()
            os.fsync(out.fileno())
        self._say({"identity": self._identity, "done": self.done, "written": self.written})
        self._committed = time.monotonic()

    def finish(self, about: Mapping[str, Any]) -> None:
        """Puts the arrays and the json file, with the contents `about`, in their places."""
        self._json.unlink(missing_ok=True)  # arrays without their json file are not accepted
        for name, file in self._files.items():
            with self._open[name] as out:
                out.seek(0)
                out.write(self._header(name))
                out.flush()
                os.fsync(out.fileno())
            _part(file).replace(file)
        self._say(about)
        self._progress.replace(self._json)
        self._finished = True

    def _resume(self) -> None:
        """Takes over the unfinished parts if they are of this identity and whole."""
        if not self._keep:
            return
        try:
            progress = reading.read_json(self._progress, dict[str, Any])
            written = {name: int(progress["written"][name]) for name in self._arrays}
            for name, file in self._files.items():
                whole = len(self._header(name)) + written[name] * self._bytes(name)
                if _part(file).stat().st_size < whole:
                    return
            if progress["identity"] == secrets.cut_all(self._identity):
                self.done, self.written = int(progress["done"]), written
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return  # none, or damaged: begin anew

    def _bytes(self, name: str) -> int:
        """Bytes of a row."""
        rows = self._arrays[name]
        return int(np.dtype(rows.dtype).itemsize * np.prod(rows.shape, dtype=np.int64))

    def _header(self, name: str) -> bytes:
        """The header of an array with the rows so far. Its length does not depend on them: NumPy
        leaves space for their number to grow."""
        rows, header = self._arrays[name], io.BytesIO()
        shape = (self.written[name], *rows.shape)
        values = {"descr": np.dtype(rows.dtype).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, values)
        return header.getvalue()

    def _say(self, contents: Mapping[str, Any]) -> None:
        """Writes the json file's part, atomically."""
        text = json.dumps(secrets.cut_all(contents), indent=1, ensure_ascii=False) + "\n"
        aside = self._progress.with_suffix(".new")
        aside.write_text(text, "utf-8")
        aside.replace(self._progress)

    def _remove(self) -> None:
        for file in (*self._files.values(), self._json):
            _part(file).unlink(missing_ok=True)


def _part(file: pathlib.Path) -> pathlib.Path:
    return file.with_name(f".{file.name}.part")
