"""Which checkpoints are kept, and which one `best` names. A "run" here saves a tiny state."""

import json

import jax.numpy as jnp
import pytest

from clipx.errors import ConfigError
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
