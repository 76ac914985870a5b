"""Which checkpoints are kept, and which one `best` names. A "run" here saves a tiny state."""

import errno
import itertools
import json
import os
import threading
import time

import jax.numpy as jnp
import pytest

from clipx.errors import CheckpointError, ConfigError
from clipx.training import proof
from clipx.training.checkpoint import Checkpoints
from clipx.types import TrainState

SCORE, RANK, LOSS = "r/mean_recall", "r/text_to_image_median_rank", "loss/image"
EVALS = {"r": {"evaluator": "retrieval"}}


def state(step):
    return TrainState(jnp.int32(step), {"w": jnp.float32(step)}, (), {}, {})


def run(folder, points, *, best=SCORE, keep=1, metric=None, restart=False):
    """Saves a state for each (step, value); None is a state that was not evaluated. `restart`
    opens the folder anew for each."""

    def opened():
        return Checkpoints(folder, keep=keep, best=best, evals=EVALS)

    checkpoints = opened()
    for step, value in points:
        if restart:
            checkpoints.close()
            checkpoints = opened()
        metrics = {} if value is None else {metric or best: value, "r/other": 1.0}
        checkpoints.save(step, state(step), {"at": step}, metrics)
    checkpoints.wait()
    checkpoints.close()
    return opened()


def log(folder, points, name=SCORE):
    lines = [json.dumps({"step": step, name: value}) + "\n" for step, value in points]
    (folder / "metrics.jsonl").write_text("".join(lines))


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize(
    "best, values, expected",
    [
        (SCORE, (0.9, 0.5, 0.3, 0.2), 1),
        (SCORE, (0.2, 0.5, 0.3, 0.4), 2),
        (SCORE, (0.2, 0.5, 0.5, float("nan")), 2),  # the first of equal ones
        (RANK, (9.0, 3.0, 5.0, 7.0), 2),
        (LOSS, (0.4, 0.2, 0.3, float("inf")), 2),
    ],
)
def test_best_is_the_best(tmp_path, best, values, expected, restart):
    checkpoints = run(tmp_path, list(enumerate(values, 1)), best=best, restart=restart)
    assert checkpoints.steps == sorted({expected, 4})
    assert checkpoints.step("best") == checkpoints.step("") == expected
    assert checkpoints.step("latest") == 4
    assert int(checkpoints.restore(expected, state(0)).step) == expected


def test_states_that_were_not_evaluated_do_not_push_the_best_out(tmp_path):
    points = [(1, 0.2), (2, None), (3, 0.9), (4, None), (5, None), (6, 0.1)]
    checkpoints = run(tmp_path, points, keep=2, restart=True)
    assert checkpoints.steps == [3, 5, 6]
    assert checkpoints.step("best") == 3


def test_a_metric_of_no_checkpoint(tmp_path, capsys):
    """`best` is refused. The default of export, `init_from` and `clipx.load` says what it takes."""
    checkpoints = run(tmp_path, [(1, 0.9), (2, 0.5)], metric="r/renamed", keep=2)
    with pytest.raises(ConfigError, match=f"no checkpoint with a value of {SCORE}") as error:
        checkpoints.step("best")
    assert error.value.fix == "--step=latest"
    assert checkpoints.step("") == 2
    err = capsys.readouterr().err
    assert f"no checkpoint with a value of {SCORE}" in err and "step 2, is taken" in err


def test_another_metric_is_chosen_later(tmp_path):
    """All metrics of a state are stored, so `train.best` may change between two starts."""
    run(tmp_path, [(1, 0.9), (2, 0.5)], keep=2)
    other = Checkpoints(tmp_path, best="r/other", evals=EVALS)
    assert other.step("best") == 1
    with pytest.raises(ConfigError, match="train.best names a metric"):
        Checkpoints(tmp_path).step("best")


def test_old_checkpoints_without_metrics(tmp_path, capsys):
    """clipx 0.1 stored none: metrics.jsonl tells which kept step was best, and a best that is lost
    is named."""
    run(tmp_path, [(2, None), (3, None), (4, None)], keep=3)
    log(tmp_path, [(1, 0.9), (2, 0.3), (3, 0.6), (4, 0.2)])
    checkpoints = Checkpoints(tmp_path, best=SCORE, evals=EVALS, keep=1)
    assert checkpoints.step("best") == 3
    err = capsys.readouterr().err
    assert "was best at step 1 (0.9), which has no checkpoint" in err
    assert "Step 3 (0.6) is the best of 2, 3, 4" in err
    checkpoints.save(5, state(5), {}, {SCORE: 0.1})  # goes on: the best of them stays
    checkpoints.wait()
    assert checkpoints.steps == [3, 5]
    assert checkpoints.step("best") == 3


