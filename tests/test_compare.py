"""`clipx.compare`: variants of a config trained one after another, and one table of their evals."""

import json
import types

import pytest

from clipx import compare
from clipx.errors import ConfigError
from clipx.reporting import comparison

CONFIG = """
VARIANTS = ("a", "b")

def get_config(variant="a"):
    return {"evals": {"retrieval": {}, "cifar10": {}}, "name": variant}
"""
RECALLS = {f"retrieval/text_to_image_R@{k}": k / 100 for k in (1, 10, 5)}


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A config of two variants, and a fake `train` that writes a run's files."""

    def train(config, workdir):
        folder = tmp_path / "runs" / config["name"]
        assert str(folder) == workdir
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
        rows = [
            {"step": 5, "retrieval/text_to_image_R@1": 0.9},
            {"step": 9, "retrieval/text_to_image_R@1": 0.01},
            {"step": 9, "loss": 2.0, **{k: v for k, v in RECALLS.items() if k[-3:] != "R@1"}},
            {"step": 9, "loss": 1.0},
        ]
        rows[2] |= {"cifar10/top1": 0.254, "cifar10/ami": 0.01} if config["name"] == "b" else {}
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return 42 if config.get("stop") else 0

    monkeypatch.setattr(compare, "train", train)
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return str(path)


def test_one_table_of_the_last_evals(config, tmp_path, capsys):
    assert compare.compare(config, (), str(tmp_path / "runs"), []) == 0
    assert capsys.readouterr().out.split("\n\n")[-1].splitlines() == [
        "| | retrieval text→image R@1 / 5 / 10 | cifar10 top-1 | cifar10 ami |",
        "|---|---|---|---|",
        "| a | 1.0 / 5.0 / 10.0 |  |  |",
        "| b | 1.0 / 5.0 / 10.0 | 25.4 | 0.010 |",
    ]


def test_a_finished_variant_is_not_trained_again(config, tmp_path, monkeypatch, capsys):
    runs = tmp_path / "runs"
    assert compare.compare(config, ("a",), str(runs), []) == 0
    (runs / "a" / "report.html").touch()
    monkeypatch.setattr(
        comparison, "assemble", lambda values: types.SimpleNamespace(complete=values)
    )
    monkeypatch.setattr(comparison, "resolved", lambda values, folder, say: values)
    assert compare.compare(config, (), str(runs), []) == 0  # to train "a" would fail
    said = capsys.readouterr().out
    assert "\na: already finished\n" in said and "\nb\n" in said and "| a | 1.0 / 5.0" in said
    with pytest.raises(ConfigError, match="another config"):
        compare.compare(config, (), str(runs), [("name", "other")])


def test_chosen_variants_and_a_run_that_is_stopped(config, tmp_path, capsys):
    runs = str(tmp_path / "runs")
    assert compare.compare(config, ("b",), runs, [("stop", "True")]) == 42
    assert not (tmp_path / "runs" / "a").exists() and "|" not in capsys.readouterr().out
    with pytest.raises(ConfigError, match="'c'\n.*one of a, b"):
        compare.compare(config, ("a", "c"), runs, [])
