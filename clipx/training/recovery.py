"""The files of a workdir that its checkpoints hold too: config.json, tokenizer.json and
metrics.jsonl. A damaged one is restored, and a valid one of another run is refused."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

from clipx.config import binding as configs
from clipx.data.text import tokenizers
from clipx.errors import CheckpointError, ConfigError, DataError
from clipx.parallel import processes
from clipx.training import metrics
from clipx.training.assemble import bind_objective
from clipx.training.checkpoint import Checkpoints
from clipx.training.checkpoint_reader import fault, say
from clipx.training.schema import Config, EvalSpec, data_section
from clipx.training.workdir import other_settings, read_config, read_json, set_aside, write_json

_REMOVE = (
    "if {0} was changed or replaced, remove it: it is written again from the checkpoint. If the "
    "checkpoint is of another run, move it out of the folder"
)


def mend(folder: pathlib.Path, step: int, saved: Mapping[str, Any]) -> None:
    """Restores the workdir's files that are damaged or missing, with a line for each; what was
    damaged is renamed to `<name>.damaged`. All processes must call it together.

    step, saved: the checkpoint that the run goes on from, and its JSON. Raises `ConfigError` with
    the difference for a valid config or tokenizer that is not the checkpoint's.
    """
    if why := refuse_strange_config(folder, step, saved["config"]):
        _restore(folder / "config.json", why, step, lambda p: write_json(p, saved["config"]))
    if why := _tokenizer_fault(folder, step, saved["tokenizer"]):
        _restore(folder / "tokenizer.json", why, step, lambda p: write_json(p, saved["tokenizer"]))
    if jax.process_index() == 0:
        _mend_metrics(folder, step)
    processes.gather("mended", "")


def run_config(folder: pathlib.Path) -> dict[str, Any]:
    """The config of the run in a workdir: that of config.json, or, if the file is damaged or
    missing, that of the newest checkpoint, with a line. Changes no file.

    Raises `ConfigError` if there is neither.
    """
    config, why = _config(folder)
    if config is not None:
        return config
    checkpoints = Checkpoints(folder)
    if not checkpoints.steps:
        return read_config(folder)  # raises what is wrong with the file
    step = checkpoints.step("latest")
    say(f"{folder / 'config.json'} is {why}; the config of checkpoint {step} is taken")
    return checkpoints.restore_run(step)["config"]


def run_tokenizer(folder: pathlib.Path, step: str = "") -> dict[str, Any]:
    """The tokenizer of the run in a workdir, as its checkpoint stores it; of a workdir without
    checkpoints that of tokenizer.json.

    step: of the checkpoint; "" is the newest whose JSON is not damaged. Raises `CheckpointError` if
    there is none.
    """
    checkpoints = Checkpoints(folder)
    if not checkpoints.steps:
        return read_json(folder / "tokenizer.json")
    faults = []
    for number in [int(step)] if step else reversed(checkpoints.steps):
        if not (why := fault(checkpoints.folder / str(number), whole=False)):
            return checkpoints.restore_run(number)["tokenizer"]
        faults.append(f"checkpoint {number} is damaged ({why})")
    raise CheckpointError(f"{checkpoints.folder}: {', '.join(faults)}")


def refuse_strange_config(folder: pathlib.Path, step: int, saved: Mapping[str, Any]) -> str:
    """What is wrong with config.json; "" for a valid file. Raises `ConfigError` if it is valid and
    not the config of the checkpoint of `step`, which is `saved`. Settings that a run may change
    when it goes on may differ. A file with an unknown key or a wrong type is damaged."""
    config, why = _config(folder)
    if config is not None and (lines := other_settings(saved, config)):
        if not _binds(config):
            return "damaged"
        _refuse(folder / "config.json", step, lines)
    return why


def _binds(config: Mapping[str, Any]) -> bool:
    """Whether the sections of a config have known keys alone, with values of their types."""
    try:
        bound = configs.bind(Config, config)
        bind_objective(bound)
        data, _ = data_section(bound.data)
        for name, section in bound.evals.items():
            EvalSpec.check(name, section, data)
    except ConfigError:
        return False
    return True


def _tokenizer_fault(folder: pathlib.Path, step: int, saved: dict[str, Any]) -> str:
    """What is wrong with tokenizer.json; "" for the tokenizer of the checkpoint of `step`, which is
    `saved`. Raises `ConfigError` for another tokenizer."""
    path = folder / "tokenizer.json"
    try:
        text = read_json(path)
        if text == saved:  # to load a vocabulary takes a while
            return ""
        a, b = (tokenizers.load(x).save() for x in (saved, text))
    except (ConfigError, DataError):
        return _wrong(path)
    if a != b:
        lines = configs.difference(a["config"], b["config"], "tokenizer")
        _refuse(path, step, lines or ["tokenizer: another vocabulary"])
    return ""


def _refuse(path: pathlib.Path, step: int, lines: list[str]) -> None:
    raise ConfigError(
        "--workdir",
        f"{path}, which is not of the run of checkpoint {step} (checkpoint -> file):\n    "
        + "\n    ".join(lines),
        "files of one run",
        _REMOVE.format(path.name),
    )


def _config(folder: pathlib.Path) -> tuple[dict[str, Any] | None, str]:
    """(config.json, ""), or (None, what is wrong with the file)."""
    try:
        return read_config(folder), ""
    except ConfigError:
        return None, _wrong(folder / "config.json")


def _wrong(path: pathlib.Path) -> str:
    return "damaged" if path.exists() else "missing"


def _restore(
    path: pathlib.Path, why: str, step: int, write: Callable[[pathlib.Path], object]
) -> None:
    """Process 0 writes the file again, from the checkpoint of `step`."""
    if jax.process_index() == 0:
        aside = f", and was renamed to {set_aside(path)}" if path.exists() else ""
        write(path)
        say(f"{path} was {why}{aside}; it is restored from checkpoint {step}")


def _mend_metrics(folder: pathlib.Path, step: int) -> None:
    """Restores the lines of metrics.jsonl that were written before the checkpoint, unless they are
    there."""
    path, copy = folder / metrics.FILE, folder / "checkpoints" / str(step) / metrics.FILE
    if not copy.exists():  # of clipx 0.1, or killed before it was copied
        if step and not metrics.read(folder):
            say(f"{path} is {_wrong(path)} and checkpoint {step} has no copy: its lines are lost")
        return
    lines = copy.read_bytes()
    if path.is_file():
        with open(path, "rb") as file:
            if file.read(len(lines)) == lines:
                return
    _restore(path, _wrong(path), step, lambda p: p.write_bytes(lines))
