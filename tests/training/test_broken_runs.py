"""A run whose workdir was damaged goes on from what is whole, or ends in one line. It is never
another run than before, and never starts again in silence."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import ROOT, broken_runs
from support.broken_runs import CASES, OWN, QUICK
from support.exports import CAPTIONS
from support.runs import NO_EVALS, finish, parameters, rows, small

from clipx.config import files
from clipx.data.text import tokenizers
from clipx.data.text.tokenizer_config import TokenizerConfig
from clipx.training import recovery
from clipx.training.checkpoint import Checkpoints
from clipx.training.run import assemble
from clipx.training.workdir import write_json
from clipx.types import TrainState

TWO = jax.devices()[:2]


def state(step):
    w = jnp.arange(4096, dtype=jnp.float32).reshape(64, 64) + step
    return TrainState(jnp.int32(step), {"w": w, "b": w[0]}, {"m": -w}, {}, {})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with checkpoints of steps 4 and 8, of a state that no run trains."""
    folder = tmp_path_factory.mktemp("saved")
    complete = assemble(files.load(str(ROOT / "configs" / "quickstart.py")), TWO[:1]).complete
    tokenizer = tokenizers.build(TokenizerConfig("sentencepiece", vocab_size=300), CAPTIONS).save()
    write_json(folder / "config.json", complete)
    write_json(folder / "tokenizer.json", tokenizer)
    checkpoints = Checkpoints(folder, best="r/x")
    with open(folder / "metrics.jsonl", "w") as log:
        for step in range(1, 11):
            print(json.dumps({"step": step, "loss": 1 / step}), file=log, flush=True)
            if step in (4, 8):
                run = {"config": complete, "tokenizer": tokenizer}
                checkpoints.save(step, state(step), run, {"r/x": 0.5})
    checkpoints.close()
    return folder


def broken(case, pristine, folder):
    shutil.copytree(pristine, folder)
    case.break_it(folder)
    return folder


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[] if case.name in QUICK else pytest.mark.slow)
        for case in CASES
    ],
)
def test_what_is_whole_is_found(case, saved, tmp_path, capsys):
    """The step, and its bits; the files of the workdir; at most one line for each damage."""
    folder = broken(case, saved, tmp_path / "run")
    names = {p.name for p in (folder / "checkpoints").iterdir()}

    def begin():
        checkpoints = Checkpoints(folder)
        step = checkpoints.newest_proven()
        recovery.mend(folder, step, checkpoints.restore_run(step))
        return step, checkpoints.restore(step, state(0))

    if case.error is not None:
        with pytest.raises(case.error) as error:
            begin()
        assert case.said in str(error.value)
        assert case.error is broken_runs.ConfigError or "\n" not in str(error.value)
        return
    step, restored = begin()
    said = capsys.readouterr().err
    assert (case.said in said) if case.said else said == ""
    assert said.count("\n") <= 1, said
    assert step == case.step
    jax.tree.map(np.testing.assert_array_equal, restored, state(step))
    for name in OWN[:2]:
        assert "logs more" in case.name or (folder / name).read_text() == (saved / name).read_text()
    lines = (saved / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert (folder / "metrics.jsonl").read_bytes().startswith(b"".join(lines[:step]))
    left = {p.name.removesuffix(".damaged") for p in (folder / "checkpoints").iterdir()}
    assert left == names  # nothing is deleted
    assert Checkpoints(folder).newest_proven() == step
    assert "damaged" not in capsys.readouterr().err


def test_quick_cases():
    assert {case.name for case in CASES} >= QUICK and len(CASES) > 90


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A real run of 12 steps, and its workdir as it was before the last was saved."""
    folder = tmp_path_factory.mktemp("whole")
    finish(small(*NO_EVALS, ("train.keep", "3")), folder / "run", TWO)
    shutil.copytree(folder / "run", folder / "killed")
    shutil.rmtree(folder / "killed" / "checkpoints" / "12")
    return folder


@pytest.mark.slow  # a hundred starts
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_ends_in_the_same_bits(case, whole, tmp_path, capsys):
    config = small(*NO_EVALS, ("train.keep", "3"))
    if "scores" in case.name:
        pytest.skip("a run without evaluations stores no scores")
    if case.name == "tokenizer.json: flip":
        pytest.skip("where the bit falls in another file, it makes no valid vocabulary")
    folder = broken(case, whole / "killed", tmp_path / "run")
    if case.error is not None:
        with pytest.raises(case.error) as error:
            finish(config, folder, TWO)
        assert case.said in str(error.value)
        return
    finish(config, folder, TWO)
    said = capsys.readouterr()
    assert case.said in said.err and f"continuing from step {case.step}" in said.out
    jax.tree.map(np.testing.assert_array_equal, parameters(folder), parameters(whole / "run"))
    losses = [[(r["step"], r["loss"]) for r in rows(f)] for f in (folder, whole / "run")]
    assert losses[0] == losses[1]
