"""`python benchmarks/checkpoints.py`: what proven checkpoints cost.

For the states of three shipped configs: how long a save holds the loop, how long it goes on
in the background, how much of that are the digests, and how long a start takes to check one. A save
may hold the loop for 2 % of the time between two saves: the last column is the fastest step for
which it does, at the config's own `save_every_steps`. The arrays are random, so nothing compresses.

`--train` also trains the quickstart for two intervals, and prints the share that its clock counted.
"""

from __future__ import annotations

import os
import pathlib
import sys
import tempfile
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import numpy as np

from clipx import cli
from clipx.training import proof
from clipx.training.checkpoint import Checkpoints
from clipx.training.run import assemble
from clipx.training.session import open_session

CONFIGS = ("quickstart", "clip:small", "clip")
SHARE = 0.02  # of the time between saves


def random_state(abstract):
    rng = np.random.default_rng(0)

    def leaf(x):
        if x.dtype == np.float32:
            return rng.standard_normal(x.shape, np.float32)
        return np.ones(x.shape, x.dtype)

    return jax.tree.map(lambda x: jax.device_put(leaf(x)), abstract)


def measure(spec: str, folder: pathlib.Path) -> list[str]:
    run = assemble(cli.load_config(spec, []), jax.devices()[:1])
    state = random_state(run.state)
    size = sum(x.nbytes for x in jax.tree.leaves(state)) / 1e6
    checkpoints, blocked, total = Checkpoints(folder), [], []
    for step in (1, 2, 3):
        start = time.perf_counter()
        checkpoints.save(step, state, {"config": run.complete}, {})
        blocked.append(time.perf_counter() - start)
        checkpoints.wait()
        total.append(time.perf_counter() - start)
    checkpoints.close()
    newest = folder / "checkpoints" / "3"
    start = time.perf_counter()
    proof.write(newest)
    digests = time.perf_counter() - start
    start = time.perf_counter()
    assert Checkpoints(folder).newest_proven() == 3
    check = time.perf_counter() - start
    every, held = run.config.train.save_every_steps, float(np.median(blocked[1:]))
    numbers = (size, held, float(np.median(total[1:])), digests, check)
    fastest = 1e3 * held / (SHARE * every)
    return [spec, *(f"{x:,.2f}" for x in numbers), f"{every:,}", f"{fastest:,.2f}"]


def trained(folder: pathlib.Path) -> None:
    config = cli.load_config("quickstart", [("train.total_steps", "201")])
    every = config["train"]["save_every_steps"]
    assert open_session(config, str(folder), jax.devices()[:1]).train()[1]
    seconds = Checkpoints(folder).restore_run(201)["seconds"]
    total = seconds["train"] + seconds["data"] + seconds["save"]
    print(
        f"quickstart, 201 steps, a save every {every}: {seconds['save']:.2f} s of {total:.1f} s "
        f"are saves, {100 * seconds['save'] / total:.2f} %"
    )


if __name__ == "__main__":
    heads = "config|MB|held s|written s|digests s|check s|every steps|2 % at ms a step"
    print("| " + heads.replace("|", " | ") + " |")
    print("|---" * (heads.count("|") + 1) + "|")
    for name in CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            print("| " + " | ".join(measure(name, pathlib.Path(folder))) + " |", flush=True)
    if "--train" in sys.argv:
        with tempfile.TemporaryDirectory() as folder:
            trained(pathlib.Path(folder))
