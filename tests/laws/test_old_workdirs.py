"""Workdirs that clipx 0.1.0 wrote on 2026-11-28 can still be restored and evaluated. Training that
continues from them gives the numbers that the code gave then."""

import json
import tarfile

import jax
import numpy as np
import pytest
from support import TESTS
from support.runs import finish

from clipx.serving.evaluation import evaluate
from clipx.training.run import restore

FIXTURE = TESTS / "fixtures" / "workdirs_0.1.0.tar.xz"
TIMES = ("seconds", "images_per_second", "data_wait_fraction", "episode/", "predicted/", "mfu")


@pytest.fixture
def workdirs(tmp_path):
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def rows(workdir):
    """What a run logged, without times."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if not any(t in k for t in TIMES)} for row in lines]


@pytest.mark.slow  # that they are restored and give the same features is tested beside
@pytest.mark.parametrize("name", ["declip", "protoclip"])
def test_goes_on_as_it_began(workdirs, name):
    """The checkpoint is of step 2 of 4. metrics.jsonl holds all 4 steps of the original run."""
    workdir = workdirs / name
    expected = [row for row in rows(workdir) if len(row) > 3]
    config = json.loads((workdir / "config.json").read_text())
    run, state = restore(workdir, devices=jax.devices()[:1])
    assert (int(state.step), run.rows) == (2, 64)
    assert set(run.config.evals) == {"retrieval"}
    finish(config, workdir, jax.devices()[:1])
    found = [row for row in rows(workdir) if len(row) > 3]
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for before, after in zip(expected, found):
        assert before.keys() == after.keys()
        a, b = ([row[key] for key in before] for row in (before, after))
        # gradients of the first steps are large, and other processors round differently
        np.testing.assert_allclose(b, a, rtol=2e-3, atol=2e-3, err_msg=str(before["step"]))


def test_is_evaluated(workdirs):
    config = json.loads((workdirs / "declip" / "config.json").read_text())
    found = evaluate(workdirs / "declip", "latest", config)
    assert (workdirs / "declip" / "evaluation_2").is_dir()
    assert 0 < found["retrieval/mean_recall"] < 1
