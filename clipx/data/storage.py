"""Files of a set, on a disk or remote: which ones a path names, the bytes at places in them, and
what was once found out about them.

A path with `://` goes through fsspec, any other to the operating system.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import difflib
import errno
import glob
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

from clipx.data.base import expand_user
from clipx.errors import DataError, optional

THREADS = 32  # for remote files: their time is waiting
ABSENT = -1  # the size of what is not there
_GAP = 1 << 16  # bytes that may be read for nothing, to read once instead of twice
# what a filesystem may say of a file that changes with it, the most telling first
_CHANGES = ("etag", "ETag", "mtime", "updated", "LastModified", "last_modified", "created")


class Shard(NamedTuple):
    """A file as it is now."""

    path: str
    size: int  # bytes
    stamp: str  # time or tag of its last change


def is_remote(path: str) -> bool:
    return "://" in path


def expand(pattern: str) -> list[Shard]:
    """The files of one path, sorted within each brace. Raises `DataError` for a pattern without a
    match and for a brace range of which some files are missing."""
    full = expand_user(pattern)
    alternatives = _braces(full)
    if is_remote(full):
        with concurrent.futures.ThreadPoolExecutor(min(len(alternatives), THREADS)) as pool:
            found = dict(zip(alternatives, pool.map(_match_remote, alternatives)))
    else:
        found = {one: _match_local(one) for one in alternatives}
    missing = [one for one, files in found.items() if not files]
    if len(missing) == len(found):
        raise DataError(f"{pattern}: no file matches; {_nearest(alternatives[0])}")
    if missing:
        names = ", ".join(os.path.basename(one) for one in missing[:8])
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        raise DataError(
            f"{pattern}: {len(missing)} of {len(found)} shards are missing: {names}{more}; "
            "copy them, or narrow the range"
        )
    return [file for one in alternatives for file in found[one]]


def _match_local(pattern: str) -> list[Shard]:
    try:
        stats = [(file, os.stat(file)) for file in sorted(glob.glob(pattern))]
    except OSError as error:  # a link to nowhere, say
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from None
    return [Shard(file, stat.st_size, str(stat.st_mtime_ns)) for file, stat in stats]


def _match_remote(pattern: str) -> list[Shard]:
    fs, path = _filesystem(pattern)
    # in an address of the web a question mark starts its query
    magic = r"[*\[]" if pattern.startswith("http") else r"[*?\[]"
    try:
        if re.search(magic, path):
            infos = fs.glob(path, detail=True)
            files = [(fs.unstrip_protocol(name), name, infos[name]) for name in sorted(infos)]
        else:
            files = [(pattern, path, fs.info(path))]
        shards = [_of_info(fs, url, name, info) for url, name, info in files]
    except FileNotFoundError:
        return []
    except Exception as error:  # each filesystem has its own kinds
        raise DataError(f"{pattern}: cannot be read ({error or type(error).__name__})") from None
    for shard in shards:
        if shard.size is None:
            raise DataError(
                f"{shard.path}: its server does not say how large it is, so parts of it cannot be "
                "read; copy it to a disk or a bucket"
            )
    return shards


def _of_info(fs, url: str, name: str, info: dict) -> Shard:
    stamps = (f"{key} {info[key]}" for key in _CHANGES if info.get(key))
    return Shard(url, info.get("size"), next(stamps, None) or str(fs.ukey(name)))


def _braces(pattern: str) -> list[str]:
    """`pattern` with every {000..005} and {a,b} written out, as a shell does."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if not match:
        return [pattern]
    if match[3] is not None:
        inside = match[3].split(",")
    else:
        width = len(match[1]) if match[1].startswith("0") else 0
        inside = [f"{i:0{width}d}" for i in range(int(match[1]), int(match[2]) + 1)]
        if not inside:
            raise DataError(f"{pattern}: {match[0]} is empty; write the smaller end first")
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [one for part in inside for one in _braces(head + part + tail)]


def _nearest(pattern: str) -> str:
    """What does exist near a path that matches nothing."""
    folder = os.path.dirname(pattern) or "."
    if is_remote(pattern):
        fs, path = _filesystem(folder)
        names = []
        with contextlib.suppress(Exception):  # it need not be a place that can be listed
            names = [os.path.basename(name.rstrip("/")) for name in fs.ls(path, detail=False)]
    else:
        if not os.path.isdir(folder):
            while folder and folder != "/" and not os.path.isdir(folder):
                folder = os.path.dirname(folder)
            return f"the folder is not there either; what exists of it is {folder or '.'}"
        names = os.listdir(folder)
    wanted = os.path.basename(pattern)
    close = difflib.get_close_matches(wanted, names, n=3, cutoff=0.3) or sorted(names)[:3]
    return f"nearest in {folder}: " + (", ".join(close) or "nothing, the folder is empty")


