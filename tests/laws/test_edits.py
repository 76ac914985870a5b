"""A config that is edited at random binds, assembles and traces, or gives one readable block."""

import collections
import functools

import jax
import numpy as np
import pytest
from support import ROOT, configs, edits

from clipx.config import files
from clipx.errors import ConfigError
from clipx.training import schema
from clipx.training.run import assemble, checked
from clipx.training.step import make_train_step

FILES = sorted(p for p in (ROOT / "configs").glob("*.py") if p.stem != "common")


@pytest.fixture(autouse=True)
def closed(monkeypatch):
    def refuse(*_):
        raise AssertionError("a data source was opened")

    monkeypatch.setattr(schema.SourceSpec, "open", refuse)


@functools.cache
def shipped():
    """A config of every file and variant, with few layers."""
    specs = [f"{f}:{v}".rstrip(":") for f in FILES for v in files.variants(f)]
    return [configs.shrunk(spec) for spec in specs]


def outcome(call, *args, said):
    """What a call returns; None if it raises a `ConfigError`, which must be one block."""
    try:
        return call(*args)
    except ConfigError as error:
        assert edits.one_block(error), f"{said}\n{error}"
    except Exception as error:
        raise AssertionError(f"{said}: {type(error).__name__}: {error}") from error
    return None


@pytest.mark.parametrize(
    "count, traced", [(2000, 12), pytest.param(20_000, 300, marks=pytest.mark.slow)]
)
def test_edited_configs(count, traced, capsys):
    rng, devices = np.random.default_rng(count), jax.devices()[:1]
    seen, bound = collections.Counter(), []
    for _ in range(count):
        base = shipped()[rng.integers(len(shipped()))]
        config, said = edits.edited(base, rng)
        parts = outcome(checked, config, devices, said=said)
        seen["bound" if parts else "refused"] += 1
        if parts:
            bound.append((config, said))
    traceable = [config for config in bound if not all(map(edits.is_dull, config[1]))]
    for number, i in enumerate(rng.choice(len(traceable), traced, replace=False)):
        config, said = traceable[i]
        run = outcome(assemble, edits.shallow(config), devices, said=said)  # traces the loss
        if run and number % 5 == 0:
            outcome(trace, run, said=said)
        seen["assembled" if run else "refused by assembly"] += 1
    with capsys.disabled():
        print(f"\n{count} edits: {dict(seen)}")
    assert min(seen["bound"], seen["refused"]) > count / 10


def trace(run):
    """Traces one step, gradients and all."""
    step = make_train_step(
        run.objective, run.optimizer, seed=run.config.seed, microbatches=run.microbatches
    )
    with jax.set_mesh(run.mesh):
        return jax.eval_shape(step, run.state, run.batch)
