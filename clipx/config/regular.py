"""Opens regular files alone: a pipe blocks, a device may never end, and neither is data."""

from __future__ import annotations

import errno
import os
import stat

NO_WAIT = getattr(os, "O_NONBLOCK", 0)  # a pipe that took a file's place must not block `open`
_KINDS = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
    (stat.S_ISSOCK, "a socket"),
)


def refuse(path: str | os.PathLike, status: os.stat_result) -> None:
    """Raises `OSError` for a status that is no regular file's; its `strerror` says what it is."""
    if stat.S_ISREG(status.st_mode):
        return
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    kind = next((name for is_one, name in _KINDS if is_one(status.st_mode)), "no file")
    raise OSError(errno.EINVAL, f"{kind}, expected a regular file", os.fspath(path))


def only(path: str | os.PathLike, flags: int = os.O_RDONLY) -> int:
    """A file descriptor, as the `opener` of `open`. Raises `OSError` for what is no regular file,
    before it is opened."""
    refuse(path, os.stat(path))
    handle = os.open(path, flags | NO_WAIT)
    try:
        refuse(path, os.fstat(handle))
    except BaseException:
        os.close(handle)
        raise
    return handle
