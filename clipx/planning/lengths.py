"""How long the runs of `clipx.compare` are, so that its variants spend the same: pairs, FLOPs, or
seconds of training."""

from __future__ import annotations

import copy
import math
import pathlib
import statistics
from collections.abc import Mapping
from typing import Any, Literal

from clipx.config.durations import UNITS
from clipx.errors import RunError
from clipx.training import metrics
from clipx.training.checked import total_steps
from clipx.training.run import Run, assemble
from clipx.training.session import resolved

Budget = Literal["pairs", "flops", "seconds"]

_FIRST, _TIMED = 10, 40  # steps of a timing run that are not counted, and that are


def scaled(config: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """A copy of `config` whose run, and the warm-up of its learning rate, are `factor` as long."""
    copied = copy.deepcopy(dict(config))
    for section, name in (("train", "total"), ("optimizer", "warmup")):
        values = copied.get(section) or {}
        for unit in UNITS:
            if values.get(key := f"{name}_{unit}"):
                length = factor * values[key]
                values[key] = length if unit == "epochs" else max(round(length), 1)
    return copied


def opened(config: Mapping[str, Any], folder: pathlib.Path) -> Run:
    """The run of a config, with nothing executed; `folder` would be its workdir."""
    return assemble(resolved(config, str(folder), say=lambda line: None))


def pairs(run: Run) -> int:
    """Pairs that a run sees. Opens its data if its length is in epochs."""
    steps = total_steps(run.config, None)
    if steps is None:
        steps = total_steps(run.config, len(run.open_parts().train))
    assert steps is not None  # the rows are known
    return steps * run.batch_size


def timing(config: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """The config of a run that times the steps of `run`, which is that of `config`: some steps, and
    with episodes the passes before two of them, as compiling is part of the first. No evals."""
    copied = scaled(config, 1.0)
    steps = max(_FIRST + _TIMED, (run.objective.episode_steps or 0) + 1)
    lengths = {"total_steps": steps, "total_epochs": None, "total_examples": None}
    rest = {"log_every_steps": _FIRST, "eval_every_steps": None, "best": "", "patience": None}
    copied["train"] = {**copied["train"], **lengths, **rest}
    warmups = [f"warmup_{unit}" for unit in UNITS]  # it has to fit into the run
    kept = {k: v for k, v in (copied.get("optimizer") or {}).items() if k not in warmups}
    return {**copied, "optimizer": kept, "evals": {}}


def seconds_per_pair(folder: pathlib.Path, run: Run) -> float:
    """Seconds of training on a pair, as the timing run in `folder` took: the median of its steps
    without the first ones, and a share of its last episode's pass. run: the variant's."""
    lines = metrics.read(folder)
    steps = [x["step_seconds"] for x in lines if "step_seconds" in x and x["step"] > _FIRST]
    if not steps or not math.isfinite(step := statistics.median(steps)):
        raise RunError(f"{folder}: no step was timed; delete the folder and start again")
    passes = [line["episode/seconds"] for line in lines if "episode/seconds" in line]
    if (episode := run.objective.episode_steps) is not None:
        step += passes[-1] / episode
    return step / run.batch_size


def matched(config: Mapping[str, Any], run: Run, examples: int) -> dict[str, Any]:
    """The changes that make the run of `config` one of `examples` pairs, with a warm-up of the same
    share."""
    before = pairs(run)
    if examples == before:
        return {}
    changes: dict[str, Any] = {"train.total_examples": max(examples, run.batch_size)}
    optimizer = scaled(config, examples / max(before, 1)).get("optimizer") or {}
    for unit in UNITS:
        if optimizer.get(key := f"warmup_{unit}"):
            changes[f"optimizer.{key}"] = optimizer[key]
    return changes
