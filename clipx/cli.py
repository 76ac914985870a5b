"""What every command shares: flags, configs and overrides, processes, errors in one block."""

from __future__ import annotations

import contextlib
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import app, flags, logging

from clipx.config import files
from clipx.errors import (
    BadSample,
    CheckpointError,
    ConfigError,
    DataError,
    HostsError,
    MetricsError,
    RunError,
)
from clipx.parallel import processes
from clipx.parallel.environment import find_process

EXIT_FAILED = 1
EXIT_CONFIG = 2  # the config, the workdir or the data is not what it should be: mend, start again
EXIT_PREEMPTED = 42  # told to stop, and saved: start again as it is
EXIT_LOST = 134  # another process has ended first: JAX's own code where it notices before us
_LEAVE_SECONDS = 10.0


def take_overrides(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """`argv` without its `--config.x.y=value` arguments, and these as (path, text).

    They are not absl's, so that a field can be set that the config file leaves at its default.
    """
    rest, found, arguments = [], [], iter(argv)
    for argument in arguments:
        if not argument.startswith("--config."):
            rest.append(argument)
            continue
        path, equals, text = argument.removeprefix("--config.").partition("=")
        if not equals:
            text = next(arguments, None)
            if text is None:
                raise ConfigError(argument, "no value", f"{argument}=VALUE")
        found.append((path, text))
    return rest, found


def load_config(spec: str, overrides: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """The plain config that `spec` names (`clip:small`, `path.py:variant`), with overrides."""
    config = files.load(spec)
    for path, text in overrides:
        files.override(config, path, text)
    return config


def start_processes(overrides: Sequence[tuple[str, str]]) -> None:
    """Joins the other processes of a run of several, once all of them are there with the same
    versions, config and command; a single process is the default and needs nothing."""
    info = find_process(os.environ)
    if info is None:
        return
    values = {n: flags.FLAGS[n].value for n in ("config", "workdir") if n in flags.FLAGS}
    config = {}
    if values.get("config"):
        with contextlib.suppress(ConfigError):  # the command's own to tell
            config = load_config(values["config"], overrides)
    processes.start(info, config, workdir=values.get("workdir"), overrides=dict(overrides))


def use_compile_cache() -> None:
    """Keeps compiled programs between runs, in JAX_COMPILATION_CACHE_DIR or ~/.cache/clipx."""
    if not jax.config.jax_compilation_cache_dir:
        home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(home, "clipx", "jax")))


def run(main: Callable[[list[tuple[str, str]]], int | None], required: Sequence[str]) -> None:
    """Parses flags and calls `main(overrides)`; exits with its code, or with one block of text and
    a code that says whose turn it is."""

    def guarded(argv):
        if argv[1:]:
            raise ConfigError("command line", " ".join(argv[1:]), "flags alone: --name=value")
        for name in required:
            if not flags.FLAGS[name].value:
                raise ConfigError(f"--{name}", "nothing", f"--{name}=...")
        logging.set_verbosity(logging.FATAL)  # Orbax tells of every file; its errors are raised too
        start_processes(overrides)
        use_compile_cache()
        return main(overrides)

    def parsed(argv):
        try:
            return flags.FLAGS(argv)
        except flags.Error as error:
            known = ", ".join(f"--{name}" for name in required)
            raise ConfigError("command line", str(error), f"{known}, --config.x.y=...") from None

    def fail(error: Exception | str, code: int):
        print(f"\n{error}", file=sys.stderr, flush=True)
        leave(code)

    def leave(code: int):
        if processes.hosts():  # JAX's own end would wait minutes for those that never come
            if code != EXIT_LOST:
                with contextlib.suppress(HostsError):  # all with one error: together
                    processes.barrier("leave", _LEAVE_SECONDS)
            sys.stdout.flush()
            os._exit(code)
        sys.exit(code)

    try:
        argv, overrides = take_overrides(sys.argv)
        app.run(guarded, argv=argv, flags_parser=parsed)
    except (ConfigError, DataError, BadSample) as error:
        if getattr(error, "where", "").startswith("config.") and "config" in flags.FLAGS:
            error.file = error.file or flags.FLAGS["config"].value or ""
        fail(error, EXIT_CONFIG)
    except CheckpointError as error:  # all of them write one: it can be where a lost one shows
        said = processes.lost(error)
        fail(said or error, EXIT_LOST if said else EXIT_FAILED)
    except (RunError, MetricsError) as error:
        fail(error, EXIT_FAILED)
    except HostsError as error:  # before they have met, or of one that came and has gone
        fail(error, EXIT_LOST if processes.hosts() else EXIT_FAILED)
    except Exception as error:
        if not processes.hosts():
            raise
        if said := processes.lost(error):
            fail(said, EXIT_LOST)
        traceback.print_exc()
        leave(EXIT_FAILED)
