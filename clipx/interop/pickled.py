"""Reads a pickle of torch into values that do nothing: no name in it is looked up, nothing in it is
called. `pickletools` decodes the instructions; what they would have made stays a description."""

from __future__ import annotations

import dataclasses
import io
import pathlib
import pickletools
import zipfile
from typing import Any

LARGEST = 64 << 20  # bytes: the pickle of a model holds names and shapes; its arrays lie beside it
LARGER = 20  # times its size that an archive may unpack to; torch compresses only code
_OLD_PICKLES = 4  # a magic number, a version, a description of the machine, and the value
# Of tuples and calls within each other. Hashing a tuple of 100,000 levels ends Python itself.
_DEEPEST = 100
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = (
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINSTRING", "BINSTRING"),
)
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class PickleError(ValueError):
    """A pickle that torch.save does not write. One line that says why."""


@dataclasses.dataclass(frozen=True, eq=False)
class Name:
    """A class or function that the pickle names: `module.name`."""

    path: str


@dataclasses.dataclass(eq=False)
class Call:
    """What a call of `name` with `arguments` would have returned. state: what the object would have
    been filled with; None if there is nothing.
    """

    name: str
    arguments: Any
    state: Any = None


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """Data beside the pickle, by the key that torch gave it."""

    key: Any


class Reader:
    """The instructions of torch.save, and no others, on a stack of (value, depth)."""

    def __init__(self) -> None:
        self._stack: list[tuple[Any, int]] = []
        self._below: list[list[tuple[Any, int]]] = []  # stacks that wait under a mark
        self._memo: dict[int, tuple[Any, int]] = {}

    def read(self, data: io.BytesIO) -> Any:
        """The value of the pickle that starts where `data` stands; leaves it at its end. Raises
        `PickleError`."""
        try:
            for instruction, argument, _ in pickletools.genops(data):
                if instruction.name == "STOP":
                    return self._stack.pop()[0]
                self._do(instruction.name, argument)
        except PickleError:
            raise
        except (ValueError, IndexError, KeyError, TypeError) as error:
            raise PickleError(f"a damaged pickle ({type(error).__name__}: {error})") from None
        raise PickleError("a pickle without an end")

    def _do(self, name: str, argument: Any) -> None:
        if name in _LITERALS:
            self._push(argument)
        elif name in _CONSTANTS:
            self._push(_CONSTANTS[name])
        elif name == "MARK":
            self._below.append(self._stack)
            self._stack = []
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self._stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self._stack.append(self._memo[argument])
        elif name == "GLOBAL":
            self._push(Name(argument.replace(" ", ".", 1)))
        elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_SET"):
            self._push({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": set}[name]())
        elif name != "PROTO":
            self._combine(name)

    def _combine(self, name: str) -> None:
        """The instructions that make a value of the values before them."""
        if name in ("TUPLE", *_TUPLES):
            items = self._marked() if name == "TUPLE" else self._last(_TUPLES[name])
            self._push(tuple(x for x, _ in items), max((d for _, d in items), default=0) + 1)
        elif name in ("APPEND", "APPENDS"):
            items = self._marked() if name == "APPENDS" else self._last(1)
            self._top(list).extend(x for x, _ in items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [x for x, _ in (self._marked() if name == "SETITEMS" else self._last(2))]
            pairs = dict(zip(map(_key, items[::2]), items[1::2], strict=True))
            self._top(dict).update(pairs)
        elif name in ("REDUCE", "NEWOBJ"):
            (called, _), (arguments, depth) = self._last(2)
            if not isinstance(called, Name):
                raise PickleError(f"a call of {type(called).__name__}, which has no name")
            filled = called.path == "collections.OrderedDict"  # made empty, then filled like a dict
            self._push({} if filled else Call(called.path, arguments), depth + 1)
        elif name == "BUILD":
            ((state, _),) = self._last(1)
            if not isinstance(self._stack[-1][0], dict):  # the attributes of an OrderedDict
                self._top(Call).state = state
        elif name == "BINPERSID":
            ((key, depth),) = self._last(1)
            self._push(Stored(key), depth + 1)
        else:
            raise PickleError(f"the instruction {name}, which torch.save does not write")

    def _push(self, value: Any, depth: int = 0) -> None:
        if depth > _DEEPEST:
            raise PickleError(f"values more than {_DEEPEST} levels deep")
        self._stack.append((value, depth))

    def _last(self, count: int) -> list[tuple[Any, int]]:
        if len(self._stack) < count:
            raise IndexError("too few values")
        taken = self._stack[-count:]
        del self._stack[-count:]
        return taken

    def _marked(self) -> list[tuple[Any, int]]:
        taken, self._stack = self._stack, self._below.pop()
        return taken

    def _top(self, kind: type) -> Any:
        value = self._stack[-1][0]
        if not isinstance(value, kind):
            raise PickleError(f"{type(value).__name__} where {kind.__name__} belongs")
        return value


def check_file(file: pathlib.Path) -> None:
    """Raises `PickleError` if the pickle of a file of torch.save would harm the process that loads
    it, even under `weights_only`: by its depth, or by what it unpacks to."""
    if not zipfile.is_zipfile(file):  # torch before 1.6: four pickles, then the arrays
        with file.open("rb") as opened:
            data = io.BytesIO(opened.read(LARGEST))
        for _ in range(_OLD_PICKLES):
            Reader().read(data)
        return
    with zipfile.ZipFile(file) as archive:
        size = sum(m.file_size for m in archive.infolist())
        pickle = main_member(archive)
        if size > LARGER * file.stat().st_size or pickle.file_size > LARGEST:
            raise PickleError(f"{size:,} bytes when it is unpacked")
        Reader().read(io.BytesIO(archive.read(pickle)))


def main_member(archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    """The member that describes everything else in an archive of torch. Raises `PickleError`."""
    pickles = [m for m in archive.infolist() if m.filename.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise PickleError(f"{len(pickles)} members named data.pkl")
    return pickles[0]


def _key(value: Any) -> Any:
    """The key of a dict: other kinds than these name no array, so one stands for all of them."""
    return value if isinstance(value, str | int | float | bytes) else None