def open_shard(path: str) -> BinaryIO:
    """The whole file, to be read in order. Raises what its filesystem raises."""
    if is_remote(path):
        fs, name = _filesystem(path)
        return fs.open(name, "rb")
    return open(path, "rb")


def read(path: str, places: list[tuple[int, int]]) -> list[bytes | None]:
    """The bytes at each (offset, size) of a file, None for a size of `ABSENT`; in one read where
    they lie close together. Nothing stays open, so that any number of threads may read any number
    of files. Raises OSError, whatever the filesystem's own error was."""
    there = [(offset, size) for offset, size in places if size > 0]
    start = min((offset for offset, _ in there), default=0)
    stop = max((offset + size for offset, size in there), default=0)
    together = stop - start <= sum(size for _, size in there) + _GAP
    with _reading(path) as get:
        if together and there:
            span = get(start, stop - start)
        parts: list[bytes | None] = []
        for offset, size in places:
            if size <= 0:
                parts.append(None if size == ABSENT else b"")
            else:
                at = offset - start
                parts.append(span[at : at + size] if together else get(offset, size))
    return parts


@contextlib.contextmanager
def _reading(path: str) -> Iterator[Callable[[int, int], bytes]]:
    def checked(data: bytes, size: int) -> bytes:
        if len(data) != size:
            raise OSError(errno.EIO, "it has become shorter since it was opened")
        return data

    if is_remote(path):
        try:
            fs, name = _filesystem(path)
            yield lambda offset, size: checked(fs.cat_file(name, offset, offset + size), size)
        except OSError:
            raise
        except Exception as error:  # each filesystem has its own kinds
            raise OSError(errno.EIO, str(error) or type(error).__name__) from error
        return
    file = os.open(path, os.O_RDONLY)
    try:
        yield lambda offset, size: checked(os.pread(file, size, offset), size)
    finally:
        os.close(file)


def _filesystem(path: str):
    """fsspec's filesystem for a remote path, and the path in it."""
    need = f"{path}: reading it needs a package that is not installed"
    try:
        with optional("remote", DataError, need):  # fsspec, or the package for this kind of path
            import fsspec

            return fsspec.core.url_to_fs(path)
    except ValueError as error:
        raise DataError(f"{path}: {error}; expected gs://, s3://, https:// or a file") from None


def cache_folder() -> str:
    """Where clipx keeps what it can make again: $CLIPX_CACHE, or clipx in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return os.path.expanduser(os.environ.get("CLIPX_CACHE") or os.path.join(cache, "clipx"))


def recall(shard: Shard, version: int) -> dict[str, np.ndarray] | None:
    """What `remember` kept of a file under this version, if the file still has that size and stamp;
    None if nothing is there, or nothing that can be read."""
    path, identity = _kept(shard, version)
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            if file["identity"].tobytes() == identity:
                return {name: file[name] for name in file.files if name != "identity"}
    except Exception:  # whatever is wrong with it, it is made again
        return None
    return None


def remember(shard: Shard, version: int, arrays: dict[str, np.ndarray]) -> None:
    """Keeps `arrays` in the cache; a cache that cannot be written is none."""
    path, identity = _kept(shard, version)
    with contextlib.suppress(OSError):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        handle, unfinished = tempfile.mkstemp(dir=os.path.dirname(path))
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, identity=np.frombuffer(identity, np.uint8), **arrays)
            os.replace(unfinished, path)
        except BaseException:
            os.unlink(unfinished)
            raise


def _kept(shard: Shard, version: int) -> tuple[str, bytes]:
    """The file of the cache for a shard, and what it must say to be of the shard as it is now."""
    path = shard.path if is_remote(shard.path) else os.path.abspath(shard.path)
    name = hashlib.sha1(os.fsencode(path)).hexdigest()
    identity = json.dumps({"version": version} | shard._asdict() | {"path": path})
    return os.path.join(cache_folder(), "index", f"{name}.npz"), identity.encode()
