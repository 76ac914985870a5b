"""`clipx.compare`: variants of a config trained one after another, and one table of their evals."""

import csv
import json
import pathlib
import shutil
import types

import pytest
from support import ROOT, commands

from clipx import compare
from clipx.configs import quickstart
from clipx.errors import ConfigError, RunError
from clipx.planning import comparing, lengths
from clipx.planning.comparing import Planned
from clipx.reporting import comparison, runs_page

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
    with pytest.raises(ConfigError, match="without SEARCH"):
        compare.compare(config, (), runs, [], count=2)
    with pytest.raises(ConfigError, match="'c'\n.*one of a, b"):
        compare.compare(config, ("a", "c"), runs, [])


def lines(folder):
    with open(folder / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_seeds_share_a_row_of_means_and_spreads(config, tmp_path, monkeypatch, capsys):
    runs = tmp_path / "runs"
    monkeypatch.setattr(runs_page, "compare", lambda *args: "page")
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


def test_results_csv_stands_for_runs_that_are_gone(config, tmp_path, monkeypatch, capsys):
    runs, names = tmp_path / "runs", []
    monkeypatch.setattr(runs_page, "compare", lambda *args: names.extend(args[3]) or "page")
    assert compare.compare(config, ("a",), str(runs), [], (1, 2)) == 0
    for seed in (1, 2):
        (runs / "a" / f"seed_{seed}" / "report.html").touch()
    compare.runs_table.write(runs)
    shutil.rmtree(runs / "a")
    names.clear()
    assert compare.compare(config, ("a",), str(runs), [], (1, 2, 3)) == 0
    said = capsys.readouterr().out
    assert "\na/seed_1: finished, by results.csv\n" in said
    assert "| a (3 seeds) | 1.0 (1.0 to 1.0)" in said and "| 20.0 (10.0 to 30.0) |" in said
    assert names == ["a/seed_3"] and "\nnot on the page: 2 runs that only" in said
    assert [row["folder"] for row in lines(runs)] == ["a/seed_1", "a/seed_2", "a/seed_3"]
    before = (runs / "results.csv").read_text()
    with pytest.raises(ConfigError, match=r"results.csv, whose run a/seed_1 had other values"):
        compare.compare(config, ("a",), str(runs), [("lr", "2")], (1,))
    assert (runs / "results.csv").read_text() == before
    for text in ("variant,seed\n", "variant,seed,kind,folder\na,1\n"):
        (runs / "results.csv").write_text(text)
        with pytest.raises(ConfigError, match=r"results.csv, which is damaged"):
            compare.compare(config, ("a",), str(runs), [], (1,))


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


def test_a_run_that_another_process_trains_is_left_to_it(config, tmp_path, monkeypatch, capsys):
    runs = tmp_path / "runs"
    monkeypatch.setattr(runs_page, "compare", lambda *args: "page")
    with comparing.claimed(runs, runs / "a") as mine:
        assert mine
        assert compare.compare(config, (), str(runs), []) == 0
    said = capsys.readouterr().out
    assert "\na: another process trains it\n" in said and not (runs / "a").exists()
    assert "| a |" not in said and "| b |" in said
    assert "\nnot in the table: a, as another process is at work on it\n" in said
    with comparing.claimed(runs, runs / "a"):
        assert compare.compare(config, ("a",), str(runs), []) == 0
    assert "|" not in capsys.readouterr().out
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


SEARCHED = """
from clipx.configs import quickstart

VARIANTS = ("a", "b")
RATE = "optimizer.learning_rate"
SEARCH = {"ranges": {"a": {RATE: ("log", 1e-4, 1e-2)}, "b": "a"}}
CLAIMS = [{"claim": "b is better", "source": "p. 1", "metric": "retrieval/mean_recall",
           "better": "b", "worse": "a"}]

def get_config(variant="a"):
    config = quickstart.get_config()
    config.evals.retrieval = {"data": config.evals.zero_shot.data}
    return config
"""


@pytest.fixture
def searched(tmp_path, monkeypatch):
    """(a config with SEARCH and CLAIMS, the rates of the runs in their order), with a fake `train`
    that likes a rate of 0.002, and fails at rates above 0.005."""
    rates = {}

    def train(config, workdir):
        folder, rate = pathlib.Path(workdir), config["optimizer"]["learning_rate"]
        name = folder.relative_to(tmp_path / "runs").as_posix()
        rates[name] = rate
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
        if rate > 0.005:
            raise RunError("5 steps in a row had a loss that is not finite\nTheir rows: ...")
        score = 0.5 - abs(rate - 0.002) + 0.01 * name.startswith("b")
        score += 0.001 * config.get("seed", 0)
        (folder / "metrics.jsonl").write_text(
            json.dumps({"step": 1, "retrieval/mean_recall": score, "examples": 32}) + "\n"
        )
        (folder / "report.html").touch()
        return 0

    monkeypatch.setattr(compare, "train", train)
    monkeypatch.setattr(runs_page, "compare", lambda *args: "page")
    monkeypatch.setattr(comparison, "finished", lambda folder, _: (folder / "report.html").exists())
    path = tmp_path / "searched.py"
    path.write_text(SEARCHED)
    return str(path), rates


def test_the_best_trial_is_used_by_the_final_runs(searched, tmp_path, capsys):
    config, rates = searched
    runs = tmp_path / "runs"
    assert compare.compare(config, (), str(runs), [], (0, 1, 2), 6) == 0
    trials = {name: rate for name, rate in rates.items() if "trials" in name}
    assert [*trials] == [f"a/trials/0{i}" for i in range(6)] and len(rates) == 6 + 2 * 3
    assert trials["a/trials/00"] == quickstart.get_config().optimizer.learning_rate
    best = min(trials, key=lambda name: abs(trials[name] - 0.002))
    assert {rates[f"{name}/seed_{seed}"] for name in "ab" for seed in range(3)} == {trials[best]}
    chosen = json.loads((runs / "a" / "chosen.json").read_text())
    assert (chosen["trials"], chosen["trial"]) == (6, int(best[-1]))
    said = capsys.readouterr().out
    assert "\na: chosen by the search (trial" in said and "6 of 12 runs done" in said
    assert "| b is better | p. 1 | retrieval/mean_recall | b 5" in said and "| holds |" in said
    assert (runs / "results.md").read_text().strip() in said
    table = {row["folder"]: row for row in lines(runs)}
    assert float(table[best]["score"]) > float(table["a/trials/00"]["score"])
    assert json.loads(table["b/seed_0"]["changes"])["optimizer.learning_rate"] == trials[best]
    failed = [name for name, rate in trials.items() if rate > 0.005]
    assert failed and all(table[name]["failed"].startswith("5 steps") for name in failed)

    rates.clear()  # nothing is trained again, with the trials or with what they have chosen
    for count in (6, 0):
        assert compare.compare(config, (), str(runs), [], (0, 1, 2), count) == 0
    assert not rates
    with pytest.raises(ConfigError, match="after a search of 6 trials"):
        compare.compare(config, (), str(runs), [], (0, 1, 2), 7)


def test_a_search_comes_before_the_final_runs(searched, tmp_path):
    runs = str(tmp_path / "runs")
    assert compare.compare(searched[0], ("b",), runs, []) == 0
    with pytest.raises(ConfigError, match="began after no search"):
        compare.compare(searched[0], ("b",), runs, [], (), 2)


def test_trials_of_another_process_hold_the_final_runs(searched, tmp_path, capsys):
    runs = tmp_path / "runs"
    with comparing.claimed(runs, runs / "a" / "trials" / "01"):
        assert compare.compare(searched[0], (), str(runs), [], (), 2) == 0
    assert [*searched[1]] == ["a/trials/00"]
    assert capsys.readouterr().out.count("not in the table") == 3


def test_equal_flops(searched, tmp_path, monkeypatch, capsys):
    """A variant whose pairs cost twice as much sees half of them."""
    costs = {"a": 10.0, "b": 20.0}

    def opened(config, folder):
        return types.SimpleNamespace(pair_flops=costs[folder.name], batch_size=32)

    monkeypatch.setattr(lengths, "opened", opened)
    monkeypatch.setattr(lengths, "pairs", lambda run: 6400)
    runs = tmp_path / "runs"
    assert compare.compare(searched[0], (), str(runs), [], budget="flops") == 0
    said = capsys.readouterr().out
    assert "  b: 3,200 pairs at 20 flops a pair" in said and "| | pairs seen |" in said
    a, b = (json.loads((runs / name / "config.json").read_text())["train"] for name in "ab")
    assert "total_examples" not in a and a["total_steps"] == 480
    assert b["total_examples"] == 3200 and b["total_steps"] is None
    assert [row["budget"] for row in lines(runs)] == ["flops", "flops"]


REAL = """
import sys
sys.path.insert(0, {support!r})
from support.runs import small

VARIANTS = ("clip", "siglip")
SEARCH = {{
    "ranges": {{"clip": {{"optimizer.learning_rate": ("log", 3e-4, 1e-2)}}, "siglip": "clip"}},
    "share": 0.5,
}}

def get_config(variant="clip"):
    return small(("objective.name", variant), ("train.best", ""))
"""


@pytest.mark.slow  # trains six small runs
def test_a_comparison_for_real(tmp_path, capsys):
    """Timed, searched, trained, shown; and found finished when it is started again."""
    config, runs = tmp_path / "real.py", tmp_path / "runs"
    config.write_text(REAL.format(support=str(ROOT / "tests")))
    for again in (False, True):
        assert compare.compare(str(config), (), str(runs), [], (0,), 2, "seconds") == 0
        said = capsys.readouterr().out
        names = ("clip/timing", "siglip/timing", "clip/trials/00", "clip/trials/01")
        for name in (*names, "clip/seed_0", "siglip/seed_0"):
            assert (f"\n{name}: already finished\n" in said) == again
        assert "| | pairs seen |" in said and "chosen by the search" in said
    table = {row["folder"]: row for row in lines(runs)}
    assert [table[name]["kind"] for name in names] == ["timing", "timing", "trial", "trial"]
    assert all(float(table[name]["score"]) > 0 for name in names[2:])
    assert table["clip/trials/00"]["pairs_seen"] == str(6 * 32)
    assert all(float(row["flops_per_pair"]) > 0 for row in table.values())
    held = json.loads((runs / "clip" / "trials" / "00" / "config.json").read_text())["evals"]
    assert [*held] == ["retrieval"] and held["retrieval"]["data"]["path"] == ""
    page = (runs / "comparison.html").read_text()
    assert "<h2>Search" in page and "<h2>Evaluations" in page
