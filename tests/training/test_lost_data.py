"""Runs that lose their data or a worker in the middle: the steps so far are saved, one line says
what is wrong, and the run goes on to the same bits once it is mended."""

import os
import signal
import subprocess

import jax
import numpy as np
import pytest
from support.runs import NO_EVALS, finish, parameters, rows, small, start, wait_for
from support.shards import pairs, shard

from clipx import cli
from clipx.errors import RunError
from clipx.train import train
from clipx.training.checkpoint import Checkpoints
from clipx.training.stop import Stop

TWO = jax.devices()[:2]
STEPS = 40


class At(Stop):
    """Does something once, at the start of a step."""

    def __init__(self, step, action):
        super().__init__()
        self.left, self.action = step, action

    def __call__(self):
        if self.left == 0:
            self.action()
        self.left -= 1
        return super().__call__()


def config(path, **data):
    out = pairs(
        path, *NO_EVALS, ("train.total_steps", str(STEPS)), ("train.save_every_steps", "50")
    )
    out["evals"] = {}
    out["data"] |= data
    return out


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(the shard, the parameters after a run over it that nothing disturbed)."""
    folder = tmp_path_factory.mktemp("whole")
    path = shard(folder / "a.tar")
    finish(config(path), folder / "run", TWO)
    return path, parameters(folder / "run", TWO)


def same(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.mark.slow  # trains several times
@pytest.mark.parametrize("fault", ["gone", "replaced"])
def test_a_shard_that_is_lost_in_mid_run_loses_no_step_and_no_row(tmp_path, whole, fault, capsys):
    original, expected = whole
    path, away = tmp_path / "a.tar", tmp_path / "away.tar"
    path.write_bytes(original.read_bytes())

    def lose():
        path.rename(away)
        if fault == "replaced":
            shard(path, **{"0003.txt": b"another caption"})

    with pytest.raises(RunError) as error:
        train(config(path), str(tmp_path / "run"), TWO, stop=At(3, lose))
    said = str(error.value)
    reason = {"gone": "gone since", "replaced": "has changed since"}[fault]
    assert said.startswith(f"{path}: {reason}") and "\n" not in said
    (saved,) = Checkpoints(tmp_path / "run").steps
    assert 3 <= saved < STEPS
    assert f"saved step {saved}, as the run cannot go on" in capsys.readouterr().out
    assert not (tmp_path / "run/quarantine.jsonl").exists()
    away.rename(path)
    finish(config(path), tmp_path / "run", TWO)
    assert f"continuing from step {saved} " in capsys.readouterr().out
    assert same(parameters(tmp_path / "run", TWO), expected)
    logged = [row["step"] for row in rows(tmp_path / "run")]
    assert logged == list(range(1, STEPS + 1))


def workers_of(process):
    done = subprocess.run(
        ["ps", "-ww", "--ppid", str(process.pid), "-o", "pid=", "-o", "args="],
        capture_output=True,
        text=True,
    )
    lines = [line.split(None, 1) for line in done.stdout.splitlines()]
    return [int(pid) for pid, command in lines if "spawn_main" in command]


LONG = [
    ("train.total_steps", "100000"),
    ("train.save_every_steps", "50000"),
    ("data.workers", "2"),
    *NO_EVALS,
]


@pytest.mark.slow  # a command in a new process
@pytest.mark.parametrize("moment", ["start", "middle"])
def test_a_killed_worker_ends_the_command_with_a_line_after_a_save(tmp_path, moment):
    process = start(tmp_path, *LONG, devices=1)
    try:
        wait_for(lambda: len(workers_of(process)) == 2, process, 400)
        if moment == "middle":
            file = tmp_path / "metrics.jsonl"
            wait_for(lambda: file.exists() and len(rows(tmp_path)) > 3, process, 400)
        os.kill(workers_of(process)[0], signal.SIGKILL)
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 1, err
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if "SIGKILL" in line]
    assert line.startswith("a data worker (process ")
    if moment == "start":
        return  # the other worker may have delivered rows before: then a step is saved
    saved = Checkpoints(tmp_path).latest
    assert saved and f"saved step {saved:,}, as the run cannot go on" in out
    whole, stop = tmp_path / "whole", At(saved, lambda: setattr(stop, "asked", True))
    config = small(*LONG, ("data.workers", "0"))
    assert train(config, str(whole), TWO[:1], stop=stop) == cli.EXIT_PREEMPTED
    # equal to the bit within a process; programs of another number of host devices round otherwise
    for x, y in zip(
        *(jax.tree.leaves(parameters(run, TWO[:1])) for run in (tmp_path, whole)), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5)
