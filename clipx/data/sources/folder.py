"""Pictures in one folder per class, on a disk or in one tar: data sets to evaluate on."""

from __future__ import annotations

import collections
import dataclasses
import difflib
import os
import posixpath
import tarfile
from collections.abc import Iterator
from typing import Literal

import numpy as np

from clipx.config import reading
from clipx.data import tars
from clipx.data.base import Account, Example, Guess, Source, expand_user, printable
from clipx.data.reading import read, read_file, stamps
from clipx.data.storage import Shard
from clipx.data.tables.cells import PICTURE_ENDS
from clipx.errors import BadSample, DataError

_SHOWN = 5  # names listed in an error


@dataclasses.dataclass(frozen=True)
class Folder(Source):
    """Pictures whose class is the folder they are in, sorted by class and file name; no captions.

    Path components that all pictures share do not count: `val/<class>/<picture>` and
    `<class>/images/<picture>` work like `<class>/<picture>`. Names that start with a dot are
    ignored. An uncompressed tar is read without unpacking it.

    Where class folders are inside other folders, `classes_from` says what a class is: the last
    "folder", or the "path". SUN397 and Places365 have a folder for each initial
    (`a/apartment_building/outdoor`): there it is the path below the initial, unless said otherwise.

    The constructor raises `DataError` if there are no pictures, if the tar is truncated, if
    pictures are beside the class folders, if a class folder has no pictures, and if two class
    folders have the same name.
    """

    path: str  # a folder, or a tar of one
    # a json file {folder: class name}; '': named like the folder, with blanks in place of _ and /
    names: str = ""
    # "folder": the last folder is the class; "path": all folders are, as in church/indoor; '': the
    # path if the outer folders are initials, else the last folder, which must then be unique
    classes_from: Literal["", "folder", "path"] = ""

    def __post_init__(self) -> None:
        self._initials: bool  # `classes_from` was guessed from folders of initials
        self._file: str
        self._tar: Shard | None  # None: a folder
        self._stamps: np.ndarray  # of each picture in a folder
        self._account: Account | None
        self._top: int  # length of the path components that all pictures share
        self._names: bytes  # the names of all rows, concatenated
        self._ends: np.ndarray  # the end of each name in `_names`
        self._labels: np.ndarray
        self._places: np.ndarray  # offset and size of each picture in the tar
        path = expand_user(self.path)
        if os.path.isdir(path):
            members, tar, account = _in_folder(path), None, None
        else:
            members, tar, account = _in_tar(path)
        pictures = [name for name in members if name.lower().endswith(PICTURE_ENDS)]
        top = _top(path, members, pictures)
        folders = sorted({posixpath.dirname(name) for name in pictures})
        classes, initials = _class_folders(path, top, folders, self.classes_from)
        order = sorted({*classes.values()})
        indices = {name: i for i, name in enumerate(order)}
        labels = {folder: indices[name] for folder, name in classes.items()}
        rows = sorted((labels[posixpath.dirname(n)], posixpath.basename(n), n) for n in pictures)
        names = [os.fsencode(name) for _, _, name in rows]
        for name, value in (  # the dataclass is frozen
            ("classes", _readable(self.names, order)),
            ("_initials", initials and not self.classes_from),
            ("_file", path),
            ("_tar", tar),
            ("_stamps", stamps([] if tar else [os.path.join(path, n) for *_, n in rows])),
            ("_account", account),
            ("_top", len(top)),
            ("_names", b"".join(names)),
            ("_ends", np.cumsum([len(name) for name in names], dtype=np.int64)),
            ("_labels", np.array([label for label, *_ in rows], np.int32)),
            ("_places", np.array([members[name] for *_, name in rows], np.int64)),
        ):
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, row: int) -> Example:
        if not 0 <= row < len(self):
            raise IndexError(row)
        key = self._key(row)
        size = self._places[row, 1] if self._tar else self._stamps[row, 0]
        self.limits.check_bytes(key, int(size))
        try:
            if self._tar:
                (image,) = read(self._tar, [tuple(self._places[row].tolist())])
            else:
                image = read_file(self.file(row), self._stamps[row])
        except OSError as error:
            raise BadSample(key, f"cannot be read in {self._file} ({error.strerror})") from None
        if not image:
            raise BadSample(key, "the picture has no bytes")
        return Example(image, (), row, key, int(self._labels[row]))

    def file(self, row: int) -> str:
        """The path of a row's picture; "" for one inside of a tar."""
        return "" if self._tar else os.path.join(self._file, self._name(row))

    def keys(self) -> Iterator[str]:
        return map(self._key, range(len(self)))

    def guesses(self) -> tuple[Guess, ...]:
        reason = "the outer folders are the initials of the classes"
        return (Guess("classes_from", "path", reason),) * self._initials

    def account(self) -> Account | None:
        """What became of every member of a tar; None for a folder."""
        return self._account

    def _name(self, row: int) -> str:
        return os.fsdecode(self._names[self._ends[row - 1] if row else 0 : self._ends[row]])

    def _key(self, row: int) -> str:
        return printable(self._name(row)[self._top :])


