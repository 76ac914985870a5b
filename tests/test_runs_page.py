"""Runs compared on one page: the table, the differences, the curves, and pictures side by side."""

import json
import re

import numpy as np
import pytest
from support import browser, commands

from clipx.errors import ConfigError, RunError
from clipx.reporting import claims, runs_page, trials_table
from clipx.reporting.comparison import result
from clipx.reporting.gallery import Samples
from clipx.training import compared
from clipx.training.metrics import Metrics

EVALS = {"retrieval": {}, "knn": {}}


def make(folder, recall, *, seed=0, rate=0.001, evals=True, term=False):
    """A workdir of 40 steps of 8 rows, of which each takes half a second."""
    with Metrics(folder, total_steps=40, batch_size=8, evals=EVALS) as metrics:
        for step in range(1, 41):
            values = {"loss": 3 / step, "chance_loss": 2.0, "step_seconds": 0.5, "batch/R@1": 0.5}
            values |= {"loss/simsiam": 1.0} if term else {}
            metrics.log(step, values)
            if evals and step % 20 == 0:
                ranks = {"retrieval/text_to_image_median_rank": 40 * recall}
                scores = {"retrieval/mean_recall": recall * step / 40, "knn/class/x": 0.5}
                metrics.log(step, scores | ranks)
    config = {"objective": {"name": "clip"}, "seed": seed, "evals": EVALS}
    config["optimizer"] = {"learning_rate": rate, "rules": [{"pattern": ".*"}]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def folders(tmp_path):
    return [
        make(tmp_path / "slow", 0.25),
        make(tmp_path / "slow2", 0.35, seed=1),
        make(tmp_path / "fast", 0.5, rate=0.01),
    ]


def samples(shift):
    """Four pictures whose captions score the picture `shift` places on highest."""
    pictures = np.arange(4 * 48).reshape(4, 4, 4, 3).astype(np.uint8)
    similarity = np.roll(np.eye(4, dtype=np.float32), shift, axis=0)
    return Samples(pictures, ["a", "b", "c", "<d>"], similarity, np.arange(4))


def cells(html, section):
    part = html[html.index(f"<h2>{section}") :].split("</table>")[0]
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S) for row in part.split("<tr>")[1:]]


def test_the_table_marks_the_best_and_joins_seeds(folders, tmp_path):
    html = runs_page.write(tmp_path / "p.html", [runs_page.read(f) for f in folders]).read_text()
    assert cells(html, "Evaluations") == [
        ["run", "retrieval/mean_recall", "retrieval/text_to_image_median_rank"],
        ["slow, slow2 (2 seeds)", "30.0 % (25.0 % to 35.0 %)", "12 (10 to 14)"],
        ["fast", "50.0 %", "20"],
    ]
    assert re.findall(r'class="best">\s*(.*?)</td>', html) == ["12 (10 to 14)", "50.0 %"]
    assert cells(html, "What differs") == [
        ["key", "slow", "slow2", "fast"],
        ["optimizer.learning_rate", "0.001", "0.001", "0.01"],
        ["seed", "0", "1", "0"],
    ]


def test_curves_over_steps_examples_and_seconds(folders, tmp_path):
    runs = [runs_page.read(f) for f in folders]
    assert runs[0].rows[-1]["seconds"] == 20 and runs[0].rows[19]["seconds"] == 10
    html = runs_page.write(tmp_path / "p.html", runs).read_text()
    panels = html.split('<div class="panel">')[1:]
    titles = [re.findall("<figcaption>(.*?)</figcaption>", panel) for panel in panels]
    assert titles[0] == titles[1] == titles[2] == [
        "loss", "batch/R@1, %", "retrieval/mean_recall, %", "retrieval/text_to_image_median_rank",
    ]  # fmt: skip
    for panel, axis in zip(panels, ("steps", "examples", "seconds of training")):
        assert axis in panel and panel.count("</i>slow2</span>") == 4
    ids = re.findall(r'\bid="([^"]+)"', html)
    used = set(re.findall(r"""(?:url\(|href="|for=")#?([^)"]+)""", html)) & set(ids)
    assert used and all(ids.count(name) == 1 for name in used)


