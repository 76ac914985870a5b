"""Reads one checkpoint, and tells what speaks against it. No file is changed."""

from __future__ import annotations

import functools
import json
import pathlib
import sys
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from clipx.errors import CheckpointError, readable
from clipx.parallel import processes
from clipx.training import proof
from clipx.training.proof import Finding

_SECONDS = 1200.0  # that processes wait for each other, which read different files
_ARRAYS = "state/"  # where Orbax stores the item of this name


def read(folder: pathlib.Path, **item: ocp.args.CheckpointArgs) -> Any:
    """One item of the checkpoint in `folder`. Raises `CheckpointError` if it cannot be read."""
    (name,) = item
    drop_late_reports()
    try:
        reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
        return reader.restore(folder, args=ocp.args.Composite(**item))[name]
    except Exception as error:
        raise CheckpointError(
            f"cannot read checkpoint {folder.name} in {folder.parent}: {line(error)}"
        ) from error


def read_metrics(folder: pathlib.Path) -> dict[str, float] | None:
    """The metrics that the checkpoint in `folder` stores; None if it stores none."""
    try:
        handler = ocp.JsonCheckpointHandler(filename="metrics")
        return dict(handler.restore(epath.Path(folder) / "metrics"))
    except FileNotFoundError:
        return None


def fault(folder: pathlib.Path, *, whole: bool) -> str:
    """Why the checkpoint in `folder` is damaged; "" if it is not. All processes must ask together,
    and get the same answer: each reads its share.

    whole: False to read all but its arrays.
    """
    index, count = jax.process_index(), jax.process_count()
    without = "\0" if whole else _ARRAYS  # no name has a zero byte
    own = proof.check(folder, process=index, processes=count, without=without)
    told = processes.gather("check", json.dumps([own.fault, own.proven]), _SECONDS)
    found = [Finding(*json.loads(text)) for text in told]
    why = next((finding.fault for finding in found if finding.fault), "")
    if not why and not all(finding.proven for finding in found):
        own_why = _unsound(folder) or (_unsound_state(folder / "state") if whole else "")
        why = next(filter(None, processes.gather("sound", own_why, _SECONDS)), "")
        if whole and not why:
            say(
                f"{folder}: a checkpoint without proof, of clipx 0.1 or of a run that was killed "
                "right after a save. It loads whole, and all its numbers are finite."
            )
    return readable(why)


def _unsound(folder: pathlib.Path) -> str:
    """What is wrong with the JSON of a checkpoint; "" if nothing."""
    try:
        stored = {"run": read(folder, run=ocp.args.JsonRestore()), "metrics": read_metrics(folder)}
    except CheckpointError as error:
        return line(error)
    except (OSError, ValueError, RecursionError) as error:
        return f"its metrics cannot be read: {line(error)}"
    return "" if isinstance(stored["run"], dict) else "its run is not a JSON object"


def _unsound_state(folder: pathlib.Path) -> str:
    """What is wrong with the arrays of a checkpoint, all of which are read; "" if nothing."""
    drop_late_reports()
    try:
        reader, path = ocp.PyTreeCheckpointHandler(), epath.Path(folder)
        tree = reader.metadata(path).tree
        plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        state = reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=plain))
        step = int(state["step"])
    except Exception as error:
        return f"its arrays cannot be read: {line(error)}"
    if step != int(folder.parent.name):
        return f"it holds the state of step {step}"
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        if jax.numpy.issubdtype(x.dtype, np.floating) and not np.isfinite(x).all():
            return f"{jax.tree_util.keystr(path, simple=True, separator='/')} is not finite"
    return ""


@functools.cache  # once in a process
def drop_late_reports() -> None:
    """Lets Python print no traceback for reads and writes that end after another one has failed:
    they report to Orbax's event loop, which is closed by then."""
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook


def say(text: str) -> None:
    """Prints a line on process 0, beside what a command prints as its result."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


def line(error: BaseException) -> str:
    """The innermost cause of an error, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    for reason in ("No space left on device", "RESOURCE_EXHAUSTED", "Permission denied"):
        if reason in text:
            return reason.replace("RESOURCE_EXHAUSTED", "out of space or memory")
    return text[:300]
