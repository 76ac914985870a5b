"""Two processes with four devices each train what one process with eight devices trains."""

import os
import subprocess
import sys

import jax
import numpy as np
from support import ROOT
from support.runs import NO_EVALS, SMALL, finish, free_port, parameters, rows, small


def test_two_processes_are_one(tmp_path):
    """Law 1 across processes, with dropout, through the command itself. The two processes shard the
    parameters over all devices; the single process shards rows alone."""
    shorter = [*SMALL, ("train.total_steps", "3"), *NO_EVALS]
    mesh = [("mesh.data", "1"), ("mesh.fsdp", "4"), ("mesh.tensor", "2")]
    arguments = [f"--config.{path}={text}" for path, text in [*shorter, *mesh]]
    environment = os.environ | {
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4"),
        "PYTHONPATH": str(ROOT),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
        "JAX_NUM_PROCESSES": "2",
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "clipx.train", "--config=configs/quickstart.py",
             f"--workdir={tmp_path / 'two'}", *arguments],
            cwd=ROOT, env=environment | {"JAX_PROCESS_ID": str(i)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for i in range(2)
    ]  # fmt: skip
    output = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], output
    assert "fsdp 4 splits" in output[0] and "tensor 2 splits" in output[0]
    assert "2 process(es)" in output[0] and "2 process(es)" not in output[1]
    finish(small(*shorter[len(SMALL) :]), tmp_path / "one")
    for x, y in zip(
        jax.tree.leaves(parameters(tmp_path / "two")), jax.tree.leaves(parameters(tmp_path / "one"))
    ):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)
    two, one = (
        [row["loss"] for row in rows(tmp_path / n) if "loss" in row] for n in ("two", "one")
    )
    np.testing.assert_allclose(two, one, rtol=1e-5)
