"""Lengths of runs that spend the same."""

import types

import pytest
from support.runs import small

from clipx.errors import RunError
from clipx.planning import lengths
from clipx.training.metrics import Metrics


def test_warm_ups_scale_with_their_runs():
    config = {"train": {"total_epochs": 15}, "optimizer": {"warmup_steps": 30, "b2": 0.9}}
    assert lengths.scaled(config, 0.1) == {
        "train": {"total_epochs": 1.5},
        "optimizer": {"warmup_steps": 3, "b2": 0.9},
    }
    assert lengths.scaled({"train": {"total_steps": 2}}, 0.1)["train"] == {"total_steps": 1}


def test_a_run_of_so_many_pairs(monkeypatch):
    monkeypatch.setattr(lengths, "pairs", lambda run: 384)
    run = types.SimpleNamespace(batch_size=32)
    config = small()
    assert lengths.matched(config, run, 384) == {}
    assert lengths.matched(config, run, 768) == {
        "train.total_examples": 768,
        "optimizer.warmup_steps": 4,
    }
    assert lengths.matched(config, run, 3)["train.total_examples"] == 32  # a batch, at least


@pytest.mark.parametrize("episode", [None, 50])
def test_seconds_of_a_pair(tmp_path, episode):
    """The steps after the first ones, and a share of an episode's pass after the first."""
    run = types.SimpleNamespace(
        batch_size=8, objective=types.SimpleNamespace(episode_steps=episode)
    )
    timing = lengths.timing(small(), run)
    assert timing["evals"] == {} and timing["train"]["total_steps"] == (51 if episode else 50)
    assert not any(timing["optimizer"].get(f"warmup_{unit}") for unit in ("steps", "epochs"))
    with Metrics(tmp_path, total_steps=50, batch_size=8) as metrics:
        metrics.log(0, {"episode/seconds": 100.0})
        for step in range(10, 51, 10):
            metrics.log(step, {"loss": 1.0, "step_seconds": 9.0 if step == 10 else 0.8})
        metrics.log(50, {"episode/seconds": 20.0})
    assert lengths.seconds_per_pair(tmp_path, run) == pytest.approx(0.15 if episode else 0.1)
    with pytest.raises(RunError, match="no step was timed"):
        lengths.seconds_per_pair(tmp_path / "none", run)


def test_flops_and_pairs_of_a_config(tmp_path):
    """Counted without executing anything; a survey's forward pass counts too."""
    run = lengths.opened(small(), tmp_path / "run")
    assert lengths.pairs(run) == 12 * 32 and not (tmp_path / "run").exists()
    assert run.pair_flops == run.step_flops / 32
    assert run.model_flops < 1.5 * run.step_flops
