"""Workdirs of untrained runs, for tests that read a checkpoint."""

import pathlib

import jax
import numpy as np

from clipx.data.text import tokenizers
from clipx.training.checkpoint import Checkpoints
from clipx.training.run import assemble, with_data
from clipx.training.workdir import write_json
from support import tiny

CAPTIONS = ["two men riding horses", "a dog with a red ball", "the quick brown fox"] * 40
CLASS = ("image.pool", "class")


def save(
    folder: pathlib.Path, config, *, seed: int = 0, steps: int = 0, devices=None
) -> pathlib.Path:
    """A workdir with a checkpoint of random weights at step 3 + `steps`. The last `steps` steps are
    trained; without them nothing is compiled. On one device by default: of replicated arrays each
    device writes a part, and Orbax compiles how to cut it."""
    run = assemble(config, devices or jax.devices()[:1])
    run = with_data(run, 256, tokenizers.build(run.config.tokenizer, CAPTIONS))
    rng = np.random.default_rng(seed)

    def leaf(path, x):
        if x.ndim == 0 or not np.issubdtype(x.dtype, np.floating):
            return np.asarray(2, x.dtype) * np.ones(x.shape, x.dtype)
        if path[-1].key in ("scale", "var"):
            return rng.uniform(0.8, 1.2, x.shape).astype(x.dtype)
        fan_in = max(int(np.prod(x.shape[:-1])), 4)
        return (rng.normal(size=x.shape) * fan_in**-0.5).astype(x.dtype)

    def tree(part):
        return jax.tree_util.tree_map_with_path(leaf, part)

    state = run.state.replace(
        step=np.int32(3),
        params=tree(run.state.params),
        batch_stats=tree(run.state.batch_stats),
        opt_state=jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), run.state.opt_state),
        memory=jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), run.state.memory),
    )
    state = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), state, run.state)
    if steps:
        batch = tiny.batch(run.objective, run.batch_size)
        batch = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), batch, run.batch)
    for _ in range(steps):
        state, metrics = run.train_step(state, batch)
        assert not metrics["skipped"]
    return keep(folder, run, state, 3 + steps)


def keep(folder: pathlib.Path, run, state, step: int) -> pathlib.Path:
    """A workdir of the run with one checkpoint."""
    checkpoints = Checkpoints(folder)
    extra = {"config": run.complete, "tokenizer": run.tokenizer.save(), "rows": 256}
    checkpoints.save(step, state, extra | {"fingerprint": "0123456789ab"}, {})
    checkpoints.wait()
    checkpoints.close()
    write_json(folder / "config.json", run.complete)
    write_json(folder / "tokenizer.json", run.tokenizer.save())
    return folder
