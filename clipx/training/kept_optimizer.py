"""The optimizer's state of another run, to start from: `config.init_optimizer`."""

from __future__ import annotations

import jax
import numpy as np

from clipx.errors import ConfigError
from clipx.interop.model import cpu
from clipx.training.optimizer import from_start
from clipx.training.pretrained import WHERE, workdir
from clipx.training.run import Run, restore
from clipx.types import PyTree


def optimizer_state(run: Run) -> PyTree:
    """The optimizer's state of the run that `config.init_from` names, as NumPy arrays, with its
    count of updates at 0. Raises `ConfigError` for a model of another library, and for the state of
    another optimizer or of other parameters."""
    path, where = run.config.init_from, "config.init_optimizer"
    if (checkpoint := workdir(path)) is None:
        found = f"true, while {WHERE} is {path!r}"
        raise ConfigError(where, found, "a run of clipx in config.init_from", f"{where}=false")
    devices = jax.devices() if jax.process_count() > 1 else [cpu()]
    given = restore(*checkpoint, evals=False, devices=devices)[1].opt_state
    a, b = (jax.tree_util.tree_flatten_with_path(x)[0] for x in (given, run.state.opt_state))
    shapes = [{jax.tree_util.keystr(p): x.shape for p, x in leaves} for leaves in (a, b)]
    if shapes[0] != shapes[1]:
        other = min(k for k, _ in shapes[0].items() ^ shapes[1].items())
        sizes = " and ".join(str(shape.get(other, "nothing")) for shape in shapes)
        found = f"another state in {path}: {other} is {sizes} here"
        raise ConfigError(where, found, "the same optimizer and parameters", f"{where}=false")
    state = jax.tree.unflatten(jax.tree.structure(run.state.opt_state), [x for _, x in a])
    return jax.tree.map(np.asarray, from_start(state))
