"""Every exception that a user can meet.

A command prints the exception as one block and exits with its code: 2 if something has to be fixed
first, 1 if the run could not continue, 134 if another process was lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shlex
import sys
from collections.abc import Iterator, Sequence

from clipx.config import secrets

DISTRIBUTION = "clipx-jax"  # what pip calls it: on the index `clipx` is another project


_LONGEST = 2000  # characters of a line of an error


def readable(text: str) -> str:
    """`text` without secrets, and without what a damaged file may bring into it: the middle of very
    long lines, and characters that a terminal does not print."""
    half = _LONGEST // 2
    lines = (
        line if len(line) <= _LONGEST else f"{line[:half]} [...] {line[-half:]}"
        for line in secrets.cut(text).split("\n")
    )
    return "\n".join(
        "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line) for line in lines
    )


def cause(error: BaseException) -> str:
    """The innermost cause of an error, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    for reason in ("No space left on device", "RESOURCE_EXHAUSTED", "Permission denied"):
        if reason in text:
            return reason.replace("RESOURCE_EXHAUSTED", "out of space or memory")
    return text[:300]


def listed(names: Sequence[str], most: int = 8) -> str:
    """The first names of a list, with commas, and how many more there are."""
    more = f" and {len(names) - most} more" * (len(names) > most)
    return ", ".join(names[:most]) + more


def data_flag(key: str, value: str) -> str:
    """The argument that sets config.data.<key> to `value`, as a shell reads it."""
    return f"--config.data.{key}={shlex.quote(value)}"


def in_section(message: str, section: str) -> str:
    """The message of a source, which writes flags for config.data, with those for `section`."""
    return message.replace("--config.data.", f"--config.{section}.")


class Said(Exception):
    """An exception whose text is printed: it has no secrets, and no characters that a terminal does
    not print."""

    def __str__(self) -> str:
        return readable(super().__str__())


class ConfigError(Said):
    """A config, command line, workdir or file is wrong. Exit code 2.

    where: the config key, flag or file. found, expected: what it holds, and what it should hold.
    fix: what to do about it; "" if that is not known. file: the config file at fault. Raised before
    any data is opened, where possible.
    """

    def __init__(self, where: str, found: str, expected: str, fix: str = "", file: str = ""):
        super().__init__(where, found, expected, fix)
        self.where, self.found, self.expected = where, found, expected
        self.fix, self.file = fix, file

    def __str__(self) -> str:
        lines = [f"config error at {self.where}"]
        if self.file:
            lines.append(f"  file:     {self.file}")
        lines += [f"  found:    {self.found}", f"  expected: {self.expected}"]
        if self.fix:
            lines.append(f"  fix:      {self.fix}")
        return readable("\n".join(lines))


class UnknownKeys(ConfigError):
    """One or several keys of a config that do not exist, in one block. `where` and the other
    attributes are those of the first."""

    def __init__(self, errors: Sequence[ConfigError]):
        first, *others = errors
        found, fixes = first.found, [first.fix] * bool(first.fix)
        if others:
            found += f"; and unknown too: {', '.join(error.where for error in others)}"
            fixes += [f"{e.where}: {e.fix or f'expected {e.expected}'}" for e in others]
        super().__init__(first.where, found, first.expected, "; ".join(fixes), first.file)
        self.errors = tuple(errors)


def damaged_file(path: str | os.PathLike, error: Exception) -> ConfigError:
    """What to raise for a file of a workdir that cannot be read because of `error`."""
    found = f"{os.fspath(path)}, which is damaged ({error})"
    return ConfigError("--workdir", found, "the file as the run wrote it")


def at_key(message: str, key: str) -> str:
    """The message of a source, which names the config key or flag that it is about: `key`, unless
    it names one already."""
    named = message.startswith("--") or any(f"config.{s}" in message for s in ("data", "evals"))
    return message if named else f"{key}: {message}"


class DataError(Said):
    """The data does not match the config. One line, exit code 2."""


