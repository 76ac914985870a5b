"""Class folders of pictures, on a disk or in one tar: sets to evaluate on."""

from __future__ import annotations

import collections
import dataclasses
import difflib
import json
import os
import posixpath
import tarfile
from collections.abc import Iterator

import numpy as np

from clipx.data.base import Example, Source, expand_user
from clipx.data.storage import read
from clipx.data.tables.formats import PICTURE_ENDS
from clipx.errors import BadSample, DataError

_SHOWN = 5  # names, in an error


@dataclasses.dataclass(frozen=True)
class Folder(Source):
    """Pictures with the folder they lie in as their class, sorted by class and name; no captions.

    Folders in which all pictures lie are passed over: `val/<class>/<picture>` and
    `<class>/images/<picture>` are as good as `<class>/<picture>`. What begins with a dot is left
    out. A plain tar is read where it lies. `DataError` when opened: nothing there, a truncated tar,
    pictures beside the class folders, a class folder without pictures, one name for two classes.
    """

    path: str  # a folder, or a tar of it
    names: str = ""  # a json file {folder: name of the class}; '': the folder's, _ as a space

    def __post_init__(self):
        path = expand_user(self.path)
        members = _in_folder(path) if os.path.isdir(path) else _in_tar(path)
        pictures = [name for name in members if name.lower().endswith(PICTURE_ENDS)]
        top = _top(path, members, pictures)
        folders = sorted({posixpath.dirname(name) for name in pictures})
        classes = _class_folders(path, top, folders)
        order = sorted(classes.values())
        places = {name: i for i, name in enumerate(order)}
        labels = {folder: places[name] for folder, name in classes.items()}
        rows = sorted((labels[posixpath.dirname(n)], posixpath.basename(n), n) for n in pictures)
        names = [os.fsencode(name) for _, _, name in rows]
        for name, value in (
            ("classes", _readable(self.names, order)),
            ("_file", path),
            ("_tar", not os.path.isdir(path)),
            ("_top", len(top)),
            ("_names", b"".join(names)),
            ("_ends", np.cumsum([len(name) for name in names], dtype=np.int64)),
            ("_labels", np.array([label for label, *_ in rows], np.int32)),
            ("_places", np.array([members[name] for *_, name in rows], np.int64)),  # offset, size
        ):
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, row: int) -> Example:
        if not 0 <= row < len(self):
            raise IndexError(row)
        key = self._key(row)
        try:
            if self._tar:
                (image,) = read(self._file, [tuple(self._places[row].tolist())])
            else:
                with open(os.path.join(self._file, self._name(row)), "rb") as file:
                    image = file.read()
        except OSError as error:
            raise BadSample(key, f"cannot be read in {self._file} ({error.strerror})") from None
        if not image:
            raise BadSample(key, "the picture has no bytes")
        return Example(image, (), row, key, int(self._labels[row]))

    def keys(self) -> Iterator[str]:
        return map(self._key, range(len(self)))

    def _name(self, row: int) -> str:
        return os.fsdecode(self._names[self._ends[row - 1] if row else 0 : self._ends[row]])

    def _key(self, row: int) -> str:
        name = self._name(row)[self._top :]
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _in_folder(path: str) -> dict[str, tuple[int, int]]:
    """What lies under a folder, by relative name; a folder's ends with a slash."""

    def refuse(error: OSError):
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})")

    found = {}
    for folder, folders, files in os.walk(path, onerror=refuse, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = os.path.relpath(folder, path).replace(os.sep, "/")
        prefix = "" if inside == "." else f"{inside}/"
        for name in (*(f"{name}/" for name in folders), *files):
            if not name.startswith("."):
                found[prefix + name] = (0, 0)
    return found


def _in_tar(path: str) -> dict[str, tuple[int, int]]:
    """Offset and size of what lies in a tar, by name; a folder's ends with a slash."""
    found, last, whole = {}, "none", True
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            size = os.fstat(file.fileno()).st_size
            try:
                while (member := tar.next()) is not None:
                    tar.members = []  # it would keep them all
                    name = posixpath.normpath(member.name) + "/" * member.isdir()
                    if any(part.startswith(".") for part in name.split("/")):
                        continue
                    if member.isfile() or member.isdir():
                        found[name] = (member.offset_data, member.size)
                    elif name.lower().endswith(PICTURE_ENDS):
                        raise DataError(
                            f"{path}: {name} is a link, expected the picture; pack the folder "
                            "again with tar --dereference --hard-dereference"
                        )
                    if member.offset_data + member.size <= size:
                        last = name
            except tarfile.ReadError:
                whole = False
            # tarfile takes a cut header for the end; the real end is a block of zeros
            file.seek(tar.offset)
            whole = whole and file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except tarfile.ReadError:
        reason = "an empty file" if not os.path.getsize(path) else "no plain tar"
        raise DataError(f"{path}: {reason}, expected a folder or an uncompressed tar") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}){_near(path)}") from None
    if not whole:
        raise DataError(
            f"{path}: truncated or damaged; the last whole member is {last}; copy it again"
        )
    return found


