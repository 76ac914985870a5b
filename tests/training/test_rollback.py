"""`train.rollback`: a run with rows whose loss is not finite goes back and on without them, and
ends in the same bits however often it is stopped meanwhile."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.runs import NO_EVALS, parameters, rows, small

from clipx.data.order import order
from clipx.errors import RunError
from clipx.objectives.clip import CLIP
from clipx.training import loop
from clipx.training.checkpoint import Checkpoints
from clipx.training.feed import feed
from clipx.training.session import open_session

ONE = jax.devices()[:1]
BATCH, ROWS = 32, 256
ORDER = order(ROWS, 0)
BATCHES = [{ORDER(0, BATCH * step + i) for i in range(BATCH)} for step in (5, 6)]
POISON = [min(batch) for batch in BATCHES]  # of the batches that end in steps 6 and 7


@pytest.fixture(scope="module", autouse=True)
def poisoned():
    """The features of the rows `POISON` are infinite."""
    embed = CLIP.embed

    def infinite(self, batch, keys, *, train):
        features = embed(self, batch, keys, train=train)
        bad = jnp.isin(batch.row, jnp.array(POISON))[:, None]
        return features.replace(image=jnp.where(bad, jnp.inf, features.image))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CLIP, "embed", infinite)
        yield


class StopAt:
    """Asks a run to stop at a step, as a signal does: from then on it is always asked."""

    def __init__(self, step=None):
        self.step = step
        self.seen = []

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def __call__(self):
        return self.step in self.seen


def run(folder, stop=None, **train):
    """Trains until the end or until it is asked to stop; (its last step, the rows of each step)."""
    overrides = [(f"train.{key}", str(value)) for key, value in train.items()]
    options = [("train.rollback", "true"), ("train.max_skipped_steps", "2"), *NO_EVALS]
    stop, batches = StopAt(stop), {}

    def watched(run, data, *, start):
        for step, (batch, host) in enumerate(feed(run, data, start=start), start):
            batches[step] = set(host["row"].tolist())
            stop.seen.append(step)
            yield batch, host

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "feed", watched)
        state, _ = open_session(small(*options, *overrides), str(folder), ONE).train(stop)
    return int(state.step), batches


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(workdir, rows of each step) of a run that nobody stops."""
    folder = tmp_path_factory.mktemp("whole")
    last, batches = run(folder)
    assert last == 12
    return folder, batches


def test_goes_back_and_on_without_the_rows(whole):
    folder, batches = whole
    left_out = set().union(*BATCHES)
    assert batches[4] == {ORDER(0, 4 * BATCH + i) for i in range(BATCH)}
    assert all(not batch & left_out for step, batch in batches.items() if step >= 4)
    lines = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    assert {line["row"] for line in lines} == left_out and len(lines) == 64
    assert "the loss or gradient of step 6 was not finite" in lines[0]["reason"]
    kept = Checkpoints(folder).restore_run(12)["rollback"]
    assert kept == {"left_out": sorted(left_out), "back": 4}
    training = [row for row in rows(folder) if "loss" in row]
    assert [row["step"] for row in training] == list(range(1, 13))
    assert all(np.isfinite(row["loss"]) for row in training) and training[-1]["data/left_out"] == 64


@pytest.mark.slow  # goes on from a checkpoint that knows the rows, and from one that does not
def test_ends_in_the_same_bits_if_stopped(whole, tmp_path):
    """It is asked to stop between the two bad steps, where nothing is saved, and at step 9."""
    assert [run(tmp_path, stop)[0] for stop in (5, 8, None)] == [4, 9, 12]
    ends = [parameters(folder, ONE) for folder in (whole[0], tmp_path)]
    jax.tree.map(np.testing.assert_array_equal, *ends)
    losses = [[row["loss"] for row in rows(f) if "loss" in row] for f in (whole[0], tmp_path)]
    assert losses[0] == losses[1]


@pytest.mark.slow  # the test above goes back once
def test_the_same_place_twice_ends_the_run(tmp_path):
    """Each of the two batches is enough here, and no checkpoint lies between them."""
    with pytest.raises(RunError, match="again after the run went back to step 0 .* 32 rows"):
        run(tmp_path, max_skipped_steps=1, save_every_steps=100)
    assert Checkpoints(tmp_path).steps == [0]
