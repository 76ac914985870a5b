"""Trains runs of one config in one process, and writes what each did:

    python -m support.elastic FILE RUNS [ADDRESS PROCESSES PROCESS]

RUNS is JSON: a list of {"workdir", "config", "devices"}, with complete configs. Every process
writes FILE-<process>.json: for each run its losses by step, and the rows that this process loaded.
"poisoned" in a run: rows whose loss is not finite.
"""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp

from clipx.objectives.clip import CLIP
from clipx.training import loop
from clipx.training.feed import feed
from clipx.training.session import open_session
from support import ROOT
from support.runs import free_port, rows


def poison(rows):
    """A context in which the features of these rows are infinite in CLIP."""
    embed = CLIP.embed

    def infinite(self, batch, keys, *, train):
        features = embed(self, batch, keys, train=train)
        bad = jnp.isin(batch.row, jnp.array(rows))[:, None]
        return features.replace(image=jnp.where(bad, jnp.inf, features.image))

    return mock.patch.object(CLIP, "embed", infinite)


@contextlib.contextmanager
def watched():
    """A context in which the rows that runs load are kept: yields them, by step."""
    seen = {}

    def keep(run, data, *, start):
        for step, (batch, host) in enumerate(feed(run, data, start=start), start):
            seen[step] = sorted({int(row) for row in host["row"]})
            yield batch, host

    with mock.patch.object(loop, "feed", keep):
        yield seen


def train(workdir, config, devices, poisoned=()):
    """Trains to the end on the first `devices` devices (None: all)."""

    with watched() as seen, poison(poisoned) if poisoned else contextlib.nullcontext():
        assert open_session(config, workdir, jax.devices()[:devices]).train()[1]
    losses = {row["step"]: row["loss"] for row in rows(pathlib.Path(workdir)) if "loss" in row}
    return {"rows": seen, "losses": losses}


def start(file, runs, devices, processes=1):
    """Runs this file in so many processes with `devices` devices each; what each of them wrote."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": path}
    several = [f"127.0.0.1:{free_port()}", str(processes)] if processes > 1 else []
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "support.elastic", str(file), json.dumps(runs),
             *several, *[str(i)] * bool(several)],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in range(processes)
    ]  # fmt: skip
    output = [process.communicate(timeout=800)[0] for process in started]
    assert not any(process.returncode for process in started), output
    return [
        json.loads((file.parent / f"{file.name}-{i}.json").read_text()) for i in range(processes)
    ]


if __name__ == "__main__":
    file, runs, *several = sys.argv[1:]
    if several:
        jax.distributed.initialize(several[0], *map(int, several[1:]))
    results = [train(**run) for run in json.loads(runs)]
    pathlib.Path(f"{file}-{jax.process_index()}.json").write_text(json.dumps(results))
