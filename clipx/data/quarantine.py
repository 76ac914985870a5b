"""The file of a run that lists its bad rows."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from typing import Any, TypedDict

from clipx.config import reading, secrets

_LARGEST = 1 << 30  # bytes; more than a run stops at bad rows


class _Row(TypedDict):
    row: int


class Quarantine:
    """Appends one JSON line with `step`, `row`, `key` and `reason` for each bad row.

    A row is listed once, even if the run restarts.
    """

    def __init__(self, path: str | os.PathLike):
        self._path = pathlib.Path(path)
        self._rows: set[int] = set()
        if self._path.exists():
            for line in reading.read_bytes(self._path, _LARGEST).splitlines():
                # a run that was killed may leave an incomplete last line
                with contextlib.suppress(ValueError):
                    self._rows.add(reading.parse_json(line, _Row)["row"])

    def add(self, step: int, rows: list[dict[str, Any]]) -> list[str]:
        """Records rows of a step: `row`, `key` and `reason` of each. Returns "key: reason" of each
        new row."""
        new = [row for row in rows if row["row"] not in self._rows]
        if new:
            with self._path.open("a", encoding="utf-8") as file:
                for row in map(secrets.cut_all, new):
                    file.write(json.dumps({"step": step, **row}, ensure_ascii=False) + "\n")
        self._rows.update(row["row"] for row in new)
        return [secrets.cut("{key}: {reason}".format(**row)) for row in new]
