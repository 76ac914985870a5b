"""A run whose eval names no data holds rows of its training data out, and keeps to them."""

import json

import jax
import numpy as np
import pytest
from support.runs import small
from support.shards import pairs, shard

from clipx import cli, dataset
from clipx.data import row_arrays
from clipx.data.base import fingerprint
from clipx.data.sources.webdataset import WebDataset
from clipx.errors import ConfigError
from clipx.evaluate import override
from clipx.serving.evaluation import chosen, evaluate
from clipx.serving.evaluation import dataset as short_name
from clipx.train import train
from clipx.training.checkpoint import Checkpoints
from clipx.training.feed import open_data
from clipx.training.run import assemble
from clipx.training.schema import EvalSpec
from clipx.training.session import open_session


@pytest.fixture(scope="module")
def tar(tmp_path_factory):
    return shard(tmp_path_factory.mktemp("pairs") / "own.tar")


def held_out(tar, **data):
    config = pairs(tar)
    config["evals"]["retrieval"]["data"]["path"] = ""
    config["data"] |= data
    config["train"]["best"] = "retrieval/mean_recall"
    return config


def keys(run):
    return list(run.evaluators()["retrieval"].examples.source.keys())


def test_the_rows_are_said_saved_and_the_same_when_the_run_goes_on(
    tar, tmp_path, monkeypatch, capsys
):
    config, folder = held_out(tar), tmp_path / "run"
    session = open_session(config, str(folder))
    said = capsys.readouterr().out
    assert "held out 4 of 48 rows (4 pictures, too few to compare models by)" in said
    assert "for evals.retrieval: never trained on" in said
    assert "data.holdout = 4: evals.retrieval.data has no path" in said
    tested = keys(session.run)
    assert len(tested) == 4 and len(session.data) == session.run.rows == 44
    assert not {*tested} & {*session.data.source.keys()}
    assert {*tested, *session.data.source.keys()} == {*WebDataset(str(tar)).keys()}
    saved = json.loads((folder / "config.json").read_text())
    assert saved["data"]["holdout"] == 4
    assert keys(assemble(saved)) == tested  # what `clipx.evaluate` opens
    monkeypatch.setattr(Checkpoints, "newest_proven", lambda self: 1)  # as if it had been trained
    run = {"rows": 44, "fingerprint": session.data.fingerprint, "config": saved}
    run["tokenizer"] = session.run.tokenizer.save()
    monkeypatch.setattr(Checkpoints, "restore_run", lambda self, step: run)
    assert keys(open_session(config, str(folder), jax.devices()[:2]).run) == tested
    config["evals"]["retrieval"]["data"]["path"] = str(tar)  # a test set that was found later
    with pytest.raises(ConfigError, match="set config.data.holdout to 4 to go on as before"):
        open_session(config, str(folder))
    config["data"]["holdout"] = 4
    assert len(open_session(config, str(folder)).data) == 44


def test_files_of_rows_cover_the_rows_that_are_held_out(tar, tmp_path):
    complete = WebDataset(str(tar))
    about = {"rows": 48, "fingerprint": fingerprint(complete)}
    with row_arrays.create(str(tmp_path / "c.npy"), np.int32, (48,), about) as add:
        add(np.arange(48))
    for fraction in (1.0, 0.75):
        config = held_out(tar, clusters=str(tmp_path / "c.npy"), fraction=fraction)
        data = open_data(assemble(config))
        rows = [data.source[i].row for i in range(len(data))]
        assert data.clusters.tolist() == rows and len(rows) == 44 * fraction


def test_an_eval_needs_data_where_nothing_is_held_out(tar):
    with pytest.raises(ConfigError, match=r"evals.retrieval.data\n.*config.data.holdout=0"):
        assemble(held_out(tar, holdout=0))
    spec = EvalSpec.check("retrieval", {"data": {"source": "webdataset", "path": ""}})
    assert spec.held_out and short_name(spec) == "held_out"
    for name, section in (
        ("retrieval", {"data": {"source": "shapes"}}),
        ("zero_shot", {"data": {"source": "folder", "path": ""}}),
    ):
        assert not EvalSpec.check(name, section).held_out
    evals = {"retrieval": {"data": {"path": ""}}}
    assert chosen(evals, "", data="") == evals
    with pytest.raises(ConfigError, match="--data"):
        chosen({}, "retrieval", data="")


def test_the_shipped_config_needs_a_path_and_nothing_else(tar, capsys):
    config = cli.load_config("clip:small", [("data.path", str(tar)), ("train.batch_size", "16")])
    run = assemble(config, jax.devices()[:1])
    assert run.held_out_evals == ("retrieval",) and len(keys(run)) == 4
    dataset.show_fingerprint(config)
    assert capsys.readouterr().out.count(": 44 rows,") == 1
    named = ("evals.retrieval.data.path", str(tar))
    config = cli.load_config("clip:small", [("data.path", str(tar)), named])
    assert assemble(config, jax.devices()[:1]).held_out_evals == ()
    dataset.show_fingerprint(config)
    assert capsys.readouterr().out.count(": 48 rows,") == 1


def test_an_evaluation_finds_data_that_has_moved(tar, tmp_path):
    config = held_out(tar, path=str(tmp_path / "gone.tar"))
    override(config, [("data.path", str(tar)), ("evals.retrieval.limit", "2")])
    assert len(assemble(config).evaluators()["retrieval"].examples) == 2
    with pytest.raises(ConfigError, match="the model is trained already"):
        override(config, [("data.source", "table")])


@pytest.mark.slow
def test_an_evaluation_reads_the_rows_of_the_run(tar, tmp_path, capsys):
    config = held_out(tar)
    assert train(config, str(tmp_path / "run")) == 0
    (last,) = [
        row["retrieval/mean_recall"]
        for row in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
        if "retrieval/mean_recall" in row
    ]
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert evaluate(tmp_path / "run", "best", saved)["retrieval/mean_recall"] == last
    other = small(("train.total_steps", "2"), ("evals", "{}"), ("train.best", ""))
    other["data"] = config["data"]
    assert train(other, str(tmp_path / "other")) == 0  # it trained on every row
    saved = json.loads((tmp_path / "other" / "config.json").read_text())
    with pytest.raises(ConfigError, match="the 48 rows that the run trained on"):
        evaluate(tmp_path / "other", "latest", saved | {"evals": config["evals"]})
