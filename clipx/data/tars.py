"""What a tar holds, from its headers: every member and every byte is accounted for.

Archives that follow each other in one file (`cat a.tar b.tar`) are read as one. Of members with the
same name the last one counts, and links inside the file lead to their member, as if the file had
been unpacked by `tar x --ignore-zeros`.
"""

from __future__ import annotations

import dataclasses
import posixpath
import re
import tarfile
from collections.abc import Iterable, Iterator
from typing import BinaryIO, cast

from clipx.data.base import Account, Skipped, printable
from clipx.data.storage import open_shard

BLOCK = tarfile.BLOCKSIZE  # the data of every member starts at a multiple of it
_CHUNK = 1 << 16  # bytes to read at once behind an end mark
_EXAMPLES = 3  # names kept for each reason
_LINKS = 40  # most links to follow from one name, as Linux does
_LONGEST_NAME = 4096  # characters of a path, as Linux allows
_LONGEST_HEADER = 1 << 17  # bytes of the names and attributes before a member
# what tarfile raises for damaged headers, beside its own errors
_DAMAGED = (tarfile.TarError, ValueError, ArithmeticError, LookupError, RecursionError)
_DOTTED = re.compile(r"\./|//|/\.$|^/")  # what `normal` removes


@dataclasses.dataclass(frozen=True)
class Member:
    """A file of a tar."""

    name: str  # as the tar spells it
    offset: int  # of its data, in bytes
    size: int
    link: str | None = None  # the name that a symbolic link leads to; such a member has no data


@dataclasses.dataclass(frozen=True)
class Contents:
    """The members of a tar."""

    # by `normal` name, in the order in which the names first appear; links lead to their data
    files: dict[str, Member]
    folders: tuple[str, ...]  # `normal` names
    skipped: tuple[Skipped, ...]  # members that are no file, or that a later one replaces
    unusable: tuple[str, ...]  # the names of those that are no file
    found: int  # all members but folders
    last: str  # the name of the last complete member; "" if there is none
    cut: bool  # the file ends, or is damaged, before its end mark
    tail: int  # bytes after the end mark that are no tar
    end: int  # where reading stopped, in bytes

    def describe_tail(self) -> str:
        """What follows the archive."""
        return describe_tail(self.tail, self.end)


class Tally:
    """Counts what is left out, by reason, with the first names of each."""

    def __init__(self, skipped: Iterable[Skipped] = ()):
        self._reasons: dict[str, tuple[int, tuple[str, ...]]] = {}
        for one in skipped:
            self.add(one.reason, *one.examples, count=one.count)

    def add(self, reason: str, *names: str, count: int = 1) -> None:
        """Counts items of a reason; `names` are those of the first of them."""
        before, examples = self._reasons.get(reason, (0, ()))
        shown_names = examples + tuple(map(shown, names[: _EXAMPLES - len(examples)]))
        self._reasons[reason] = before + count, shown_names

    def skipped(self) -> tuple[Skipped, ...]:
        """What was counted, in the order of the first of each reason."""
        return tuple(Skipped(r, count, names) for r, (count, names) in self._reasons.items())


def merged(accounts: Iterable[tuple[str, Account]]) -> Account:
    """The sum of the accounts of several tars; each comes with the tar's name for the examples."""
    tally, found, used = Tally(), 0, 0
    for name, account in accounts:
        found, used = found + account.found, used + account.used
        for one in account.skipped:
            tally.add(one.reason, *(f"{name}/{e}" for e in one.examples), count=one.count)
    return Account("members", found, used, tally.skipped())


def shown(name: str) -> str:
    """A name as a message can print it: escaped where it is no text, and not too long."""
    text = printable(name)
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return text if len(text) <= 100 else f"{text[:48]}...{text[-48:]}"


def normal(name: str) -> str:
    """The path under which `tar x` writes a member, such as `a/b` for `./a//b`."""
    if not _DOTTED.search(name):
        return name
    return posixpath.normpath(name).lstrip("/")


def scan(path: str, size: int) -> Contents:
    """Reads the headers of the tar at `path`, a file of `size` bytes.

    Raises `tarfile.ReadError` for a file that is no tar, and the exceptions of its filesystem. A
    file that is truncated or has other bytes after its end does not raise: `Contents` says so.
    """
    headers = _Headers(size)
    with open_shard(path) as file:
        headers.read(file)
    return headers.contents()


class _Bounded:
    """A file that tarfile reads headers from. Sizes in damaged headers do not lead out of the file,
    or all of it into memory."""

    def __init__(self, file: BinaryIO):
        self._file, self.tell = file, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _LONGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._file.read(size)

    def seek(self, place: int) -> int:
        if not 0 <= place < 1 << 63:
            raise tarfile.ReadError(f"a header at byte {place:,}")
        return self._file.seek(place)


def _headers(file: BinaryIO) -> Iterator[tuple[int, tarfile.TarInfo]]:
    """Yields (the byte after it and its data, member) of the archive that starts where `file` is,
    each farther on than the one before. Raises `tarfile.ReadError` for a damaged header."""
    try:
        before, tar = file.tell(), tarfile.TarFile(fileobj=cast(BinaryIO, _Bounded(file)))
        while (member := tar.next()) is not None:
            # else tarfile keeps every member in memory
            tar.members = []  # pyright: ignore[reportAttributeAccessIssue]
            if member.size < 0 or tar.offset <= before:
                raise tarfile.ReadError(f"a member of {member.size:,} bytes")
            before = tar.offset
            yield before, member
    except _DAMAGED as error:
        raise tarfile.ReadError(str(error)) from None