def _in_folder(path: str) -> dict[str, tuple[int, int]]:
    """The relative names of everything inside a folder, in the format of `_in_tar`'s members."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})")

    members = {}
    for folder, folders, files in os.walk(path, onerror=refuse, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = os.path.relpath(folder, path).replace(os.sep, "/")
        prefix = "" if inside == "." else f"{inside}/"
        for name in (*(f"{name}/" for name in folders), *files):
            if not name.startswith("."):
                members[prefix + name] = (0, 0)
    return members


def _in_tar(path: str) -> tuple[dict[str, tuple[int, int]], Shard, Account]:
    """((offset, size) of every member of a tar by name, the tar, what became of the members). The
    name of a folder ends with a slash."""
    size = 0
    try:
        status = os.stat(path)
        size = status.st_size
        contents = tars.scan(path, size)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}){_near(path)}") from None
    except tarfile.ReadError:
        reason = "not an uncompressed tar" if size else "an empty file"
        raise DataError(f"{path}: {reason}, expected a folder or an uncompressed tar") from None
    if contents.cut:
        last = tars.shown(contents.last) or "none"
        raise DataError(
            f"{path}: truncated or damaged; the last complete member is {last}; copy it again"
        )
    if contents.tail:
        raise DataError(f"{path}: {contents.describe_tail()}; copy it again")
    for name in contents.unusable:
        if name.lower().endswith(PICTURE_ENDS):
            raise DataError(
                f"{path}: {tars.shown(name)} is a link to no file of the archive, or a sparse "
                "file, expected a picture; pack the folder again with tar --dereference, and "
                "without --sparse"
            )
    tally, members = tars.Tally(contents.skipped), {}
    for name, member in contents.files.items():
        if any(part.startswith(".") for part in name.split("/")):
            tally.add(tars.HIDDEN, member.name)
            continue
        members[name] = member.offset, member.size
        if not name.lower().endswith(PICTURE_ENDS):
            ending = tars.shown(os.path.splitext(name)[1])
            tally.add(f"{tars.UNREAD}: {ending}" if ending else tars.NO_ENDING, member.name)
    for folder in contents.folders:
        if not any(part.startswith(".") for part in folder.split("/")):
            members[f"{folder}/"] = (0, 0)
    skipped = tally.skipped()
    used = contents.found - sum(one.count for one in skipped)
    tar = Shard(path, size, str(status.st_mtime_ns))
    return members, tar, Account("members", contents.found, used, skipped)


def _near(path: str) -> str:
    folder, name = os.path.split(os.path.abspath(path))
    siblings = os.listdir(folder) if os.path.isdir(folder) else []
    near = difflib.get_close_matches(name, siblings, n=3, cutoff=0.5)
    return f"; nearest in {folder}: {', '.join(near)}" if near else ""


def _top(path: str, members: dict[str, tuple[int, int]], pictures: list[str]) -> str:
    """The folder, with its slash, that contains all class folders. Raises `DataError` for pictures
    outside of class folders and for class folders without pictures."""
    if not pictures:
        files = (name for name in members if not name.endswith("/"))
        ends = sorted({os.path.splitext(name)[1] or name for name in files})[:_SHOWN]
        listed = ", ".join(ends) or "nothing"
        raise DataError(f"{path}: no pictures; found {listed}, expected {', '.join(PICTURE_ENDS)}")
    folders = {posixpath.dirname(name) for name in pictures}
    if len(folders) == 1:
        (folder,) = folders
        raise DataError(
            f"{path}: all {len(pictures)} pictures are in one folder"
            f"{f', {folder}' if folder else ''}, expected one folder per class"
        )
    common = posixpath.commonpath(folders)
    if common in folders:
        beside = [name for name in pictures if posixpath.dirname(name) == common]
        raise DataError(
            f"{path}: {len(beside)} pictures, such as {beside[0]}, are beside the class folders, "
            "expected every picture inside the folder of its class"
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


def _class_folders(
    path: str, top: str, folders: list[str], classes_from: str
) -> tuple[dict[str, str], bool]:
    """(the class of each folder, whether the outer folders are the initials of the classes)."""
    components = {folder: folder[len(top) :].split("/") for folder in folders}
    while len({each[-1] for each in components.values()}) == 1:
        components = {folder: each[:-1] for folder, each in components.items()}
    initials = all(
        len(each) > 1 and len(each[0]) == 1 and each[1][:1].lower() == each[0].lower()
        for each in components.values()
    )
    if classes_from == "path" or (initials and not classes_from):
        names = {folder: "/".join(each[initials:]) for folder, each in components.items()}
    else:
        names = {folder: each[-1] for folder, each in components.items()}
    repeated = [n for n, count in collections.Counter(names.values()).items() if count > 1]
    if repeated and not classes_from:
        both = [folder for folder, name in names.items() if name == repeated[0]]
        outer = sorted({f"{path}/{top}{components[folder][0]}" for folder in both})
        parents = f"set the path to one of the parent folders, such as {outer[0]}"
        raise DataError(
            f"{path}: {len(repeated)} classes have several folders, such as {both[0]} and "
            f"{both[1]}, expected one folder per class; "
            + (f"{parents}; or " if os.path.isdir(path) and len(outer) > 1 else "")
            + f"set classes_from=path if {'/'.join(components[both[0]])} is a class of its own, or "
            f"classes_from=folder if both show {repeated[0]}"
        )
    return names, initials


def _readable(names: str, folders: list[str]) -> tuple[str, ...]:
    """The class name of each class folder, from the json file `names` if there is one."""
    if not names:
        return tuple(folder.replace("_", " ").replace("/", " ") for folder in folders)
    path = expand_user(names)
    try:
        readable = reading.read_json(path, dict[str, str])
    except OSError as error:
        raise DataError(f"names={names}: cannot be read ({error.strerror}){_near(path)}") from None
    except ValueError as error:
        wanted = "a JSON object {folder: class name}"
        raise DataError(f"names={names}: expected {wanted} ({error})") from None
    missing = [folder for folder in folders if folder not in readable]
    if missing:
        raise DataError(
            f"names={names}: no name for {len(missing)} of {len(folders)} class folders: "
            f"{', '.join(missing[:_SHOWN])}{'...' * (len(missing) > _SHOWN)}"
        )
    return tuple(readable[folder] for folder in folders)
