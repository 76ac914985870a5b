"""Local and remote data files: expands paths, reads byte ranges, and caches indexes of the files.

A path with `://` goes through fsspec, any other path to the operating system.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import difflib
import glob
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from clipx.config import regular, secrets
from clipx.data.base import expand_user
from clipx.errors import DataError, listed, optional

THREADS = 32  # for many files, where most of the time is waiting
ABSENT = -1  # stands for the size of a member that does not exist
# keys of a filesystem's file info that change when the file does, most reliable first
_CHANGES = ("etag", "ETag", "mtime", "updated", "LastModified", "last_modified", "created")


class Shard(NamedTuple):
    """The current state of a file."""

    path: str
    size: int  # bytes
    stamp: str  # time or tag of the last change


def is_remote(path: str) -> bool:
    return "://" in path


def threads(paths: Iterable[str]) -> int:
    """How many threads read parts of files: one for a local disk, which more only slow down."""
    return THREADS if any(map(is_remote, paths)) else 1


def expand(pattern: str) -> list[Shard]:
    """The files that a path with globs and braces names: braces in their order, globs sorted.

    A path that exists is that file, whatever characters it has. Raises `DataError` if no file
    matches, and if some alternatives of a brace have no file.
    """
    full = expand_user(pattern)
    if not is_remote(full) and os.path.exists(full):
        return [of_file(full)]
    alternatives = _braces(full)
    if is_remote(full):
        with concurrent.futures.ThreadPoolExecutor(min(len(alternatives), THREADS)) as pool:
            matches = dict(zip(alternatives, pool.map(_match_remote, alternatives)))
    else:
        matches = {one: _match_local(one) for one in alternatives}
    missing = [one for one, files in matches.items() if not files]
    if len(missing) == len(matches):
        raise DataError(f"{pattern}: no file matches; {_nearest(alternatives[0])}")
    if missing:
        names = listed([os.path.basename(one) for one in missing])
        raise DataError(
            f"{pattern}: {len(missing)} of {len(matches)} shards are missing: {names}; "
            "copy them, or narrow the range"
        )
    return [file for one in alternatives for file in matches[one]]


def refuse_folder(path: str, expected: str) -> None:
    """Raises `DataError` if a local path is a folder: it names the source that looks into it."""
    if not is_remote(path) and os.path.isdir(path):
        raise DataError(
            f"{path}: a folder, expected {expected}; set --config.data.source=auto, which looks "
            "into it"
        )


def _match_local(pattern: str) -> list[Shard]:
    names = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern))
    return [of_file(name) for name in names]


def of_file(path: str) -> Shard:
    """The state of a local file, or of a folder. Raises `DataError` for anything else."""
    try:
        status = os.stat(path)
        if not os.path.isdir(path):  # `refuse_folder` says what to do with a folder
            regular.refuse(path, status)
    except OSError as error:  # such as a dangling link
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from None
    return Shard(path, status.st_size, str(status.st_mtime_ns))


def _match_remote(pattern: str) -> list[Shard]:
    fs, path = filesystem(pattern)
    # in a URL a question mark starts the query
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
    except Exception as error:  # every filesystem has its own exceptions
        raise DataError(f"{pattern}: cannot be read ({error or type(error).__name__})") from None
    for shard in shards:
        if shard.size is None:
            raise DataError(
                f"{shard.path}: its server does not report the size of the file, so parts of it "
                "cannot be read; copy it to a disk or a bucket"
            )
    return shards


def look_again(path: str) -> Shard:
    """The state of a remote file as its server says it now. Raises the server's exceptions."""
    fs, name = filesystem(path)
    fs.invalidate_cache(fs._parent(name))
    return _of_info(fs, path, name, fs.info(name))


def _of_info(fs: Any, url: str, name: str, info: Mapping[str, Any]) -> Shard:
    stamps = (f"{key} {info[key]}" for key in _CHANGES if info.get(key))
    size: Any = info.get("size")  # None is refused by the caller
    return Shard(url, size, next(stamps, None) or str(fs.ukey(name)))


