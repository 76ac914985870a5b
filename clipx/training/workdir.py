"""The files of a workdir beside its checkpoints: written whole, read strictly, and held to one
config."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from clipx.config import binding as configs
from clipx.config import reading, secrets
from clipx.errors import ConfigError, damaged_file
from clipx.training import guesses
from clipx.training.schema import Config

# Keys that may change when a run is started again: where and how it computes, not what.
_FREE = (
    "config.mesh.",
    "config.data.workers",
    "config.data.timeout",
    "config.data.path",
    "config.data.features.evals",
    "config.train.microbatches",
    "config.train.log_every_steps",
    "config.train.save_every_steps",
    "config.train.eval_every_steps",
    "config.train.keep",
    "config.train.best",
    "config.train.tensorboard",
    "config.train.wandb",
    "config.train.rollback",
    "config.train.patience",
    "config.train.extended_from",
    "config.evals",
)
# what may change where a run is extended: its length, and the schedule of the steps that follow
EXTENSION = (
    "config.train.total_",
    "config.optimizer.learning_rate",
    "config.optimizer.final_learning_rate",
    "config.optimizer.schedule",
    "config.optimizer.warmup_",
    "config.optimizer.hold_steps",
)
# folders that may lie elsewhere, but not be left out or named anew: what they hold is checked
_FOLDERS = ("config.data.features.image", "config.data.features.text")


def prepare_workdir(workdir: str | os.PathLike) -> pathlib.Path:
    """The absolute path of the workdir, created if it does not exist.

    Raises `ConfigError` for a folder that cannot be written.
    """
    path = pathlib.Path(workdir).expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write_test_{os.getpid()}"
        probe.write_bytes(b"clipx")
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            "--workdir", f"{path}: {error.strerror}", "a folder that can be written"
        ) from None
    return path


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes `value` as JSON, atomically: a reader never sees half a file."""
    aside = path.with_suffix(path.suffix + ".part")
    aside.write_text(json.dumps(secrets.cut_all(value), indent=2, sort_keys=True) + "\n")
    aside.replace(path)


def read_json(path: pathlib.Path) -> Any:
    """The JSON in a file of a workdir. Raises `ConfigError` if it is missing or damaged."""
    try:
        return reading.read_json(path)
    except FileNotFoundError:
        raise ConfigError(
            "--workdir", f"no {path.name} in {path.parent}", "the workdir of a clipx run"
        ) from None
    except (OSError, ValueError) as error:
        raise damaged_file(path, error) from None


def read_config(workdir: pathlib.Path) -> dict[str, Any]:
    """The config.json of a workdir. Raises `ConfigError` for a file that is missing or damaged."""
    path = workdir / "config.json"
    config = read_json(path)
    try:
        configs.check(Config, config)
    except ConfigError as error:
        error.file = str(path)
        raise
    return config


def set_aside(path: pathlib.Path) -> str:
    """Renames a damaged file or folder of a workdir to `<name>.damaged`, with a number if there is
    one already. Returns the new name. Raises `OSError`."""
    names = (f"{path.name}.damaged{number}" for number in ("", *(f".{i}" for i in range(2, 1000))))
    free = next(name for name in names if not path.with_name(name).exists())
    path.rename(path.with_name(free))
    return free


def other_settings(old: Mapping, new: Mapping) -> list[str]:
    """What makes `new` the config of another run than `old`, a line each. Where and how a run
    computes may differ, and keys that only the new config has. A run that was extended since may
    have another length and schedule."""
    begun = [config.get("train", {}).get("extended_from", 0) for config in (old, new)]
    free = (*_FREE, *(EXTENSION if begun[1] > begun[0] else ()))
    return [
        line
        for line in configs.difference(old, new)
        if not line.startswith(free)
        and ": '(absent)' -> " not in line
        and not (line.startswith(_FOLDERS) and "None" not in line)
    ]


def refuse_other_config(workdir: pathlib.Path, complete: Mapping) -> None:
    """Raises `ConfigError` with a diff if the workdir's run has another config.

    The mesh, micro-batches, workers, logging and evals may differ, and keys that only the new
    config has. A setting that is left open has the value that the run guessed.
    """
    complete = guesses.fill(complete, guesses.read(workdir))
    lines = other_settings(read_json(workdir / "config.json"), complete)
    if lines:
        raise ConfigError(
            "--workdir",
            f"{workdir} holds a run of another config (old -> new):\n    " + "\n    ".join(lines),
            "the run's own config, to continue from its last checkpoint",
            "use another --workdir for a new run, or the old values",
        )
