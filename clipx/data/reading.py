"""Reads files that must stay as they were when the data was opened.

A file that is gone, or has another size or time than its index says, would silently give other rows
than the run has begun with. So it is no bad row: it is a `StorageError`, which ends the run.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import functools
import itertools
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import Int64

from clipx.config import regular
from clipx.data import activity
from clipx.data.storage import ABSENT, THREADS, Shard, filesystem, is_remote, look_again
from clipx.errors import StorageError

T = TypeVar("T")
Place = tuple[int, int]  # offset and size in bytes

_GAP = 1 << 16  # unneeded bytes that are worth reading to save a second read
_SLOW = 1e-4  # seconds; a `stat` that takes longer goes over a network
_FIRST = 200  # files from which to tell how long a `stat` takes
_AGAIN = 600.0  # seconds until a remote file is looked at again
_PAUSES = (0.5, 30.0)  # seconds between two tries: at first, and at most
# reasons of a table that names files which never were there: bad rows
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL)
_NETWORKS = ("nfs", "cifs", "smb", "9p", "afs", "lustre", "ceph", "gpfs", "beegfs", "gluster")
_LOCAL_FUSE = ("fuseblk", "fuse.portal", "fuse.snapfuse")
_FIX = "; put it back as it was, and run the same command to continue"
_looked: dict[str, float] = {}  # when a remote file was last seen to be as it was


def stamps(paths: Sequence[str]) -> Int64[np.ndarray, "n 2"]:
    """(size in bytes, time of the last change in ns) of each file, for `read_file`. The size is a
    negative error number for what is no regular file. Raises `StorageError` for other errors."""
    out = np.empty((len(paths), 2), np.int64)
    started = time.perf_counter()
    for i in range(min(len(paths), _FIRST)):
        out[i] = _stamp(paths[i])
    rest = range(min(len(paths), _FIRST), len(paths))
    if time.perf_counter() - started < _SLOW * _FIRST:
        for i in rest:
            out[i] = _stamp(paths[i])
        return out
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for i, one in zip(rest, pool.map(_stamp, itertools.islice(paths, _FIRST, None))):
            out[i] = one
    return out


def _stamp(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except ValueError:  # a zero byte in the path
        return -errno.EINVAL, 0
    except OSError as error:
        if error.errno in _MISSING:
            return -error.errno, 0
        raise _storage_error(path, error) from None
    if stat.S_ISREG(status.st_mode):
        return status.st_size, status.st_mtime_ns
    return -(errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.EINVAL), 0


def read_file(path: str, stamp: Sequence[int] | np.ndarray) -> bytes:
    """The whole file, which must have the size and the time of `stamp`.

    Raises `OSError` for what was no regular file from the start, and `StorageError` for a file that
    is gone, has changed or cannot be read.
    """
    size, changed = (int(number) for number in stamp)
    if size < 0:
        if size == -errno.EINVAL:
            regular.refuse(path, os.stat(path))
        raise OSError(-size, os.strerror(-size), path)
    with _opened(Shard(path, size, str(changed))) as get:
        return get(0, size)


def read(shard: Shard, places: Sequence[Place]) -> list[bytes | None]:
    """The bytes at each (offset, size) of a file; None for a size of `ABSENT`.

    Ranges that are close together cost one read. The file is closed again, so any number of
    threads may read any number of files. Raises `StorageError` for every error of the filesystem
    and for a file that is no longer the one that was indexed.
    """
    ranges = [(offset, size) for offset, size in places if size > 0]
    start = min((offset for offset, _ in ranges), default=0)
    stop = max((offset + size for offset, size in ranges), default=0)
    together = stop - start <= sum(size for _, size in ranges) + _GAP
    with _opened(shard) as get:
        span = get(start, stop - start) if together and ranges else b""
        contents: list[bytes | None] = []
        for offset, size in places:
            if size <= 0:
                contents.append(None if size == ABSENT else b"")
            else:
                at = offset - start
                contents.append(span[at : at + size] if together else get(offset, size))
    return contents


@contextlib.contextmanager
def _opened(shard: Shard) -> Iterator[Callable[[int, int], bytes]]:
    """Context with a function (offset, size) -> bytes for a file that is as it was indexed."""
    with activity.doing(f"reading {shard.path}"):
        try:
            if is_remote(shard.path):
                yield _remote(shard)
                return
            handle = os.open(shard.path, os.O_RDONLY | regular.NO_WAIT)
            try:
                status = os.fstat(handle)
                _refuse_changed(shard, status.st_size, str(status.st_mtime_ns))
                yield lambda offset, size: _whole(shard.path, os.pread(handle, size, offset), size)
            finally:
                os.close(handle)
        except StorageError:
            raise
        except OSError as error:
            raise _storage_error(shard.path, error) from None
        except Exception as error:  # every remote filesystem has its own exceptions
            if not is_remote(shard.path):
                raise
            said = str(error) or type(error).__name__
            raise StorageError(shard.path, f"cannot be read ({said}){_FIX}", True) from None


def _remote(shard: Shard) -> Callable[[int, int], bytes]:
    """The reader of a remote file, which is looked at again from time to time."""
    fs, name = filesystem(shard.path)
    now = time.monotonic()
    if now - _looked.setdefault(shard.path, now) > _AGAIN:
        seen = look_again(shard.path)
        _refuse_changed(shard, seen.size, seen.stamp)
        _looked[shard.path] = now
    return lambda offset, size: _whole(shard.path, fs.cat_file(name, offset, offset + size), size)


def _refuse_changed(shard: Shard, size: int, stamp: str) -> None:
    """Raises `StorageError` unless a file still has the size and the stamp of its index."""
    if (size, stamp) != (shard.size, shard.stamp):
        now = f"{size:,} bytes, where it had {shard.size:,}" if size != shard.size else "a new time"
        raise StorageError(
            shard.path,
            f"has changed since the data was opened ({now}): its rows may be others; put the old "
            "file back and run the same command to continue, or start anew in another --workdir",
        )


def unchanged(shard: Shard) -> None:
    """Raises `StorageError` if a local file is gone or no longer as it was indexed."""
    with _opened(shard):
        pass


def _whole(path: str, data: bytes, size: int) -> bytes:
    if len(data) != size:
        said = f"ended after {len(data):,} of {size:,} bytes of a read{_FIX}"
        raise StorageError(path, said, passing(path))
    return data


def _storage_error(path: str, error: OSError) -> StorageError:
    if isinstance(error, FileNotFoundError):
        said = f"gone since the data was opened ({os.strerror(errno.ENOENT)})"
    else:
        said = f"cannot be read ({error.strerror or error or type(error).__name__})"
    return StorageError(path, said + _FIX, passing(path))


def passing(path: str) -> bool:
    """Whether errors of a file may pass: it is remote, or on a network filesystem."""
    if is_remote(path):
        return True
    place = os.path.abspath(path)
    kinds = [(len(at), kind) for at, kind in _mounts() if place.startswith(at)]
    kind = max(kinds, default=(0, ""))[1]
    return kind.startswith(_NETWORKS) or (kind.startswith("fuse") and kind not in _LOCAL_FUSE)


@functools.cache
def _mounts() -> tuple[tuple[str, str], ...]:
    """(folder with its slash, kind) of each mounted filesystem; none outside of Linux."""
    with contextlib.suppress(OSError, ValueError), open("/proc/self/mounts") as file:
        rows = [line.split() for line in file]
        return tuple((os.path.join(row[1], ""), row[2]) for row in rows)
    return ()


def patiently(function: Callable[[], T], seconds: float) -> T:
    """What `function` returns. An error of a remote file is tried again for so many seconds: the
    first one is printed, the last one raised."""
    end, (pause, most) = time.monotonic() + seconds, _PAUSES
    tries = 0
    while True:
        try:
            return function()
        except StorageError as error:
            left = end - time.monotonic()
            if not error.passing:
                raise
            if left <= 0:
                tried = f"; tried {tries + 1} times in {seconds:g} s (config.data.timeout)"
                raise StorageError(error.path, f"{error.reason}{tried}") from None
            if not tries:
                print(f"{error.path}: {error.reason.partition('; ')[0]}; trying again for "
                      f"{seconds:g} s", file=sys.stderr, flush=True)  # fmt: skip
            time.sleep(min(pause, left))
            pause, tries = min(2 * pause, most), tries + 1