def test_seeds_of_a_variant_claims_and_trials(tmp_path):
    """Seeds share a colour, and a name; a metric that one method lacks has a chart of the others;
    only the first run of a variant is opened."""
    made = [
        make(tmp_path / "clip" / "0", 0.25),
        make(tmp_path / "slip" / "0", 0.5, rate=0.01, term=True),
        make(tmp_path / "clip" / "1", 0.35, seed=1),
        make(tmp_path / "slip" / "1", 0.5, seed=1, rate=0.01, term=True),
    ]
    for name in ("00", "01"):
        trial = make(tmp_path / "trials" / name, 0.1)
        changes = {"optimizer.learning_rate": 0.02} if name == "01" else {}
        record = {"metric": "retrieval/mean_recall", "changes": changes}
        (trial / compared.FILE).write_text(json.dumps(record))
    search = trials_table.read("slip", sorted((tmp_path / "trials").iterdir()), chosen=1)
    assert search.keys == ["optimizer.learning_rate"]
    assert [(t.number, t.values, t.score, t.chosen) for t in search.rows] == [
        (0, [""], "10.0 %", False),
        (1, ["0.02"], "10.0 %", True),
    ]
    claim = claims.Claim("SLIP <wins>", "p. 3", "retrieval/mean_recall", "slip", "clip", "more")
    results = {"clip": map(result, made[::2]), "slip": map(result, made[1::2])}
    verdicts = claims.verdicts([claim], {name: [*of] for name, of in results.items()})
    said, groups = [], ["clip", "slip"] * 2
    out = str(tmp_path / "p.html")
    runs_page.compare([*map(str, made)], out, said.append, (), groups, verdicts, [search])
    html = (tmp_path / "p.html").read_text()
    assert len(said) == 2
    assert [row[0] for row in cells(html, "Evaluations")[1:]] == [
        "clip (2 seeds)",
        "slip (2 seeds)",
    ]
    assert cells(html, "What differs")[0] == ["key", "clip", "slip"]
    assert "SLIP &lt;wins&gt;" in html and "<b>cannot be told</b><br>2 seeds" in html
    assert cells(html, "Search")[2] == ["1", "10.0 %", "0.02"]
    (panel,) = re.findall(r"<figcaption>loss</figcaption>.*?</figure>", html, re.S)[:1]
    legend = re.findall(r'background:(#\w+)"></i>(\w+)', panel)
    assert [name for _, name in legend] == ["clip", "slip"]
    assert all(panel.count(f"stroke: {colour}") == 2 for colour, _ in legend)
    assert html.count("<figcaption>loss/simsiam</figcaption>") == 3


def test_pictures_side_by_side(folders, tmp_path):
    """Of the captions that all runs have, and only of runs that could be opened."""
    runs = [runs_page.read(f) for f in folders]
    runs[0] = runs[0]._replace(samples=samples(0))
    runs[2] = runs[2]._replace(samples=samples(1)._replace(captions=["a", "x", "c", "<d>"]))
    html = runs_page.write(tmp_path / "p.html", runs).read_text()
    part = html[html.index("<h2>Queries") :]
    assert re.findall("“(.*?)”", part) == ["a", "c", "&lt;d&gt;"]
    assert re.findall("<h3>([^“]*?)</h3>", part) == ["slow", "fast"] * 3
    ranks = re.findall(r"at rank (\d) of 4", part)
    assert ranks[::2] == ["1", "1", "1"] and "1" not in ranks[1::2]
    alone = runs_page.write(tmp_path / "p.html", [runs[0], runs[1]]).read_text()
    assert "<h2>Queries" not in alone


def test_the_command(folders, tmp_path):
    """Runs without a checkpoint are compared without pictures, which is said."""
    out = tmp_path / "out" / "page.html"
    done = commands.run("report", *(f"--workdir={f}" for f in folders), f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("no pictures, as the run cannot be opened") == 3
    assert done.stdout.splitlines()[-1] == str(out) and out.is_file()
    done = commands.run("report", f"--workdir={folders[0]}", f"--workdir={tmp_path}/none")
    assert done.returncode == 2 and "none" in done.stderr


def test_what_cannot_be_compared(tmp_path):
    with pytest.raises(ConfigError, match="config.json"):
        runs_page.read(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RunError, match="no metrics"):
        runs_page.read(tmp_path)
    once = make(tmp_path / "a" / "run", 0.5, evals=False)
    page = runs_page.write(tmp_path / "p.html", [runs_page.read(once)] * 2)
    assert "run (2)" in page.read_text() and "<h2>Evaluations" not in page.read_text()


@browser.needed
@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_in_a_browser(folders, tmp_path, width, dark):
    """No error, no request, nothing wider than the window, and no panel without a curve."""
    runs = [runs_page.read(f)._replace(samples=samples(i)) for i, f in enumerate(folders)]
    page = runs_page.write(tmp_path / "p.html", runs)
    seen = browser.look(page, width=width, dark=dark)
    assert seen.errors == [] and seen.requests == [] and seen.overflow == 0
    assert seen.pictures == 3 * 4 * 4 and seen.blank_pictures == 0
    assert seen.drawings == 3 * 4 and seen.blank_drawings == 0
    assert (seen.background < 80) == dark
