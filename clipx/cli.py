"""What every command shares: flags, config overrides, the start of processes, and error exits."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
from absl import app, flags, logging

from clipx.config import files, secrets
from clipx.errors import (
    BadSample,
    CheckpointError,
    ConfigError,
    DataError,
    HostsError,
    MetricsError,
    RunError,
    StuckError,
)
from clipx.parallel import environment, memory, processes
from clipx.parallel.environment import find_process
from clipx.training import reference

EXIT_FAILED = 1
EXIT_CONFIG = 2  # the config, the workdir or the data is wrong: fix it, then start again
EXIT_PREEMPTED = 42  # asked to stop, and saved: start the same command again
EXIT_LOST = 134  # another process ended first; JAX exits with the same code if it notices first
_LEAVE_SECONDS = 10.0  # how long an ending process waits for the others


def take_overrides(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """`argv` without its `--config.x.y=value` arguments, and those as pairs ("x.y", "value").

    absl does not parse them, because an override may set a field that the config file leaves out.
    """
    rest, overrides, arguments = [], [], iter(argv)
    for argument in arguments:
        if not argument.startswith("--config."):
            rest.append(argument)
            continue
        path, equals, text = argument.removeprefix("--config.").partition("=")
        if not equals:
            text = next(arguments, None)
            if text is None:
                raise ConfigError(argument, "no value", f"{argument}=VALUE")
        overrides.append((path, text))
    return rest, overrides


def load_config(spec: str, overrides: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """The config of `spec` (`clip:small`, `path.py`, `path.py:variant`) as a plain dict, with
    `overrides` applied."""
    config = files.load(spec, dict(overrides).get("objective.name"))
    files.override_all(config, overrides)
    return config


def start_processes(overrides: Sequence[tuple[str, str]]) -> None:
    """Connects to the other processes of the run; does nothing for a run of a single process.

    Waits until all processes are up, and refuses processes with other versions, configs or flags.
    """
    info = find_process(os.environ)
    if info is None:
        return
    names = ("config", "workdir", "deterministic")
    values = {n: flags.FLAGS[n].value for n in names if n in flags.FLAGS}
    config = {}
    if spec := values.get("config"):
        with contextlib.suppress(ConfigError):  # the command reports it when it loads the config
            config = load_config(spec, overrides)
    command = {name: values.get(name) for name in names[1:]}
    if "extend" in flags.FLAGS and flags.FLAGS["extend"].value:
        command["extend"] = True
    processes.start(info, config, overrides=dict(overrides), **command)


def be_deterministic() -> None:
    """Makes every computation on a GPU give the same bits each time, if it is slower so; CPUs and
    TPUs do that anyway. XLA reads the flag when JAX starts its devices: raises `RunError` if it has
    done so already."""
    kept = jax.config.jax_num_cpu_devices  # pyright: ignore[reportAttributeAccessIssue]
    try:  # JAX refuses to change this setting once its devices have started
        jax.config.update("jax_num_cpu_devices", 1 if kept != 1 else 2)
    except RuntimeError:
        raise RunError(
            "--deterministic comes too late: JAX has started its devices already. Start the "
            "command in a process of its own, as `python -m clipx.train --deterministic ...`"
        ) from None
    jax.config.update("jax_num_cpu_devices", kept)
    flags_of_xla = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags_of_xla} --xla_gpu_deterministic_ops=true".strip()


def use_no_absent_tpu() -> None:
    """Takes the CPU on a machine with libtpu and no accelerator. JAX would ask libtpu for a TPU
    first, which prints several lines of errors. Whoever sets JAX_PLATFORMS is obeyed."""
    if os.environ.get("JAX_PLATFORMS") or importlib.util.find_spec("libtpu") is None:
        return
    if not environment.has_accelerator():
        jax.config.update("jax_platforms", "cpu")


def use_compile_cache() -> None:
    """Turns on JAX's compilation cache, in JAX_COMPILATION_CACHE_DIR or ~/.cache/clipx/jax."""
    if not jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(home, "clipx", "jax")))


