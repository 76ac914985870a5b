"""Every exception that a user can meet. A command prints it as one block and exits with its code: 2
for what has to be mended first, 1 for a run that could not go on, 134 for a lost process."""

from __future__ import annotations


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
