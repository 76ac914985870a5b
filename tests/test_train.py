"""`clipx.train` on a small quickstart: it trains, saves, resumes, and says what is wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import backend
from support import ROOT
from support.runs import NO_EVALS, finish, parameters, rows, small, start, wait_for

from clipx import cli
from clipx.errors import ConfigError, RunError
from clipx.serving.evaluation import evaluate
from clipx.train import train
from clipx.training import loop, run
from clipx.training.checkpoint import Checkpoints
from clipx.training.feed import feed
from clipx.training.finite import not_finite
from clipx.training.run import restore
from clipx.training.step import make_train_step

TWO = jax.devices()[:2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The workdir of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("whole")
    assert train(small(), str(workdir), TWO) == 0
    return workdir


def test_a_run_writes_metrics_config_and_report(whole, capsys):
    training = [row for row in rows(whole) if "loss" in row]
    assert [row["step"] for row in training] == list(range(1, 13))
    assert {"chance_loss", "batch/R@1", "logit_scale", "learning_rate", "grad_norm", "param_norm",
            "images_per_second", "data_wait_fraction"} <= training[0].keys()  # fmt: skip
    assert np.isclose(training[0]["chance_loss"], np.log(32))
    evaluation = rows(whole)[-1]
    assert {"zero_shot/top1", "retrieval/text_to_image_R@1"} <= evaluation.keys()
    assert json.loads((whole / "config.json").read_text())["optimizer"]["b2"] == 0.98
    assert (whole / "report.html").stat().st_size > 10_000


def test_restores_on_fewer_devices(whole):
    on_two, on_one = parameters(whole, TWO), parameters(whole, TWO[:1])
    jax.tree.map(np.testing.assert_array_equal, on_two, on_one)


def assert_same_run(workdir, other):
    """Both ended in the same bits, after the same losses."""
    jax.tree.map(np.testing.assert_array_equal, parameters(workdir), parameters(other))
    losses = [
        [(row["step"], row["loss"]) for row in rows(folder) if "loss" in row]
        for folder in (workdir, other)
    ]
    assert losses[0] == losses[1]


@pytest.mark.slow  # `test_sigterm_saves` resumes too, without a process of its own
def test_killed_and_started_again_ends_in_the_same_bits(whole, tmp_path):
    """Law 7 on one topology: SIGKILL, which no handler sees."""
    process = start(tmp_path, *NO_EVALS, devices=2)
    wait_for((tmp_path / "checkpoints" / "4").exists, process)
    process.kill()
    process.communicate()
    assert Checkpoints(tmp_path).latest < 12
    finish(small(*NO_EVALS), tmp_path, TWO)
    assert_same_run(tmp_path, whole)


def test_sigterm_saves_and_one_of_the_devices_goes_on(whole, tmp_path, capsys, monkeypatch):
    """Law 7. After SIGTERM the command saves, says so and exits with 42. Started again it ends in
    the same bits, and on another number of devices near them."""

    def signalled(run, data, *, start):
        for batch, host in feed(run, data, start=start):
            if len(asked) == 6:
                os.kill(os.getpid(), signal.SIGTERM)
            asked.append(start)
            yield batch, host

    asked, run = [], tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "feed", signalled)
        assert train(small(*NO_EVALS), str(run), TWO) == cli.EXIT_PREEMPTED
    saved = Checkpoints(run).latest
    assert 4 < saved < 12
    assert f"saved step {saved}" in capsys.readouterr().out
    same, other = (shutil.copytree(run, tmp_path / name) for name in ("same", "other"))
    finish(small(*NO_EVALS), same, TWO)
    assert_same_run(same, whole)
    finish(small(*NO_EVALS), other, jax.devices()[:1])
    out = capsys.readouterr().out
    assert "on 1 x cpu" in out and f"continuing from step {saved}" in out
    for x, y in zip(jax.tree.leaves(parameters(other)), jax.tree.leaves(parameters(whole))):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-4)


def test_another_config_is_refused_with_a_diff(whole):
    with pytest.raises(ConfigError) as error:
        train(small(("optimizer.learning_rate", "0.01")), str(whole), TWO)
    assert "config.optimizer.learning_rate: 0.001 -> 0.01" in str(error.value)
    finish(small(("data.workers", "0"), ("train.log_every_steps", "5")), whole, TWO)


@pytest.fixture
def damaged_at_step_3(monkeypatch):
    """The step that ends in step 3 leaves an infinite logit scale, as a flipped bit does."""

    def make(*args, **kwargs):
        step = make_train_step(*args, **kwargs)

        def train_step(state, batch, lengths):
            state, metrics = step(state, batch, lengths)
            scale = jnp.where(state.step == 3, jnp.inf, state.params["logit_scale"])
            return state.replace(params=state.params | {"logit_scale": scale}), metrics

        return train_step

    monkeypatch.setattr(run, "make_train_step", make)


def test_not_finite_steps_stop_the_run_and_name_rows(damaged_at_step_3, tmp_path):
    config = small(("train.max_skipped_steps", "2"), ("train.save_every_steps", "100"), *NO_EVALS)
    with pytest.raises(RunError, match="2 steps in a row .* not finite") as error:
        train(config, str(tmp_path), TWO)
    assert all(text in str(error.value) for text in ("step 4: ", "step 5: ", "shapes/train/"))


def test_a_state_that_is_not_finite_is_never_saved(damaged_at_step_3, tmp_path):
    config = small(("train.save_every_steps", "1"), *NO_EVALS)
    with pytest.raises(RunError, match="step 3 holds NaN or infinity in params/logit_") as error:
        train(config, str(tmp_path), TWO)
    assert "step 2 is saved and intact" in str(error.value) and "\n" not in str(error.value)
    assert Checkpoints(tmp_path).steps == [1, 2]
    opened, state = restore(tmp_path, devices=TWO)
    assert not not_finite(state)
    checkpoints = Checkpoints(tmp_path)
    moments = jax.tree.map(lambda x: x + jnp.nan if x.ndim else x, state.opt_state)
    damaged = state.replace(step=state.step + 1, opt_state=moments)
    checkpoints.save(3, damaged, checkpoints.restore_run(2), {})
    checkpoints.close()
    with pytest.raises(RunError, match="checkpoint of step 3 holds NaN or infinity in opt_state/"):
        train(config, str(tmp_path), TWO)


def test_a_workdir_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="can be written"):
        train(small(), str(tmp_path / "file"))


def test_evaluate_gives_the_numbers_of_training(whole, capsys):
    config = json.loads((whole / "config.json").read_text())
    results = evaluate(str(whole), "best", config)
    logged = {k: v for k, v in rows(whole)[-1].items() if "/" in k}
    assert results == pytest.approx(logged, abs=1e-6)
    folder = whole / "evaluation_12"
    found = {path.name: json.loads(path.read_text()) for path in folder.iterdir()}
    assert set(found) == {"shapes-test_zero_shot.json", "shapes-test_retrieval.json"}
    metrics = found["shapes-test_zero_shot.json"]["metrics"]
    assert metrics["acc1"] == results["zero_shot/top1"]
    other = config["evals"]["zero_shot"] | {"evaluator": "zero_shot", "templates": ["the {}"]}
    config["evals"] = {"other": other}  # not the eval that `train.best` names
    assert evaluate(str(whole), "8", config).keys() == {
        "other/top1", "other/top5", "other/mean_per_class"
    }  # fmt: skip
    with pytest.raises(ConfigError, match="one of"):
        evaluate(str(whole), "5", config)


TAKEN = b"\xa0\x09\x01"  # field 148 of xla.proto's DebugOptions: xla_gpu_deterministic_ops, true
DETERMINISTIC = f"""
from absl import flags
from jax.extend import backend
import jax
from clipx import cli

flags.DEFINE_bool("deterministic", False, "")


def main(overrides):
    options = backend.get_compile_options(num_replicas=1, num_partitions=1)
    print("taken:", {TAKEN} in options.SerializeAsString(), jax.device_count())
    cli.be_deterministic()


cli.run(main, required=())
"""


def test_deterministic_reaches_xla_and_refuses_to_come_too_late():
    done = subprocess.run(
        [sys.executable, "-c", DETERMINISTIC, "--deterministic"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["taken: True 8"]
    assert done.returncode == 1 and done.stderr.strip().count("\n") == 0
    assert done.stderr.strip().startswith("--deterministic comes too late: JAX has started")
    options = backend.get_compile_options(num_replicas=1, num_partitions=1)
    assert TAKEN not in options.SerializeAsString()