def help_text(doc: str, sections: Sequence[str] = ()) -> str:
    """What `--help` prints: the command's docstring, its flags, and the keys of a config, with the
    values of `--config` where it is given. sections: the config's sections that the command reads;
    (): all."""
    known = flags.FLAGS.get_key_flags_for_module(sys.argv[0])
    heads = {f"  --{flag.name}={flag.default_as_str or ''}": flag.help or "" for flag in known}
    width = max(map(len, heads), default=0)
    text = [doc.strip(), "", "flags:", *(f"{head:{width}}  {x}" for head, x in heads.items())]
    if "config" not in flags.FLAGS:
        return "\n".join(text)
    given = [arg.partition("=")[2] for arg in sys.argv if arg.startswith("--config=")]
    config = load_config(given[-1], ()) if given else None
    hint = "and their defaults (with --config=NAME: those of NAME)"
    of = f"of {given[-1]}" if given else hint
    keys = reference.lines(reference.keys(config, sections))
    return "\n".join([*text, "", f"config keys {of}:", *keys])


@secrets.guarded()
def run(
    main: Callable[[list[tuple[str, str]]], int | None],
    required: Sequence[str],
    sections: Sequence[str] = (),
) -> None:
    """Parses the flags, calls `main(overrides)` and exits with the code that it returns.

    sections: as for `help_text`.

    An exception of `clipx.errors` becomes one block of text on stderr and its exit code. `required`
    names the flags that must be set. What is printed has no secrets, tracebacks included.
    """

    def checked_main(argv: list[str]) -> int | None:
        if argv[1:]:
            raise ConfigError("command line", " ".join(argv[1:]), "only flags: --name=value")
        for name in required:
            if not flags.FLAGS[name].value:
                raise ConfigError(f"--{name}", "nothing", f"--{name}=...")
        use_no_absent_tpu()
        if os.environ.get("JAX_PLATFORMS") == "cpu" or not environment.has_accelerator():
            memory.keep_pages()
        logging.set_verbosity(logging.FATAL)  # Orbax logs every file, and raises its errors anyway
        if "deterministic" in flags.FLAGS and flags.FLAGS["deterministic"].value:
            be_deterministic()
        start_processes(overrides)
        use_compile_cache()
        return main(overrides)

    def parse(argv: list[str]) -> list[str]:
        try:
            return flags.FLAGS(argv)
        except flags.Error as error:
            own = (flag.name for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0]))
            known = [f"--{name}" for name in dict.fromkeys((*required, *own))]
            raise ConfigError("command line", str(error), ", ".join(known)) from None

    def fail(error: Exception | str, code: int) -> NoReturn:
        print(f"\n{error}", file=sys.stderr, flush=True)
        if isinstance(error, StuckError) and not processes.hosts():
            sys.stdout.flush()
            os._exit(code)  # a thread waits for ever, and Python would wait for the thread
        leave(code)

    def leave(code: int) -> NoReturn:
        if processes.hosts():  # JAX's own shutdown would wait minutes for a dead process
            if code != EXIT_LOST:
                with contextlib.suppress(HostsError):  # if all processes fail, all end together
                    processes.barrier("leave", _LEAVE_SECONDS)
            sys.stdout.flush()
            os._exit(code)
        sys.exit(code)

    try:
        if {"--help", "-help", "-h", "--helpshort", "--helpfull"} & set(sys.argv[1:]):
            doc = getattr(main, "func", main).__globals__["__doc__"] or ""
            print(help_text(doc, sections))
            sys.exit(0)
        argv, overrides = take_overrides(sys.argv)
        app.run(checked_main, argv=argv, flags_parser=parse)
    except (ConfigError, DataError, BadSample) as error:
        if (
            isinstance(error, ConfigError)
            and error.where.startswith("config.")
            and "config" in flags.FLAGS
        ):
            error.file = error.file or flags.FLAGS["config"].value or ""
        fail(error, EXIT_CONFIG)
    except CheckpointError as error:  # a dead peer may first show up in a checkpoint write
        lost = processes.lost(error)
        fail(lost or error, EXIT_LOST if lost else EXIT_FAILED)
    except (RunError, MetricsError) as error:
        fail(error, EXIT_FAILED)
    except HostsError as error:  # the processes never connected, or a connected one is gone
        fail(error, EXIT_LOST if processes.hosts() else EXIT_FAILED)
    except Exception as error:
        if processes.hosts() and (lost := processes.lost(error)):
            fail(lost, EXIT_LOST)
        traceback.print_exc()  # here, where secrets are cut
        leave(EXIT_FAILED)
