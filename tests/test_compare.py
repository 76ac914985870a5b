"""`clipx.compare`: variants of a config trained one after another, and one table of their evals."""

import csv
import json
import types

import pytest
from support import commands

from clipx import compare
from clipx.errors import ConfigError
from clipx.planning import comparing
from clipx.planning.comparing import Planned
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
        folder /= f"seed_{config['seed']}" if "seed" in config else ""
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
        if seed := config.get("seed"):
            rows[2] |= {"cifar10/top1": seed / 10}
            rows[3] |= {"step_seconds": 2.0, "images_per_second": 16.0, "flops_per_pair": 7.0}
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


def lines(folder):
    with open(folder / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_seeds_share_a_row_of_means_and_spreads(config, tmp_path, capsys):
    runs = tmp_path / "runs"
    assert compare.compare(config, (), str(runs), [], (1, 2, 4)) == 0
    said = capsys.readouterr().out
    assert said.split("\n\n")[-1].splitlines()[2:] == [
        "| a (3 seeds) | 1.0 (1.0 to 1.0) / 5.0 (5.0 to 5.0) / 10.0 (10.0 to 10.0) "
        "| 23.3 (10.0 to 40.0) |  |",
        "| b (3 seeds) | 1.0 (1.0 to 1.0) / 5.0 (5.0 to 5.0) / 10.0 (10.0 to 10.0) "
        "| 23.3 (10.0 to 40.0) | 0.010 (0.010 to 0.010) |",
    ]
    assert "\n2 of 6 runs done" in said and "\n6 of 6 runs done\n" in said
    assert [(row["variant"], row["seed"], row["cifar10/top1"]) for row in lines(runs)] == [
        (variant, str(seed), str(seed / 10)) for variant in "ab" for seed in (1, 2, 4)
    ]
    last = lines(runs)[-1]
    assert last["folder"] == "b/seed_4" and last["kind"] == "final" and last["budget"] == "pairs"
    assert (last["seconds"], last["images_per_second"], last["flops_per_pair"]) == (
        *("18.0", "16.0", "7.0"),
    )
    (runs / "results.csv").unlink()  # it is made of the runs' own files, those of no command too
    (runs / "a" / "seed_1" / "compared.json").unlink()
    assert compare.compare(config, ("b",), str(runs), [], (3,)) == 0
    assert [row["folder"] for row in lines(runs)][2:] == [
        *("a/seed_4", "b/seed_1", "b/seed_2", "b/seed_3", "b/seed_4"),
    ]


def test_where_the_run_of_a_seed_is(tmp_path):
    def folder(seed, own=0):
        found = comparing.seed_folder(tmp_path, "a", seed, own)
        return found.relative_to(tmp_path).as_posix()

    def made(name, seed):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(json.dumps({"seed": seed}))

    assert [folder(None), folder(0), folder(1)] == ["a", "a/seed_0", "a/seed_1"]
    made("a/seed_1", 1)
    assert [folder(None), folder(None, 1), folder(1)] == ["a", "a/seed_1", "a/seed_1"]
    made("b", 0)
    assert comparing.seed_folder(tmp_path, "b", 0, 0) == tmp_path / "b"  # of an older clipx
    assert comparing.seed_folder(tmp_path, "b", 1, 0) == tmp_path / "b" / "seed_1"


def test_a_run_that_another_process_trains_is_left_to_it(config, tmp_path, capsys):
    runs = tmp_path / "runs"
    with comparing.claimed(runs, runs / "a") as mine:
        assert mine
        assert compare.compare(config, (), str(runs), []) == 0
    said = capsys.readouterr().out
    assert "\na: another process trains it\n" in said and not (runs / "a").exists()
    assert "| a |" not in said and "| b |" in said
    assert said.endswith("not in the table: a, which another process trains\n")
    assert compare.compare(config, ("a",), str(runs), []) == 0 and (runs / "a").exists()


def test_how_long_the_rest_takes(tmp_path):
    rest = [Planned("a", tmp_path, {}), Planned("c", tmp_path, {}, size=0.5)]
    assert comparing.left([{}], rest) is None
    done = [
        *({"variant": "a", "seconds": 60.0}, {"variant": "b", "seconds": 30.0, "size": 0.5}),
        {"variant": "c", "seconds": 900.0, "failed": "the loss was not finite"},
    ]
    assert comparing.left(done, rest) == 60 + 0.5 * 60  # c: as the others do
    assert [comparing.spelled(x) for x in (50, 2400, 9000)] == ["50 s", "40 min", "2.5 h"]


def test_seeds_are_different_numbers(config, tmp_path):
    flags = (f"--config={config}", f"--workdir={tmp_path}/runs")
    for wrong in ("--seeds=0,one", "--seeds=1,1", "--seeds=-1"):
        assert commands.run("compare", *flags, wrong).returncode == 2
    done = commands.run("compare", *flags, "--seeds=0", "--config.seed=1")
    assert done.returncode == 2 and "remove --config.seed" in done.stderr
