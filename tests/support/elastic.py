"""Trains runs of one config in one process, and writes what each did:

    python -m support.elastic FILE RUNS [ADDRESS PROCESSES PROCESS]

RUNS is JSON: a list of {"workdir", "config", "devices"}, with complete configs. Every process
writes FILE-<process>.json: for each run its losses by step, and the rows that this process loaded.
"""

import json
import pathlib
import sys

import jax

from clipx.training import loop
from clipx.training.feed import feed
from clipx.training.session import open_session
from support.runs import rows


def train(workdir, config, devices):
    """Trains to the end on the first `devices` devices (None: all)."""
    seen = {}

    def watched(run, data, *, start):
        for step, (batch, host) in enumerate(feed(run, data, start=start), start):
            seen[step] = sorted({int(row) for row in host["row"]})
            yield batch, host

    loop.feed = watched
    chosen = jax.devices()[:devices]
    assert open_session(config, workdir, chosen).train()[1]
    losses = {row["step"]: row["loss"] for row in rows(pathlib.Path(workdir)) if "loss" in row}
    return {"rows": seen, "losses": losses}


if __name__ == "__main__":
    file, runs, *several = sys.argv[1:]
    if several:
        jax.distributed.initialize(several[0], *map(int, several[1:]))
    results = [train(**run) for run in json.loads(runs)]
    pathlib.Path(f"{file}-{jax.process_index()}.json").write_text(json.dumps(results))