def _near(path: str) -> str:
    folder, name = os.path.split(os.path.abspath(path))
    there = os.listdir(folder) if os.path.isdir(folder) else []
    near = difflib.get_close_matches(name, there, n=3, cutoff=0.5)
    return f"; nearest in {folder}: {', '.join(near)}" if near else ""


def _top(path: str, members: dict[str, tuple[int, int]], pictures: list[str]) -> str:
    """The folder, with its slash, in which all class folders lie. Raises `DataError` for pictures
    that lie in no class folder and for class folders without pictures."""
    if not pictures:
        files = (name for name in members if not name.endswith("/"))
        ends = sorted({os.path.splitext(name)[1] or name for name in files})[:_SHOWN]
        found = ", ".join(ends) or "nothing"
        raise DataError(f"{path}: no pictures; found {found}, expected {', '.join(PICTURE_ENDS)}")
    folders = {posixpath.dirname(name) for name in pictures}
    if len(folders) == 1:
        (folder,) = folders
        raise DataError(
            f"{path}: all {len(pictures)} pictures lie in one folder"
            f"{f', {folder}' if folder else ''}, expected a folder for each class"
        )
    common = posixpath.commonpath(folders)
    if common in folders:
        beside = [name for name in pictures if posixpath.dirname(name) == common]
        raise DataError(
            f"{path}: {len(beside)} pictures, such as {beside[0]}, lie beside the class folders, "
            "expected each picture in the folder of its class"
        )
    filled = {"", *folders}
    for folder in folders:
        while folder := posixpath.dirname(folder):
            filled.add(folder)
    empty = sorted(n[:-1] for n in members if n.endswith("/") and n[:-1] not in filled)
    if empty:
        raise DataError(
            f"{path}: {len(empty)} class folders have no pictures: {', '.join(empty[:_SHOWN])}"
            f"{'...' * (len(empty) > _SHOWN)}; fill or remove them"
        )
    return f"{common}/" if common else ""


def _class_folders(path: str, top: str, folders: list[str]) -> dict[str, str]:
    """The name of the class of each folder: its last part that is not the same for all."""
    parts = {folder: folder[len(top) :].split("/") for folder in folders}
    while len({part[-1] for part in parts.values()}) == 1:
        parts = {folder: part[:-1] for folder, part in parts.items()}
    names = {folder: part[-1] for folder, part in parts.items()}
    twice = [n for n, count in collections.Counter(names.values()).items() if count > 1]
    if twice:
        both = [folder for folder, name in names.items() if name == twice[0]]
        raise DataError(
            f"{path}: {len(twice)} classes lie in several folders, such as {both[0]} and "
            f"{both[1]}; expected one folder a class; take one of the upper folders alone"
        )
    return names


def _readable(names: str, folders: list[str]) -> tuple[str, ...]:
    """The name of each class folder, from a json file where one is given."""
    if not names:
        return tuple(folder.replace("_", " ") for folder in folders)
    path = expand_user(names)
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except OSError as error:
        raise DataError(f"names={names}: cannot be read ({error.strerror}){_near(path)}") from None
    except ValueError as error:
        raise DataError(f"names={names}: not a json file ({error})") from None
    if not isinstance(found, dict) or not all(isinstance(n, str) for n in found.values()):
        raise DataError(f"names={names}: expected an object {{folder: name of the class}}")
    missing = [folder for folder in folders if folder not in found]
    if missing:
        raise DataError(
            f"names={names}: no name for {len(missing)} of {len(folders)} class folders: "
            f"{', '.join(missing[:_SHOWN])}{'...' * (len(missing) > _SHOWN)}"
        )
    return tuple(found[folder] for folder in folders)