@pytest.mark.parametrize("which", ["7", "first", "-1", "1.0"])
def test_a_step_that_is_none(tmp_path, which):
    with pytest.raises(ConfigError, match=r"one of \[1, 2\], latest or best"):
        run(tmp_path, [(1, 0.9), (2, 0.5)], keep=2).step(which)


def damage(folder, step):
    """One other bit in the largest file of a checkpoint."""
    path = max((folder / "checkpoints" / str(step)).rglob("d/*"), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_damaged_checkpoint_is_set_aside(tmp_path, capsys):
    """The run goes on from the one before; without any it ends, and never starts again silently."""
    run(tmp_path, [(2, None), (4, None), (6, None)], keep=3)
    assert Checkpoints(tmp_path).newest_proven() == 6
    assert Checkpoints(tmp_path).newest_proven(before=6) == 4
    assert capsys.readouterr().err == ""
    damage(tmp_path, 6)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.step("latest") == 4  # reading renames nothing
    with pytest.raises(CheckpointError, match="6 is damaged .*other bytes than were written"):
        checkpoints.step(6)
    capsys.readouterr()
    assert checkpoints.newest_proven() == 4
    assert checkpoints.steps == [2, 4]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "renamed to 6.damaged. Step 4 is taken: 2 steps" in said
    checkpoints.save(6, state(6), {}, {})  # saved again, and damaged again
    checkpoints.close()
    for step in (4, 6):
        damage(tmp_path, step)
    for match in ("renamed to 6.damaged.2, 4.damaged; no", "only damaged ones: 4.dam"):
        with pytest.raises(CheckpointError, match=match):
            Checkpoints(tmp_path).newest_proven()


def test_a_clock_that_jumps_ends_no_save(tmp_path, monkeypatch):
    """Every look at the wall clock finds it ten days later. Orbax counts its own limit by it."""
    real, looks = time.time, itertools.count()
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: real() + 864_000 * next(looks))
        run(tmp_path, [(2, None)])
    assert next(looks) > 5
    assert Checkpoints(tmp_path).newest_proven() == 2


def test_a_write_that_hangs_is_named(tmp_path, monkeypatch):
    go = threading.Event()
    monkeypatch.setattr(proof, "write", lambda *arguments, **named: go.wait(60))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, state(2), {}, {})
    with pytest.raises(CheckpointError, match="of step 2 .*it is not written after 0.1 s"):
        checkpoints.wait(0.1)
    go.set()
    checkpoints.close()


def test_a_proof_that_cannot_be_written_ends_the_run(tmp_path, monkeypatch):
    def full(*arguments, **named):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(proof, "write", full)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, state(2), {}, {})
    with pytest.raises(CheckpointError, match="checkpoint of step 2 .*: No space left on device;"):
        checkpoints.close()


def test_each_process_proves_and_checks_its_share(tmp_path):
    """Files carry the number of the process that writes them. Without the proof of one, and read by
    any number of processes, the others' files are still held to theirs."""
    folder = tmp_path / "7"
    names = ["state/ocdbt.process_0/d/a", "state/ocdbt.process_1/d/b", "run/metadata"]
    names += [f"state/array_metadatas/process_{i}" for i in range(2)]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    proof.write(folder, process=1, processes=2)
    assert proof.check(folder) == proof.Finding()  # the other was killed before
    proof.write(folder, process=0, processes=2)
    files = [json.loads((folder / f"proof_{i}.json").read_text())["files"] for i in range(2)]
    assert sorted(files[1]) == [names[4], names[1]] and len(files[0]) == 3
    (folder / names[1]).write_text(names[1][::-1])
    for count in (1, 2, 3, 8):
        found = [proof.check(folder, process=i, processes=count) for i in range(count)]
        assert all(one.proven for one in found)
        assert [one.fault for one in found if one.fault] == [
            "state/ocdbt.process_1/d/b has other bytes than were written"
        ]
