"""Reads json: one object per line, or one document that holds all rows."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from clipx.data.base import Skipped
from clipx.data.tables.cells import has_picture_end
from clipx.data.tables.lines import lines, text
from clipx.errors import DataError

_LOOKED_AT = 100  # rows from which to infer the columns
_SHOWN = 3  # entries to name
_EXPECTED = (
    "expected one JSON object per line, a list of objects, COCO's images and annotations, or "
    "{name of a picture: captions}"
)


class JsonLines:
    """A file with one JSON object per line. `columns` are the keys of the first hundred."""

    unit = "line"

    def __init__(self, path: str):
        self.path = path
        start = [value for _, value in itertools.islice(self._objects(), _LOOKED_AT)]
        self.columns = list(dict.fromkeys(itertools.chain.from_iterable(start)))
        if not start:
            raise DataError(f"{path}: an empty file, expected one JSON object per line")

    def rows(self, names: Sequence[str]) -> Iterator[tuple[int, list[Any]]]:
        for line, value in self._objects():
            yield line, [value.get(name) for name in names]

    def skipped(self) -> list[Skipped]:
        return []

    def _objects(self) -> Iterator[tuple[int, dict]]:
        for line, row in enumerate(lines(self.path), 1):
            if not row.strip():
                continue
            try:
                value = json.loads(row)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{self.path}: line {line} is not JSON ({error})") from None
            if not isinstance(value, dict):
                kind = type(value).__name__
                raise DataError(f"{self.path}: line {line} is a {kind}, expected a JSON object")
            yield line, value


class Json:
    """A file that is one JSON document, on any number of lines. Its rows are the objects of a list,
    the annotations of COCO with the file names of their images, or the items of a dict.
    """

    unit = "entry"

    def __init__(self, path: str, document: Any):
        self.path, self._skipped = path, []
        self._rows = self._find(document)
        if not self._rows:
            raise DataError(f"{path}: no rows; {_EXPECTED}")
        self.columns = list(dict.fromkeys(itertools.chain.from_iterable(self._rows[:_LOOKED_AT])))

    def rows(self, names: Sequence[str]) -> Iterator[tuple[int, list[Any]]]:
        for number, value in enumerate(self._rows, 1):
            yield number, [value.get(name) for name in names]

    def skipped(self) -> list[Skipped]:
        """The entries that are part of no row."""
        return self._skipped

    def _find(self, document: Any) -> list[dict[str, Any]]:
        if isinstance(document, list):
            return self._objects(document)
        if not isinstance(document, dict):
            raise DataError(f"{self.path}: a {type(document).__name__}; {_EXPECTED}")
        images, notes = document.get("images"), document.get("annotations")
        if isinstance(images, list) and isinstance(notes, list):
            return self._joined(images, notes)
        lists = [v for v in document.values() if isinstance(v, list) and _are_objects(v)]
        if len(lists) == 1:
            return self._objects(lists[0])
        if lists:
            raise DataError(
                f"{self.path}: {len(lists)} lists of objects ("
                f"{', '.join(k for k, v in document.items() if v in lists)}); {_EXPECTED}"
            )
        return self._columns(document) or self._by_name(document)

    def _objects(self, rows: list[Any]) -> list[dict[str, Any]]:
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict):
                kind = type(row).__name__
                raise DataError(f"{self.path}: entry {number} is a {kind}, expected an object")
        return [_with_folder(row) for row in rows]

    def _joined(self, images: list[Any], notes: list[Any]) -> list[dict[str, Any]]:
        """The annotations, each with the name of its image, in their order."""
        named = {
            image["id"]: image
            for image in self._objects(images)
            if isinstance(image.get("id"), (int, str))
        }
        rows, lost, seen = [], [], set()
        for number, note in enumerate(self._objects(notes), 1):
            image = named.get(note.get("image_id")) if _hashable(note.get("image_id")) else None
            name = image and image.get("file_name", image.get("filename"))
            if image is None or not name:
                lost.append(f"entry {number}")
                continue
            seen.add(image["id"])
            rows.append({"image": name, **{k: v for k, v in note.items() if k != "image"}})
        alone = [
            str(image.get("file_name", key)) for key, image in named.items() if key not in seen
        ]
        for reason, names in (
            ("annotations of no image", lost),
            ("images without an annotation", alone),
        ):
            if names:
                self._skipped.append(Skipped(reason, len(names), tuple(names[:_SHOWN])))
        return rows

    def _columns(self, document: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The rows of a dict of columns, as pandas writes it: {column: {row: cell} or [cells]}."""
        columns = list(document.values())
        if len(columns) < 2:
            return []
        if all(isinstance(column, dict) for column in columns):
            labels = columns[0].keys()  # pandas numbers its rows
            if not all(map(str.isdigit, labels)) or any(c.keys() != labels for c in columns):
                return []
            return [{name: document[name][key] for name in document} for key in columns[0]]
        if all(isinstance(column, list) for column in columns):
            plain = all(type(cell) in (str, int, float) for column in columns for cell in column)
            # {picture: captions} also has lists; its keys are names of files
            if (
                plain
                and len({len(c) for c in columns}) == 1
                and not any("." in k for k in document)
            ):
                return [dict(zip(document, cells)) for cells in zip(*columns)]
        return []

    def _by_name(self, document: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The rows of {name of a picture: its captions, or an object that has them}."""
        if all(isinstance(value, dict) for value in document.values()):
            return [{"image": name, **value} for name, value in document.items()]
        for value in document.values():
            texts = value if isinstance(value, list) else [value]
            if not all(isinstance(each, str) for each in texts):
                raise DataError(
                    f"{self.path}: one object with the keys {', '.join(list(document)[:8])}; "
                    f"{_EXPECTED}"
                )
        return [{"image": name, "caption": value} for name, value in document.items()]


def open_json(path: str) -> JsonLines | Json:
    """The reader for a json file: by lines where its first line is an object of its own."""
    start = list(itertools.islice((line for line in lines(path) if line.strip()), 2))
    try:
        first = json.loads(start[0]) if start else None
    except (ValueError, RecursionError):
        first = None
    if isinstance(first, dict) and (len(start) > 1 or _is_record(first)):
        return JsonLines(path)
    try:
        whole = first is not None and len(start) == 1
        return Json(path, first if whole else json.loads(text(path)))
    except (ValueError, RecursionError) as error:
        if start and start[0].strip() in ("{", "[") or isinstance(first, list):
            raise DataError(f"{path}: not JSON ({error})") from None
        return JsonLines(path)  # its error names the line


def _is_record(value: Mapping[str, Any]) -> bool:
    """Whether an object is one row: not a document with lists of objects, nor {picture: texts}."""
    if any(isinstance(v, list) and _are_objects(v) for v in value.values()):
        return any(isinstance(v, str) and has_picture_end(v) for v in value.values())
    if value and all(isinstance(v, dict) for v in value.values()):
        return False
    lists = all(isinstance(v, list) for v in value.values())
    return not (lists or any(os.path.splitext(name)[1] for name in value))


def _are_objects(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, dict) for value in values)


def _hashable(value: Any) -> bool:
    return isinstance(value, (int, str))


def _with_folder(row: dict[str, Any]) -> dict[str, Any]:
    """A row of Karpathy's splits with `filename` as a path: there `filepath` is its folder."""
    folder, name = row.get("filepath"), row.get("filename")
    if isinstance(folder, str) and isinstance(name, str) and isinstance(row.get("sentences"), list):
        return row | {"filename": os.path.join(folder, name), "filepath": ""}
    return row
