"""Reads one checkpoint, and tells what speaks against it. No file is changed."""

from __future__ import annotations

import json
import pathlib
import sys

import jax
import numpy as np

from clipx.errors import CheckpointError, cause, readable
from clipx.parallel import processes
from clipx.training import proof
from clipx.training.proof import Finding

_SECONDS = 1200.0  # that processes wait for each other, which read different files
_ARRAYS = "state/"  # where Orbax stores the item of this name


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
        own_why = _unsound(folder) or (_unsound_state(folder) if whole else "")
        why = next(filter(None, processes.gather("sound", own_why, _SECONDS)), "")
        if whole and not why:
            say(
                f"{folder}: a checkpoint without proof, of clipx 0.1 or of a run that was killed "
                "right after a save. It loads whole, and all its numbers are finite."
            )
    return readable(why)


def _unsound(folder: pathlib.Path) -> str:
    """What is wrong with the JSON of a checkpoint; "" if nothing."""
    from clipx.training import orbax_files

    try:
        run, _ = orbax_files.read_run(folder), orbax_files.read_metrics(folder)
    except CheckpointError as error:
        return cause(error)
    except (OSError, ValueError, RecursionError) as error:
        return f"its metrics cannot be read: {cause(error)}"
    return "" if isinstance(run, dict) else "its run is not a JSON object"


def _unsound_state(folder: pathlib.Path) -> str:
    """What is wrong with the arrays of a checkpoint, all of which are read; "" if nothing."""
    from clipx.training import orbax_files

    try:
        state = orbax_files.read_arrays(folder)
        step = int(state["step"])
    except Exception as error:
        return f"its arrays cannot be read: {cause(error)}"
    if step != int(folder.name):
        return f"it holds the state of step {step}"
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        if jax.numpy.issubdtype(x.dtype, np.floating) and not np.isfinite(x).all():
            return f"{jax.tree_util.keystr(path, simple=True, separator='/')} is not finite"
    return ""


def say(text: str) -> None:
    """Prints a line on process 0, beside what a command prints as its result."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)
