"""`train.rollback`: a run with rows whose loss is not finite goes back and on without them, and
ends in the same bits however often it is stopped meanwhile."""

import json

import jax
import numpy as np
import pytest
from support import elastic
from support.runs import NO_EVALS, StopAt, parameters, rows, small

from clipx.data.order import order
from clipx.errors import RunError
from clipx.training.checkpoint import Checkpoints
from clipx.training.session import open_session

ONE = jax.devices()[:1]
BATCH, ROWS = 32, 256
ORDER = order(ROWS, 0)
BATCHES = [{ORDER(0, BATCH * step + i) for i in range(BATCH)} for step in (5, 6)]
POISON = [min(batch) for batch in BATCHES]  # of the batches that end in steps 6 and 7


def config(**train):
    overrides = [(f"train.{key}", str(value)) for key, value in train.items()]
    options = [("train.rollback", "true"), ("train.max_skipped_steps", "2"), *NO_EVALS]
    return small(*options, *overrides)


def run(folder, stop=None, **train):
    """Trains until the end or until it is asked to stop; (its last step, the rows of each step)."""
    with elastic.poison(POISON), elastic.watched() as batches:
        state, _ = open_session(config(**train), str(folder), ONE).train(StopAt(stop, batches))
    return int(state.step), {step: set(rows) for step, rows in batches.items()}


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


@pytest.mark.slow  # starts two processes
def test_two_processes_leave_the_rows_of_both_out(whole, tmp_path):
    given = {"workdir": str(tmp_path / "two"), "config": config(), "devices": None}
    parts = elastic.start(tmp_path / "of", [given | {"poisoned": POISON}], 1, processes=2)
    seen = [part[0]["rows"] for part in parts]
    assert {step: set(seen[0][str(step)] + seen[1][str(step)]) for step in range(12)} == whole[1]
    losses = [row["loss"] for row in rows(whole[0]) if "loss" in row]
    np.testing.assert_allclose(list(parts[0][0]["losses"].values()), losses, rtol=1e-4)
    kept = [Checkpoints(f).restore_run(12)["rollback"] for f in (whole[0], tmp_path / "two")]
    assert kept[0] == kept[1]
    named = [len((tmp_path / f"two/quarantine-{i}.jsonl").read_text().splitlines()) for i in (0, 1)]
    assert named == [32, 32]
