"""Copies of a run's metrics for Weights & Biases and TensorBoard: replays of the lines of
metrics.jsonl, each sent once however often the run is started again."""

from __future__ import annotations

import contextlib
import math
import pathlib
import secrets as random
from collections.abc import Iterable, Mapping
from typing import Any, NotRequired, Protocol, TypedDict

from clipx.config import reading
from clipx.errors import MetricsError, optional
from clipx.training.workdir import write_json

_HEAD = ("step", "examples", "epoch")  # what a line has beside its metrics


class Sender(Protocol):
    """Where lines go."""

    def send(self, step: int, values: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class _State(TypedDict):
    step: int  # of the last line that was sent
    lines: int  # lines of that step that were sent
    id: NotRequired[str]


class Replay:
    """Sends the lines of a run to one place, from the first that was not sent yet.

    file: keeps how far it is. again_after: lines after this step are sent again, as the place has
    forgotten them; None: what was sent stays sent.
    """

    def __init__(self, file: pathlib.Path, sender: Sender, *, again_after: int | None = None):
        self._file, self._sender = file, sender
        state = read_state(file)
        self._sent = (state["step"], state["lines"])
        if again_after is not None and self._sent[0] > again_after:
            self._sent = (again_after, 1 << 31)
        self._extra = {key: state[key] for key in ("id",) if key in state}
        self._place = (-1, 0)

    def replay(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Sends those of a file's first rows that were not sent."""
        for row in rows:
            self.send(row)

    def send(self, row: Mapping[str, Any]) -> None:
        """Sends the next line of the file, unless it was sent before."""
        step = row["step"]
        lines = self._place[1] + 1 if step == self._place[0] else 1
        self._place = (step, lines)
        if self._place <= self._sent:
            return
        self._sender.send(step, {key: x for key, x in row.items() if key not in _HEAD})
        self._sent = self._place
        self._file.parent.mkdir(exist_ok=True)
        write_json(self._file, {**self._extra, "step": step, "lines": lines})

    def close(self) -> None:
        self._sender.close()


def read_state(file: pathlib.Path) -> _State:
    """How far a replay is. A file that is missing or damaged stands for nothing sent."""
    try:
        return reading.read_json(file, _State)
    except (OSError, ValueError):
        return {"step": -1, "lines": 0}


class _TensorBoard:
    """Event files that TensorBoard reads, without the points after `step`."""

    def __init__(self, folder: pathlib.Path, step: int):
        need = "config.train.tensorboard needs tensorboardX, which is not installed"
        with optional("tensorboard", MetricsError, need):
            import tensorboardX
        self._open = contextlib.ExitStack()
        writer = tensorboardX.SummaryWriter(str(folder), purge_step=step + 1)
        self._writer = self._open.enter_context(writer)

    def send(self, step: int, values: Mapping[str, Any]) -> None:
        for key, value in values.items():
            if math.isfinite(value):
                self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._open.close()


class _Wandb:
    """A run of Weights & Biases with an id of its own, to which every restart adds."""

    def __init__(self, folder: pathlib.Path, project: str, id_: str, config: Mapping[str, Any]):
        need = "config.train.wandb needs wandb, which is not installed"
        with optional("wandb", MetricsError, need):
            import wandb
        try:
            self._run = wandb.init(
                project=project,
                id=id_,
                name=folder.name,
                dir=str(folder),
                config=dict(config),
                resume="allow",
                settings=wandb.Settings(silent=True, console="off"),
            )
        except Exception as error:  # of a service, which raises many kinds
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise MetricsError(
                f"config.train.wandb={project}: Weights & Biases cannot be reached ({first}); "
                "`wandb login`, or WANDB_MODE=offline to send the run later with `wandb sync`"
            ) from None

    def send(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def tensorboard(workdir: pathlib.Path, step: int) -> Replay:
    """A replay to event files in the workdir, for a run that goes on from `step`."""
    folder = workdir / "tensorboard"
    return Replay(folder / "replay.json", _TensorBoard(folder, step), again_after=step)


def wandb(workdir: pathlib.Path, project: str, config: Mapping[str, Any]) -> Replay:
    """A replay to Weights & Biases. The run's id is kept in the workdir."""
    file = workdir / "wandb.json"
    state = read_state(file)
    id_ = state.get("id") or random.token_hex(4)
    write_json(file, {**state, "id": id_})
    return Replay(file, _Wandb(workdir, project, id_, config))
