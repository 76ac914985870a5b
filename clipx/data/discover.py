"""Finds what lies at a path: the source that reads it, and its settings (`data.source=auto`)."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from clipx.data.base import expand_user
from clipx.data.contents import (
    TRAIN,
    Folder,
    class_folders_in,
    others,
    read_json,
    split_of,
    written,
)
from clipx.data.storage import expand, is_remote
from clipx.data.tables import inference, paths
from clipx.data.tables.cells import strings
from clipx.data.tables.formats import ENDS, File, open_table
from clipx.data.tables.separators import separator_of
from clipx.errors import DataError, data_flag, listed

_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # of imagefolder
_MOST_TABLES = 12  # tables to open
_SHOWN = 6  # things that an error lists
_READ = (
    "tar shards, a table (csv, tsv, json, jsonl, parquet, arrow) that names or holds pictures, "
    "pictures with a .txt or .json of the same name, or, to evaluate on, pictures in one folder "
    "for each class"
)
_OF_TABLE = ("image", "captions", "separator", "quotes", "root", "where", "label")


class Found(NamedTuple):
    """What lies at a path."""

    source: str  # the source that reads it
    values: dict[str, Any]  # settings that were found, `path` among them
    what: str  # in words

    def line(self, where: str) -> str:
        """What a run prints about it."""
        values = "".join(f", {where}.{key}={value}" for key, value in self.values.items())
        return f"{where}.source=auto: {self.what}; {where}.source={self.source}{values}"


def discover(
    path: str | Sequence[str], given: Mapping[str, Any] | None = None, wanted: Sequence[str] = TRAIN
) -> Found:
    """What lies at `path`: a file, a folder, a glob or a brace range, or several of them.

    given: the settings that the config has beside the path. wanted: the names of the split to take
    where a folder or a column has several.

    Raises `DataError` if nothing does that clipx reads, which lists what there is, and if several
    things do.
    """
    look = _Look(dict(given or {}), tuple(wanted), {})
    if isinstance(path, str):
        folder = expand_user(path)
        if not is_remote(path) and os.path.isdir(folder):
            return look.folder(path, folder)
    first = path if isinstance(path, str) else next(iter(path), "")
    if is_remote(first):
        return look.file(path, first)
    files = list(itertools.chain.from_iterable(expand(p) for p in _several(path)))
    if not files:
        raise DataError(f"data path: nothing given, expected {_READ}")
    if os.path.isdir(files[0].path):
        raise DataError(
            f"{first}: {len(files)} folders, such as {files[0].path}; expected one folder: set "
            f"{data_flag('path', os.path.dirname(files[0].path))}"
        )
    return look.file(path, files[0].path)


class _Look(NamedTuple):
    """A look at paths, with the settings that are given and the split that is wanted."""

    given: dict[str, Any]
    wanted: tuple[str, ...]
    opened: dict[str, File]  # tables by path: opening one may read all of it

    def file(self, path: str | Sequence[str], first: str) -> Found:
        """What a file is, or several like it. `first`: the first of them."""
        name, value = first.lower(), path if isinstance(path, str) else list(path)
        if name.endswith(".tar"):
            if not is_remote(first) and class_folders_in(first):
                return Found("folder", {"path": value}, f"a tar of class folders, {first}")
            return Found("webdataset", {"path": value}, f"tar shards, such as {first}")
        if name.endswith(ENDS):
            split, note = ({}, "") if is_remote(first) else self._split_column(first)
            return Found("table", {"path": value, **split}, f"a table, {first}{note}")
        raise DataError(f"{first}: a file that no source reads, expected {_READ}")

    def folder(self, path: str, full: str) -> Found:
        """What a folder holds. `path`: as it is written in the config."""
        if saved := self._saved_to_disk(path, full):
            return saved
        inside = Folder.of(full)
        found = [*self._tars(path, inside), *self._tables(path, inside)]
        if pairs := inside.pairs():
            words = f"{pairs:,} pictures with a .txt or .json of the same name, in {full}"
            found.append(Found("files", {"path": path}, words))
        if len(found) == 1:
            return found[0]
        if found:
            raise DataError(_choose(full, found))
        splits = [name for name in inside.folders if split_of(name)]
        name = self._wanted_of(splits) or (inside.folders[0] if len(inside.folders) == 1 else "")
        if name:
            deeper = self.folder(os.path.join(path, name), os.path.join(full, name))
            if splits:
                return deeper._replace(what=f"{deeper.what} ({others(name, splits)})")
            return deeper._replace(values={"path": path}) if deeper.source == "folder" else deeper
        if inside.class_folders():
            return Found("folder", {"path": path}, f"pictures in class folders, in {full}")
        self._explain(inside)
        raise DataError(f"{full}: {inside.describe()}; expected {_READ}")

    def _wanted_of(self, names: Sequence[str]) -> str:
        """The first of `names` with the wanted split; '' if none has it."""
        for split in self.wanted:
            for name in names:
                if split_of(name) == split:
                    return name
        return ""

    def _of_split(self, names: Sequence[str]) -> tuple[list[str], str]:
        """(the files of the wanted split, a note about the others); all of them without splits."""
        splits = [split_of(name) for name in names]
        wanted = next((split for split in self.wanted if split in splits), None)
        if wanted is None or len(set(splits)) == 1:
            return list(names), ""
        rest = sorted({split or "other files" for split in splits if split != wanted})
        kept = [name for name, split in zip(names, splits) if split == wanted]
        return kept, f" ({wanted}; not taken: {', '.join(rest)})"

    def _tars(self, path: str, inside: Folder) -> Iterator[Found]:
        """The tar shards of a folder, or of the folders in it."""
        for depth in (0, 1):
            names = [n for n in inside.files if n.count(os.sep) == depth]
            names = [n for n in names if n.lower().endswith(".tar")]
            if not names:
                continue
            kept, note = self._of_split(names)
            first = os.path.join(inside.root, kept[0])
            if class_folders_in(first):
                value, rest = os.path.join(path, kept[0]), ", ".join(kept[1:_SHOWN])
                what = f"a tar of class folders, {first}" + f" (not taken: {rest})" * bool(rest)
                yield Found("folder", {"path": value}, what)
                return
            what = f"{len(kept):,} tar shard{'s' * (len(kept) > 1)} in {inside.root}{note}"
            yield Found("webdataset", {"path": written(path, kept, names)}, what)
            return

    def _saved_to_disk(self, path: str, full: str) -> Found | None:
        """A data set that Hugging Face's `save_to_disk` wrote, or one of its splits."""
        splits = read_json(os.path.join(full, "dataset_dict.json"))
        if isinstance(splits, dict) and isinstance(splits.get("splits"), list):
            names = [str(name) for name in splits["splits"]]
            name = self._wanted_of(names) or next(iter(names), "")
            found = self._saved_to_disk(os.path.join(path, name), os.path.join(full, name))
            return found and found._replace(what=f"{found.what} ({others(name, names)})")
        state = read_json(os.path.join(full, "state.json"))
        if not isinstance(state, dict) or not isinstance(state.get("_data_files"), list):
            return None
        files = [os.path.join(path, str(part.get("filename"))) for part in state["_data_files"]]
        value = files[0] if len(files) == 1 else files
        return Found("table", {"path": value}, f"a data set saved to disk, {full}")

    def _tables(self, path: str, inside: Folder) -> Iterator[Found]:
        """The tables of a folder that name or hold pictures, or those of its usual subfolders."""
        for folder in ("", "data", "annotations"):
            names = [n for n in inside.files if os.path.dirname(n) == folder and inside.table(n)]
            metadata = [name for name in names if os.path.basename(name).lower() in _METADATA]
            taken = metadata or names
            rest = [name for name in names if name not in taken]
            note = f" (not taken: {listed(rest, _SHOWN)})" * bool(rest)
            found = [*self._columnar(path, inside, taken), *self._texts(path, inside, taken)]
            yield from (one._replace(what=one.what + note) for one in found)
            if found:
                return

    def _columnar(self, path: str, inside: Folder, names: list[str]) -> Iterator[Found]:
        """The parquet or arrow files of a folder, together one table."""
        for end in (".parquet", ".arrow"):
            parts = [name for name in names if name.lower().endswith(end)]
            kept, note = self._of_split(parts)
            if kept and self._wrong(os.path.join(inside.root, kept[0])) is None:
                split, more = self._split_column(os.path.join(inside.root, kept[0]))
                what = f"{len(kept):,} {end[1:]} file(s) in {inside.root}{note}{more}"
                yield Found("table", {"path": written(path, kept, names), **split}, what)

    def _texts(self, path: str, inside: Folder, names: list[str]) -> Iterator[Found]:
        """The tables of a folder that are text, each on its own."""
        texts = [n for n in names if not n.lower().endswith((".parquet", ".arrow"))]
        likeliest = _likeliest(texts)
        kept, note = self._of_split(likeliest)
        if rest := [name for name in texts if name not in likeliest]:
            note += f" (not looked at: {listed(rest, _SHOWN)})"
        kept = kept[:_MOST_TABLES]
        fit = [name for name in kept if self._wrong(os.path.join(inside.root, name)) is None]
        if unfit := [name for name in kept if name not in fit]:
            note += f" (not taken: {listed(unfit, _SHOWN)})"
        for name in fit:
            found = self.file(os.path.join(path, name), os.path.join(inside.root, name))
            yield found._replace(what=found.what + note)

    def _open(self, path: str) -> File:
        """The reader of a table, opened once. Raises `DataError` for one that cannot be read."""
        if path not in self.opened:
            separator = separator_of(self.given.get("separator") or "")
            self.opened[path] = open_table(path, separator, self.given.get("quotes") or "")
        return self.opened[path]

    def _wrong(self, path: str) -> DataError | None:
        """What is wrong with a table; None if it names or holds pictures."""
        given = {key: self.given.get(key) or "" for key in _OF_TABLE}
        captions, column = given["captions"], given["where"].partition("=")[0].strip()
        try:
            file = self._open(path)
            layout = inference.layout(
                file,
                image=given["image"],
                captions=[captions] if isinstance(captions, str) and captions else captions,
                label=given["label"],
                where=column,
                root=given["root"],
            )
            if not layout.inside:
                cells = (row[0] for _, row in itertools.islice(file.rows([layout.image]), 100))
                named = [text for cell in cells for text in strings(cell) or () if text]
                paths.find(path, given["root"], named)
        except DataError as error:
            return error
        return None

    def _explain(self, inside: Folder) -> None:
        """Raises what is wrong with the likeliest table of a folder, if it has one."""
        for folder in ("", "data", "annotations"):
            names = [n for n in inside.files if os.path.dirname(n) == folder and inside.table(n)]
            for name in _likeliest(names)[:1]:
                if error := self._wrong(os.path.join(inside.root, name)):
                    raise error

    def _split_column(self, path: str) -> tuple[dict[str, str], str]:
        """(the `where` that takes the wanted split of a table, a note), if it has a column of
        splits."""
        if self.given.get("where"):
            return {}, ""
        with contextlib.suppress(DataError):
            file = self._open(path)
            columns = [name for name in file.columns if name.lower() == "split"]
            if len(columns) != 1:
                return {}, ""
            cells = (row[0] for _, row in file.rows(columns))
            values = dict.fromkeys(text for cell in cells for text in strings(cell) or ())
            wanted = next((v for w in self.wanted for v in values if v.lower() == w), None)
            if wanted is not None and len(values) > 1:
                return {"where": f"{columns[0]}={wanted}"}, f" ({others(wanted, list(values))})"
        return {}, ""


def _choose(folder: str, candidates: Sequence[Found]) -> str:
    """The message for a folder that holds several things."""
    choices = "; ".join(
        f"{found.what}: --config.data.source={found.source} {_path_flag(found.values['path'])}"
        for found in candidates[:_SHOWN]
    )
    return f"{folder}: {len(candidates)} things to read, expected one; set one of: {choices}"


def _path_flag(path: str | list[str]) -> str:
    return data_flag("path", path if isinstance(path, str) else json.dumps(path))


def _likeliest(names: Sequence[str]) -> list[str]:
    """The tables to open: those named for captions, if there are any, else all."""
    names = [name for name in names if not name.endswith(".lemma.token.txt")]  # of Flickr8k
    telling = re.compile(r"caption|\.token|^results\.csv$|metadata\.", re.IGNORECASE)
    return [n for n in names if telling.search(os.path.basename(n))] or names


def _several(path: str | Sequence[str]) -> Sequence[str]:
    return (path,) if isinstance(path, str) else path