class BadSample(Said):
    """One example cannot be used. `key` names the example, `reason` says why."""

    def __init__(self, key: str, reason: str):
        super().__init__(key, reason)
        self.key, self.reason = key, reason

    def __str__(self) -> str:
        return readable(f"{self.key}: {self.reason}")


class RunError(Said):
    """The run cannot continue. One block that says why, and what is saved. Exit code 1."""


class StorageError(RunError):
    """A file of the data cannot be read as it was when the data was opened. One line.

    passing: whether the error may pass by itself, as that of a network.
    """

    def __init__(self, path: str, reason: str, passing: bool = False):
        super().__init__(path, reason, passing)
        self.path, self.reason, self.passing = path, reason, passing

    def __str__(self) -> str:
        return readable(f"{self.path}: {self.reason}")


class StuckError(RunError):
    """A read of the data never ends. One line. Threads that wait for it cannot be joined: the
    process has to be ended without them."""


class CheckpointError(Said):
    """A checkpoint cannot be written or read. One line that says what is saved. Exit code 1."""


class MetricsError(Said):
    """The metrics cannot be written. One line; the lines before it are intact. Exit code 1."""


class HostsError(Said):
    """The processes of a run cannot connect. One block that names the missing ones.

    Exit code 134 once they have connected, 1 before.
    """


class Interrupted(Exception):
    """The run was asked to stop during an evaluation or the pass before an episode."""


class OutOfMemory(Said):
    """A program does not fit the device's memory, says the compiler.

    used: bytes that the program needs. limit: bytes that the device has. Both are None if the
    compiler does not report them.
    """

    def __init__(self, message: str, used: int | None = None, limit: int | None = None):
        super().__init__(message)
        self.used, self.limit = used, limit


class HloError(ValueError):
    """The cost of a compiled program cannot be read from its HLO text."""


class NotExpressible(Said):
    """An export format cannot hold a model. One reason, and what to do instead."""


class MissingLibrary(Said):
    """A library is not installed, or its import fails. One line that says why."""


class NotProven(Said):
    """A library that loads an export computes other values than clipx. One line that says which."""


def install_hint(*extras: str, upgrade: bool = False) -> str:
    """The shell command that adds `extras` to the clipx that is running, with this Python.

    An editable checkout is installed from its folder again, anything else by the name of the
    distribution.
    """
    folder = _checkout()
    what = f"{folder or DISTRIBUTION}[{','.join(extras)}]"
    options = [*(["--upgrade"] if upgrade else []), *(["-e"] if folder else [])]
    return shlex.join([*_pip_install(), *options, what])


@contextlib.contextmanager
def optional(extra: str, error: type[Exception], need: str) -> Iterator[None]:
    """Imports inside the block may fail: then raises `error` in one line, of what needs the package
    and how to install the extra that brings it."""
    try:
        yield
    except ImportError as missing:
        raise error(f"{need} ({missing}); {install_hint(extra)}") from None


def _checkout() -> pathlib.Path | None:
    """The checkout that was installed with `pip install -e`, or that is run without being
    installed; None for an installed wheel."""
    import importlib.metadata
    import urllib.parse
    import urllib.request

    installed = importlib.metadata.distributions(name=DISTRIBUTION)
    # a checkout's own .egg-info, which has no WHEEL, does not say how it was installed
    origins = [d.read_text("direct_url.json") for d in installed if d.read_text("WHEEL")]
    if origins:
        origin = json.loads(origins[0] or "{}")
        if not origin.get("dir_info", {}).get("editable"):
            return None
        path = urllib.parse.urlsplit(origin["url"]).path
        return pathlib.Path(urllib.request.url2pathname(path))
    root = pathlib.Path(__file__).absolute().parents[1]
    return root if (root / "setup.py").is_file() else None


def _pip_install() -> list[str]:
    """The command that installs packages for this Python."""
    import importlib.util
    import shutil

    if importlib.util.find_spec("pip") is None:  # an environment that uv has made
        return ["uv", "pip", "install", "--python", sys.executable]
    found = shutil.which("pip")
    if found and os.path.dirname(found) == os.path.dirname(sys.executable):
        return ["pip", "install"]
    return [sys.executable, "-m", "pip", "install"]