def headers(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The members of a tar's first archive. Raises `tarfile.ReadError` for a damaged header, and
    for a file that is no tar."""
    return (member for _, member in _headers(file))


class _Headers:
    """Collects the members of a file of one or several archives."""

    def __init__(self, size: int):
        self._size = size
        self._members: dict[str, Member] = {}
        self._folders: dict[str, None] = {}
        self._tally, self._unusable = Tally(), []
        self._found, self._end, self._tail = 0, 0, 0
        self._last, self._cut = "", False

    def read(self, file: BinaryIO) -> None:
        """Reads archive after archive. Raises `tarfile.ReadError` if the first is none."""
        start: int | None = 0
        while start is not None:
            self._end = self._archive(file, start)
            if self._cut:
                return
            # tarfile takes a damaged header for the end; the real end is a block of zeros
            file.seek(self._end)
            if file.read(BLOCK) != bytes(BLOCK):
                if start and self._end == start:
                    self._tail = self._size - start
                else:
                    self._cut = True
                return
            start = _after_zeros(file, self._end)

    def _archive(self, file: BinaryIO, start: int) -> int:
        """Reads the archive that starts at a byte. Returns the byte after its last member."""
        file.seek(start)
        end = start
        try:
            for after, member in _headers(file):
                end = after
                self._add(member)
        except tarfile.ReadError:
            if not end:
                raise
            self._cut = True
        return end

    def _add(self, header: tarfile.TarInfo) -> None:
        if max(len(header.name), len(header.linkname)) > _LONGEST_NAME:
            self._found += 1
            self._refuse(_LONG, header.name)
            return
        name = normal(header.name)
        if header.offset_data + header.size <= self._size:
            self._last = header.name
        if header.isdir():
            self._folders[name] = None
            return
        self._found += 1
        member: Member | str = "a device, a pipe or another thing that is no file"
        if header.issparse():
            member = "a sparse file, stored in pieces; pack it again without --sparse"
        elif header.isreg():
            member = Member(header.name, header.offset_data, header.size)
        elif header.issym():
            inside = posixpath.join(posixpath.dirname(name), header.linkname)
            member = Member(header.name, 0, 0, inside)
        elif header.islnk():  # to the file that has the name at this point
            target = self._members.get(normal(header.linkname))
            member = _NO_TARGET
            if target is not None:
                member = dataclasses.replace(target, name=header.name)
        if isinstance(member, str):
            self._refuse(member, header.name)
            return
        if name in self._members:
            self._tally.add(_REPLACED, header.name)
        self._members[name] = member

    def _refuse(self, reason: str, name: str) -> None:
        self._tally.add(reason, name)
        self._unusable.append(name)

    def contents(self) -> Contents:
        """What was read, with every symbolic link in place of its member."""
        files = {}
        for name, member in self._members.items():
            if member.link is not None:
                target = self._target(member.link)
                if target is None:
                    self._refuse(_NO_TARGET, member.name)
                    continue
                member = dataclasses.replace(target, name=member.name)
            files[name] = member
        return Contents(
            files=files,
            folders=tuple(self._folders),
            skipped=self._tally.skipped(),
            unusable=tuple(self._unusable),
            found=self._found,
            last=self._last,
            cut=self._cut,
            tail=self._tail,
            end=self._end,
        )

    def _target(self, path: str) -> Member | None:
        """The file that a path leads to, through links of files and of folders."""
        for _ in range(_LINKS):
            if path.startswith("/"):  # a file of the machine that packed the tar
                return None
            parts = posixpath.normpath(path).split("/")
            for end in range(1, len(parts) + 1):
                member = self._members.get("/".join(parts[:end]))
                if member is not None and member.link is not None:
                    path = posixpath.join(member.link, *parts[end:])
                    break
            else:
                return self._members.get("/".join(parts))
        return None


UNREAD, NO_ENDING = "an ending that is not read", "a name without an ending"
HIDDEN = "a name that starts with a dot"
_NO_TARGET = "a link that leads to no file of the archive"
_LONG = f"a name or a link of more than {_LONGEST_NAME:,} characters"
_REPLACED = "a later member has the same name, and counts in its place"


def describe_tail(size: int, start: int) -> str:
    """What is wrong with a tar that `size` other bytes follow from byte `start` on."""
    return f"{size:,} bytes after the end of the archive, from byte {start:,} on, are no tar"


def _after_zeros(file: BinaryIO, start: int) -> int | None:
    """The start of the first block from `start` on that is not zero; None if there is none."""
    file.seek(start)
    while chunk := file.read(_CHUNK):
        rest = len(chunk.lstrip(b"\0"))
        if rest:
            return (start + len(chunk) - rest) // BLOCK * BLOCK
        start += len(chunk)
    return None


def not_a_tar(start: bytes) -> str:
    """Why tarfile refuses the first block of a file, and what to do about it."""
    if not start:
        return "an empty file (0 bytes), expected a tar; copy the shard again"
    if start[:2] == b"\x1f\x8b" or start[:4] == b"\x28\xb5\x2f\xfd" or start[:3] == b"BZh":
        return "a compressed tar, expected an uncompressed one for random access; decompress it"
    if len(start) < BLOCK:
        return f"truncated to {len(start)} bytes, expected a tar; copy the shard again"
    return "not a tar"
