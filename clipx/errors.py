"""Every exception that a user can meet. A command prints it as one block and exits with its code: 2
for what has to be mended first, 1 for a run that could not go on, 134 for a lost process."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shlex
import sys
from collections.abc import Iterator

DISTRIBUTION = "clipx-jax"  # what pip calls it: on the index `clipx` is another project


class ConfigError(Exception):
    """A config, command line, workdir or file that cannot be right: where, what was found, what was
    expected, and how to mend it. Raised before any data opens where that can be; exit code 2."""

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
        return "\n".join(lines)


class DataError(Exception):
    """The data is not what the config says; one line, exit code 2."""


class BadSample(Exception):
    """One example cannot be used: `key` says which, `reason` why."""

    def __init__(self, key: str, reason: str):
        super().__init__(key, reason)
        self.key, self.reason = key, reason

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"


class RunError(Exception):
    """The run cannot go on; one block that says why and what is kept. Exit code 1."""


class CheckpointError(Exception):
    """A checkpoint cannot be written or read; one line that says what is safe. Exit code 1."""


class MetricsError(Exception):
    """The metrics cannot be written; one line. What was written before is whole. Exit code 1."""


class HostsError(Exception):
    """The processes of a run do not come together; one block that says which is missing. Exit code
    134."""


class Interrupted(Exception):
    """The run was told to stop during an evaluation or an episode's first pass."""


class OutOfMemory(Exception):
    """The compiler finds no room for a program. `used`: bytes that it would need; `limit`: bytes
    that there are; None where the compiler does not say."""

    def __init__(self, message: str, used: int | None = None, limit: int | None = None):
        super().__init__(message)
        self.used, self.limit = used, limit


class HloError(ValueError):
    """A program whose cost cannot be told from its text."""


class NotExpressible(Exception):
    """A format has no place for a model: one reason, and what to do instead."""


class MissingLibrary(Exception):
    """A library is not installed, or does not import; one line that says why."""


class NotProven(Exception):
    """The library that loads an export says something else than clipx; one line that says what."""


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
