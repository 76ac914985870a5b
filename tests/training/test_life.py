"""A run's life beyond its plan: longer, from a checkpoint with its optimizer, ended early, and the
average of its parameters. All of it ends in the same bits however often it is stopped."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import elastic
from support.runs import NO_EVALS, StopAt, parameters, rows, small

from clipx import cli
from clipx.errors import ConfigError
from clipx.reporting import page
from clipx.serving.evaluation import evaluate
from clipx.serving.model import load
from clipx.training import average, extension, kept_optimizer
from clipx.training.average import averaged
from clipx.training.initial import init
from clipx.training.loop import Trainer
from clipx.training.optimizer import OptimizerConfig, make_optimizer
from clipx.training.patience import Patience
from clipx.training.run import assemble, restore
from clipx.training.schedule import make_schedule
from clipx.training.session import open_session
from clipx.training.workdir import read_config, write_json
from clipx.types import Metric

ONE = jax.devices()[:1]
BEST = "retrieval/mean_recall"


def go(config, folder, stop=None, *, extend=False):
    """Trains to the end, or until a step is loaded; (whether it has ended, its last step)."""
    with elastic.watched() as loaded:
        session = open_session(config, str(folder), ONE, extend=extend)
        state, finished = session.train(StopAt(stop, loaded))
    return finished, int(state.step)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, parameters(a, ONE), parameters(b, ONE))


# --- the parts


@pytest.mark.parametrize("better", ["more", "less"])
def test_patience_counts_evaluations_without_a_better_value(better):
    sign = 1 if better == "more" else -1
    values = {2: 0.1, 4: 0.3, 6: 0.2, 8: 0.3, 10: 0.4, 12: 0.4, 14: 0.1}
    for start in (0, 4, 10):  # resumed at a checkpoint
        before = {step: sign * x for step, x in values.items() if step <= start}
        patience = Patience("a/x", 2, Metric(better), before)
        ends = {
            step: patience.over(step, {"a/x": sign * x})
            for step, x in values.items()
            if step >= start
        }
        assert [step for step, why in ends.items() if why] == [8, 14][start > 8 :]
        assert "best at step 10" in ends[14] and "2 evaluation(s)" in ends[14]
    assert patience.over(16, {"b/x": 1.0}) == ""
    assert Patience("a/x", None, Metric(), {}).over(2, {"a/x": 1.0}) == ""


def test_an_average_follows_the_parameters():
    params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0])}
    keep = average.keep(0.5)
    state, expected = keep.init(params), {k: np.asarray(x) for k, x in params.items()}
    for n in range(1, 9):
        updates = {key: jnp.full_like(x, 0.1 * n) for key, x in params.items()}
        updates, state = keep.update(updates, state, params)
        params = optax.apply_updates(params, updates)
        kept = min(0.5, (1 + n) / (10 + n))
        expected = {k: kept * x + (1 - kept) * params[k] for k, x in expected.items()}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state.params, expected)


def test_frozen_parameters_are_their_own_average():
    config = OptimizerConfig(average=0.9, freeze=("^a$",))
    params = {"a": jnp.ones(2), "logit_scale": jnp.ones(())}
    schedule = make_schedule(config, steps=5, batch_size=1, rows=None)
    optimizer = make_optimizer(config, schedule, params)
    state = type("S", (), {"opt_state": optimizer.init(params), "params": params})()
    state.replace = lambda params: params
    assert jax.tree.map(np.asarray, averaged(state)) == {"a": pytest.approx([1, 1]),
                                                          "logit_scale": 1}  # fmt: skip
    plain = make_optimizer(OptimizerConfig(), schedule, params).init(params)
    assert average.state_of(plain) is None


@pytest.mark.parametrize("count", [0, 8, 9, 12, 20])
def test_an_extended_schedule_is_that_of_the_rest(count):
    config = OptimizerConfig(warmup_steps=3, schedule="linear")
    longer = make_schedule(config, steps=20, batch_size=4, rows=None, start=8)
    rest = make_schedule(config, steps=12, batch_size=4, rows=None)
    assert float(longer(jnp.int32(count))) == float(rest(jnp.int32(max(count - 8, 0))))


# --- whole runs


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """A run of 8 steps."""
    folder = tmp_path_factory.mktemp("life") / "run"
    assert go(config(8), folder) == (True, 8)
    return folder


def config(steps, *overrides):
    return small(*NO_EVALS, ("train.total_steps", str(steps)), *overrides)


def copy(folder, to):
    import shutil

    return shutil.copytree(folder, to)


def test_a_longer_run_has_a_new_schedule_from_its_last_state(eight, tmp_path):
    """Stopped meanwhile it ends in the same bits; the report says where it was extended."""
    whole, killed = copy(eight, tmp_path / "whole"), copy(eight, tmp_path / "killed")
    longer = config(13, ("optimizer.learning_rate", "2e-3"))
    with pytest.raises(ConfigError, match="total_steps: 8 -> 13"):
        open_session(longer, str(whole), ONE)
    assert go(longer, whole, extend=True) == (True, 13)
    rates = {row["step"]: row["learning_rate"] for row in rows(whole) if "loss" in row}
    schedule = make_schedule(OptimizerConfig(learning_rate=2e-3, warmup_steps=2), steps=5,
                             batch_size=32, rows=None)  # fmt: skip
    for step in range(9, 14):
        np.testing.assert_allclose(rates[step], float(schedule(step - 9)), rtol=1e-5)
    assert read_config(whole)["train"]["extended_from"] == 8
    assert go(longer, killed, 10, extend=True)[0] is False
    assert go(longer, killed) == (True, 13)  # it is known as extended
    same(whole, killed)
    text = page.write(whole).read_text()
    assert "extended at step" in text
    assert go(longer, whole, extend=True) == (True, 13)  # nothing is left to do


def test_what_is_no_extension(eight, tmp_path):
    folder = copy(eight, tmp_path / "run")
    with pytest.raises(ConfigError, match="--extend") as error:
        open_session(config(13), str(tmp_path / "none"), ONE, extend=True)
    assert "no checkpoint" in error.value.found
    with pytest.raises(ConfigError, match="at step 8 already"):
        open_session(config(6), str(folder), ONE, extend=True)
    other = config(13, ("image.width", "64"))
    with pytest.raises(ConfigError, match="image.width: 32 -> 64"):
        open_session(other, str(folder), ONE, extend=True)
    assert go(config(8), folder, extend=True) == (True, 8)  # the same run
    assert read_config(folder)["train"]["extended_from"] == 0


def test_a_run_starts_with_the_optimizer_of_another(eight):
    """Moments are kept, the schedule begins anew; another optimizer is refused."""
    start = ("init_from", str(eight))
    run = assemble(config(8, start, ("init_optimizer", "true")), ONE)
    said = []
    state = init(run, said.append)
    _, given = restore(eight, devices=ONE)
    kept = kept_optimizer.from_start(given.opt_state)
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, kept)
    moments = [np.abs(np.asarray(x)).max() for x in jax.tree.leaves(kept) if x.ndim > 1]
    assert min(moments) > 0 and said[-1].startswith("optimizer state from")
    assert int(state.step) == 0
    sgd = ("optimizer.name", "sgd")
    for wrong, found in (
        ((start, ("init_optimizer", "true"), sgd), "another state in"),
        ((("init_optimizer", "true"),), "while config.init_from is ''"),
    ):
        with pytest.raises(ConfigError, match=found):
            init(assemble(config(8, *wrong), ONE))


EVALS = [
    ("train.best", BEST),
    ("train.eval_every_steps", "2"),
    ("evals", "{'retrieval': {'data': {'source': 'shapes', 'split': 'test', 'size': 32,"
     " 'image_size': 16}}}"),
]  # fmt: skip


@pytest.mark.slow
def test_a_run_ends_early_in_the_same_step_if_stopped(tmp_path, monkeypatch):
    """A metric that gets no better after step 4; what was logged before a stop counts."""

    def evaluate(self, state, step):
        results = {BEST: {2: 0.1, 4: 0.3}.get(step, 0.2)}
        self.metrics.log(step, results)
        return results

    monkeypatch.setattr(Trainer, "_evaluate", evaluate)
    early = small(*EVALS, ("train.patience", "2"), ("train.save_every_steps", "3"))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert go(early, whole) == (True, 8)
    assert [row["step"] for row in rows(whole) if BEST in row] == [2, 4, 6, 8]
    assert go(early, whole) == (True, 8)  # started again, it has ended
    assert go(early, killed, 6)[0] is False and go(early, killed) == (True, 8)
    same(whole, killed)


@pytest.mark.slow
def test_averages_are_evaluated_beside_and_held_by_the_resume_law(tmp_path):
    kept = small(*EVALS, ("optimizer.average", "0.9"), ("train.total_steps", "8"))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert go(kept, whole) == (True, 8)
    assert go(kept, killed, 5)[0] is False and go(kept, killed) == (True, 8)
    a, b = (restore(folder, devices=ONE, average=True)[1].params for folder in (whole, killed))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    plain = restore(whole, devices=ONE)[1].params
    assert any(np.any(np.asarray(x) != np.asarray(y)) for x, y in
               zip(jax.tree.leaves(a), jax.tree.leaves(plain)))  # fmt: skip
    logged = [row for row in rows(whole) if BEST in row]
    assert all(f"retrieval@average/{BEST.split('/')[1]}" in row for row in logged)
    found = evaluate(whole, "latest", read_config(whole), average=True)
    assert found[BEST] == pytest.approx(logged[-1]["retrieval@average/mean_recall"])
    assert list(whole.glob("evaluation_average_8/*.json"))
    one, other = load(whole, devices=ONE, average=True), load(whole, devices=ONE)
    assert np.abs(one.encode_text("a red circle") - other.encode_text("a red circle")).max() > 0
    with pytest.raises(ConfigError, match="averages"):
        restore(copy_without(whole), devices=ONE, average=True)


def copy_without(folder):
    """A run without averages."""
    other = folder.with_name("plain")
    go(config(8), other)
    return other


def test_patience_needs_a_metric():
    with pytest.raises(ConfigError, match="config.train.patience"):
        assemble(config(8, ("train.patience", "2")), ONE)
    named = cli.load_config("quickstart", [("train.best", "retrieval@average/mean_recall")])
    named["evals"].pop("retrieval", None)
    with pytest.raises(ConfigError, match="config.train.best"):
        assemble(named, ONE)
    named["optimizer"]["average"] = 0.9
    named["evals"]["retrieval"] = {"data": {"source": "shapes", "split": "test"}}
    assemble(named, ONE)


def test_a_longer_run_counts_from_the_checkpoint_that_is_taken(tmp_path):
    """Not from the newest folder, which may be damaged."""
    complete = assemble(small(*NO_EVALS, ("train.total_steps", "8")), ONE).complete
    write_json(tmp_path / "config.json", complete)
    (tmp_path / "checkpoints" / "8").mkdir(parents=True)
    longer = {**complete, "train": {**complete["train"], "total_steps": 12}}
    for extend, expected in ((True, 4), (False, 0)):
        config = extension.applied(longer, longer, tmp_path, 4, extend=extend)
        assert config["train"]["extended_from"] == expected