def _braces(pattern: str) -> list[str]:
    """All alternatives of the {000..005} and {a,b} in `pattern`, expanded as a shell does."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if not match:
        return [pattern]
    if match[3] is not None:
        options = match[3].split(",")
    else:
        width = len(match[1]) if match[1].startswith("0") else 0
        options = [f"{i:0{width}d}" for i in range(int(match[1]), int(match[2]) + 1)]
        if not options:
            raise DataError(
                f"{pattern}: the range {match[0]} is empty; write the smaller number first"
            )
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [one for option in options for one in _braces(head + option + tail)]


def _nearest(pattern: str) -> str:
    """Describes what exists near a path that matches nothing."""
    folder = os.path.dirname(pattern) or "."
    if is_remote(pattern):
        fs, path = filesystem(folder)
        names = []
        with contextlib.suppress(Exception):  # not every remote folder can be listed
            names = [os.path.basename(name.rstrip("/")) for name in fs.ls(path, detail=False)]
    else:
        if not os.path.isdir(folder):
            while folder and folder != "/" and not os.path.isdir(folder):
                folder = os.path.dirname(folder)
            return f"its folder does not exist; the nearest folder that does is {folder or '.'}"
        names = os.listdir(folder)
    wanted = os.path.basename(pattern)
    close = difflib.get_close_matches(wanted, names, n=3, cutoff=0.3) or sorted(names)[:3]
    return f"nearest in {folder}: " + (", ".join(close) or "nothing, the folder is empty")


def open_shard(path: str) -> BinaryIO:
    """The file, open for sequential reading. Raises the exceptions of its filesystem."""
    if is_remote(path):
        fs, name = filesystem(path)
        return fs.open(name, "rb")
    return open(path, "rb", opener=regular.only)


def filesystem(path: str) -> tuple[Any, str]:
    """fsspec's filesystem for a remote path, and the path inside it."""
    if secrets.hidden(path):
        raise DataError(
            f"{path}: the password or signature was not stored with the run; name it by a variable "
            "(https://$LOGIN@host/...), or give the path again on the command line"
        )
    need = f"{path}: reading it needs a package that is not installed"
    try:
        with optional("remote", DataError, need):  # fsspec, or the package for this kind of path
            import fsspec

            return fsspec.core.url_to_fs(path)
    except ValueError as error:
        raise DataError(f"{path}: {error}; expected gs://, s3://, https:// or a file") from None


def cache_folder() -> str:
    """The folder for files that clipx can recreate: $CLIPX_CACHE, or clipx in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return os.path.expanduser(os.environ.get("CLIPX_CACHE") or os.path.join(cache, "clipx"))


def recall(shard: Shard, version: int) -> dict[str, np.ndarray] | None:
    """The arrays that `remember` cached for a file.

    None if there are none that can be read, or if the file or the version has changed since.
    """
    path, identity = _cache_entry(shard, version)
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            if file["identity"].tobytes() == identity:
                return {name: file[name] for name in file.files if name != "identity"}
    except Exception:  # a damaged cache file of any kind is made again
        return None
    return None


def remember(shard: Shard, version: int, arrays: dict[str, np.ndarray]) -> None:
    """Caches `arrays` for a file. Does nothing if the cache cannot be written."""
    path, identity = _cache_entry(shard, version)
    contents: dict[str, Any] = {"identity": np.frombuffer(identity, np.uint8), **arrays}
    with contextlib.suppress(OSError):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        handle, unfinished = tempfile.mkstemp(dir=os.path.dirname(path))
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, **contents)
            os.replace(unfinished, path)
        except BaseException:
            os.unlink(unfinished)
            raise


def _cache_entry(shard: Shard, version: int) -> tuple[str, bytes]:
    """Returns (cache file of a shard, the identity that a valid cache file contains). Neither has
    the path, which may have a password in it."""
    path = shard.path if is_remote(shard.path) else os.path.abspath(shard.path)
    name = hashlib.sha1(os.fsencode(path)).hexdigest()
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()
    identity = json.dumps({"version": version} | shard._asdict() | {"path": digest})
    return os.path.join(cache_folder(), "index", f"{name}.npz"), identity.encode()
