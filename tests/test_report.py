from __future__ import annotations

import html.parser
import json
import math
import re
import sys
import types

import numpy as np
import pytest

from clipx import report as command
from clipx.errors import RunError
from clipx.reporting import gallery
from clipx.reporting import page as report
from clipx.reporting.charts import Figure
from clipx.reporting.gallery import Samples
from clipx.training import episodes
from clipx.training.metrics import Metrics
from clipx.types import Encoded

CONFIG = {
    "objective": {"name": "siglip"},
    "image": {"name": "vit", "variant": "ViT-B/32"},
    "data": {"source": "shapes"},
    "train": {"batch_size": 8, "best": "knn/top1"},
}


@pytest.fixture
def workdir(tmp_path):
    with Metrics(tmp_path, total_steps=200, batch_size=8, steps_per_epoch=50) as metrics:
        for step in range(1, 201):
            loss = math.nan if step == 90 else 2 / step
            metrics.log(
                step,
                {"loss": loss, "chance_loss": 4.85, "learning_rate": 0.1, "logit_scale": 14.3},
            )
            if step % 100 == 0:
                metrics.log(step, {"knn/top1": 0.9 - step / 1000, "retrieval/x_median_rank": step})
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def samples(n=12, each=2):
    """Captions that score their own picture highest, except the first picture's captions."""
    pictures = np.random.default_rng(0).integers(0, 256, (n, 16, 16, 3)).astype(np.uint8)
    owner = np.repeat(np.arange(n), each)
    captions = [f"<b>{i} & '{j}'</b>" for i in range(n) for j in range(each)]
    similarity = (owner == np.arange(n)[:, None]).astype(np.float32)
    similarity[:, :each] = np.linspace(0, 1, n)[:, None]  # the first picture comes last
    return Samples(pictures, captions, similarity, owner)


class Page(html.parser.HTMLParser):
    """Counts elements and classes, checks that every element is closed in order."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.classes, self.links, self.ids, self.text = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        attributes = dict(attributes)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.classes += (attributes.get("class") or "").split()
        self.links += [attributes[k] for k in ("src", "href", "xlink:href") if k in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(path):
    return Page(path.read_text(encoding="utf-8"))


def test_the_page_stands_alone_and_is_whole(workdir):
    page = read(report.write(workdir, samples=samples()))
    assert page.links and all(link.startswith(("data:", "#")) for link in page.links)
    assert "script" not in page.tags
    text = " ".join(page.text)
    for part in ("siglip · ViT-B/32 · shapes", str(workdir), "1,600", "<b>3 & '0'</b>"):
        assert part in text
    assert page.tags.count("svg") == 3 + 2  # curves of training and of evaluation
    assert not list(workdir.glob(".report*"))


def test_the_best_is_the_lowest_of_ranks_and_the_highest_of_the_rest(workdir):
    text = re.sub(r"<[^>]+>", " ", report.write(workdir).read_text())
    assert re.search(r"knn/top1 +80.0 % +100 +70.0 %", text)
    assert re.search(r"retrieval/x_median_rank +100 +100 +200", text)
    assert re.search(r"checkpoint with the best +knn/top1", text)


def test_the_matrix_and_the_queries(workdir):
    page = read(report.write(workdir, samples=samples()))
    assert page.classes.count("own") == 12  # one for each picture
    assert page.tags.count("article") == 8
    assert page.classes.count("right") == 7  # the first picture is not among the five found
    text = " ".join(page.text)
    assert "11 of 12 captions score their own picture highest" in text
    assert "right picture at rank 12 of 12" in text


def test_another_picture_with_the_same_caption_is_right_too(workdir):
    given = samples(n=4, each=1)
    alike = ["a", "a", "b", "c"]
    page = read(report.write(workdir, samples=given._replace(captions=alike)))
    assert page.tags.count("article") == 3  # one for each caption
    assert page.classes.count("right") == 4


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_a_collapsed_model_is_drawn(workdir, value):
    given = samples(n=3)
    given.similarity[:] = value
    assert read(report.write(workdir, samples=given)).tags.count("article") == 3


def test_without_samples_config_or_evaluations(tmp_path):
    with Metrics(tmp_path / "bare", total_steps=2, batch_size=8) as metrics:
        metrics.log(1, {"loss": 1.0})
    page = read(report.write(tmp_path / "bare"))
    assert "bare" in " ".join(page.text) and page.tags.count("svg") == 1


def test_the_same_run_gives_the_same_page(workdir):
    first = report.write(workdir, samples=samples()).read_bytes()
    assert report.write(workdir, samples=samples()).read_bytes() == first


def table(html):
    """The table of the evals' best and last metrics."""
    return re.search(r'<table class="scores">.*?</table>', html, re.DOTALL)[0]


def with_episodes(workdir, *numbers, external=False):
    """The workdir with pictures of episodes of 60 rows, in clusters of 15."""
    rows = np.arange(60)
    features = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    names = ("image", "text") + ("external",) * external
    pictures = np.zeros((60, 16, 16, 3), np.uint8)
    for number in numbers:
        episodes.write(
            workdir,
            number,
            rows=rows,
            features={"image": features, "text": -features},
            labels=dict.fromkeys(names, rows % 4),
            load=lambda places: (pictures[places], [f"<i>{p} & '{p}'</i>" for p in places]),
        )


def test_episodes_are_shown_the_newest_first(workdir):
    with_episodes(workdir, 0, 3, 11)
    given = workdir / "metrics.jsonl"
    lines = [{"step": step, "episode/seconds": 2.0 + step} for step in (0, 100, 200)]
    given.write_text("".join(json.dumps(line) + "\n" for line in lines) + given.read_text())
    path = report.write(workdir)
    page, html = read(path), path.read_text()
    text = " ".join(page.text)
    assert re.findall(r"Episode (\d+), of 60 rows", text) == ["11", "3", "0"]
    assert page.tags.count("details") == 2 + 1  # and the config
    assert page.tags.count("article") == 3 * (3 + 3)  # prototypes of pictures and of captions
    assert "cluster 2 of captions, 15 rows" in text and "<i>2 & '2'</i>" in text
    assert page.tags.count("svg") == 5 + 1 + 3 * 2  # the seconds, and maps
    used = set(re.findall(r"""(?:url\(|href=")#([^)"]+)""", html))
    assert used and all(page.ids.count(name) == 1 for name in used)  # every SVG has its own ids
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert "episode/seconds" in text and "episode/seconds" not in table(html)


def test_a_teachers_clusters_have_a_map_of_their_own(workdir):
    with_episodes(workdir, 0, external=True)
    page = read(report.write(workdir))
    assert "Clusters of the teacher's rows" in page.text
    assert page.tags.count("svg") == 5 + 3 and page.tags.count("article") == 6


def test_a_page_of_a_long_run_has_some_of_its_episodes(workdir, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "clipx.reporting.episode_maps.clusters",
        lambda episode, labelling: drawn.append(episode.episode) or Figure("", ""),
    )
    with_episodes(workdir, *range(33))
    report.write(workdir)
    assert drawn[::2] == [32, 28, 24, 20, 16, 12, 8, 4, 0]


def test_a_broken_episode_is_one_line(workdir):
    with_episodes(workdir, 4)
    (workdir / "episodes" / "000004.json").write_text("[")
    with pytest.raises(RunError, match="000004.json: "):
        report.write(workdir)


def test_metrics_of_clusters_have_curves(tmp_path):
    with Metrics(tmp_path, total_steps=2, batch_size=8) as metrics:
        for step in (1, 2):
            clusters = {"clusters/image_empty": 3, "clusters/text_empty": 0}
            metrics.log(step, {"loss": 1.0, "batch/text_from_image": 0.5, **clusters})
    page = read(report.write(tmp_path))
    titles = ["Loss", "Rows that pick their own prototype, %", "Empty clusters"]
    assert [text for text in page.text if text in titles] == titles
    assert {"clusters/image_empty", "clusters/text_empty"} < set(page.text)


class Examples:
    """Twelve pictures."""

    def __len__(self):
        return 12

    def batches(self, size):
        yield samples().pictures

    def picture(self, row):
        return samples().pictures[row]


class Run:
    def samples(self, held_out):
        return Examples(), ["a", "b"], [0, 3]

    def evaluators(self, held_out):
        return {}


class Encode:
    def image(self, pictures):
        return Encoded(unit=np.ones((len(pictures), 2), np.float32))

    def text(self, texts):
        return Encoded(unit=np.ones((len(texts), 2), np.float32))

    def similarity(self, images, texts):
        return images.unit @ texts.unit.T


def test_every_process_encodes_and_process_0_writes(workdir, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    assert report.write_run(workdir, Run(), Encode()) is None
    assert not (workdir / "report.html").exists()
    monkeypatch.setattr("jax.process_index", lambda: 0)
    page = read(report.write_run(workdir, Run(), Encode()))
    assert page.tags.count("article") == 2


def test_a_run_without_pairs_to_look_at(workdir):
    path = report.write_run(
        workdir,
        types.SimpleNamespace(samples=lambda held_out: None, evaluators=lambda held_out: {}),
        Encode(),
    )
    assert read(path).tags.count("article") == 0


def test_no_metrics_is_one_line(tmp_path):
    with pytest.raises(RunError, match="no metrics in .*metrics.jsonl: is this the workdir"):
        report.write(tmp_path)


def test_a_folder_that_cannot_be_written_is_one_line_and_keeps_the_old_page(workdir, monkeypatch):
    old = report.write(workdir).read_bytes()

    def full(self, *arguments, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(RunError, match="cannot write .*report.html: No space left on device$"):
        report.write(workdir, samples=samples())
    assert (workdir / "report.html").read_bytes() == old


@pytest.mark.parametrize("library", ["matplotlib", "jinja2"])
def test_without_a_library_is_one_line(workdir, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(RunError, match=f"pip install {library}$"):
        report.write(workdir)


def test_shares_are_in_percent_and_the_best_of_a_bias_is_the_least(tmp_path):
    config = {"evals": {"near": {"evaluator": "knn"}, "bias": {}, "mine": {"evaluator": "gone"}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with Metrics(tmp_path, total_steps=2, batch_size=8) as metrics:
        metrics.log(1, {"near/k20/top1": 0.25, "bias/gap_after": 0.5, "mine/x": 3})
        metrics.log(2, {"near/k20/top1": 0.5, "bias/gap_after": 0.75, "mine/x": 4})
    html = report.write(tmp_path).read_text()
    text = re.sub(r"\s*<[^>]+>\s*", " ", table(html))
    assert re.search(r"near/k20/top1 +50.0 % +2 +50.0 %", text)
    assert re.search(r"bias/gap_after +0.5 +1 +0.75", text)
    assert re.search(r"mine/x +4 +2 +4", text)
    assert "<figcaption>near, %</figcaption>" in html


def test_a_term_of_the_loss_has_a_panel_with_its_chance(tmp_path):
    """The dashed lines have a name, and a level that changes is drawn as it changes."""
    with Metrics(tmp_path, total_steps=2, batch_size=8) as metrics:
        for step in (1, 2):
            terms = {"loss/contrastive": 2.0, "loss/prototype": 3.0, "batch/R@1": 0.5}
            chances = {"chance_loss/contrastive": 2.1, "chance_loss/prototype": 4.0}
            metrics.log(step, {"loss": 2.0 * step, "chance_loss": 2.1 * step, **terms, **chances})
    path = report.write(tmp_path)
    figures = re.findall(r"<figcaption>(.*?)</figcaption>(.*?)</figure>", path.read_text(), re.S)
    drawn = {title: re.findall("</i>(.*?)</span>", rest) for title, rest in figures}
    assert drawn == {
        "Loss": ["loss", "chance"],
        "R@1 inside the batch, %": [],
        "Loss: contrastive": ["loss/contrastive", "chance"],
        "Loss: prototype": ["loss/prototype", "chance"],
    }
    assert all('class="dashed"' in rest for title, rest in figures if title.startswith("Loss"))


def test_chance_and_sizes_stand_beside_the_scores(workdir):
    looked = report.Looked(None, {"knn/top1": 0.1}, {"knn": {"pictures": 2000, "classes": 10}})
    text = re.sub(r"\s*<[^>]+>\s*", " ", report.write(workdir, looked=looked).read_text())
    assert re.search(r"knn/top1 +80.0 % +100 +70.0 % +10.0 %", text)
    assert "knn : 2,000 pictures, 10 classes." in text


def test_what_was_evaluated_afterwards(workdir):
    entry = {
        "dataset": "cifar10-test",
        "metrics": {"acc1": 0.25, "acc5": 0.75, "class/cat": 0.5, "other": 3.0},
        "eval": {"evaluator": "zero_shot"},
        "sizes": {"pictures": 10_000},
        "chance": {"acc1": 0.1},
    }
    old = {"dataset": "x", "metrics": {"image_retrieval_recall@5": 0.5}}
    for step, name, content in (
        (1000, "cifar10-test_cifar", entry),
        (200, "x_retrieval", old),
        (200, "broken", [1]),
    ):
        folder = workdir / f"evaluation_{step}"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(content))
    html = report.write(workdir).read_text()
    after = html[html.index("Evaluated afterwards") : html.index("<h2>Training")]
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in after.split("<tr>")[2:]]
    assert rows == [
        ["retrieval/text_to_image_R@5", "x", "", "200", "50.0 %", ""],
        ["cifar/top1", "cifar10-test", "10,000 pictures", "1,000", "25.0 %", "10.0 %"],
        ["cifar/top5", "cifar10-test", "10,000 pictures", "1,000", "75.0 %", ""],
        ["cifar/other", "cifar10-test", "10,000 pictures", "1,000", "3", ""],
    ]


class Scores:
    """An encoder whose score of a caption and a picture is minus the distance of their numbers."""

    def image(self, pictures):
        return Encoded(unit=pictures[:, 0, 0, :1].astype(np.float32))

    def text(self, texts):
        return Encoded(unit=np.array([[float(text)] for text in texts], np.float32))

    def similarity(self, images, texts):
        return -np.abs(images.unit - texts.unit.T)


def test_queries_rank_the_whole_test_set():
    """600 pictures in three batches, of which the last is padded; two have each number."""
    numbers = np.arange(600) // 2 % 256
    pictures = np.broadcast_to(numbers[:, None, None, None], (600, 4, 4, 3)).astype(np.uint8)
    read = []

    class Set:
        def __len__(self):
            return 600

        def batches(self, size):
            yield from (pictures[i : i + size] for i in range(0, 600, size))

        def picture(self, row):
            read.append(row)
            return pictures[row]

    owner = np.repeat(np.arange(600), 2)
    captions = [str(numbers[i]) for i in owner]
    looked = gallery.look(Scores(), Set(), captions, owner)
    assert looked.similarity.shape[0] == 600 and len(looked.columns) < 30 and read == []
    for query in gallery.queries(looked):
        right = np.flatnonzero(numbers == int(query.caption))
        assert (query.rank, query.pictures) == (1, 600)
        assert [hit.picture for hit in query.hits if hit.right] == right[:5].tolist()
        assert looked.pictures[query.hits[0].picture][0, 0, 0] == int(query.caption)


def test_following_a_run_until_it_writes_its_own(workdir, capsys):
    """The page is written when there are metrics to add, and refreshes itself until the end."""
    log, lines = workdir / "metrics.jsonl", []
    text = log.read_text().splitlines(keepends=True)
    log.write_text("".join(text[:50]))

    def stop():
        page = workdir / "report.html"
        lines.append("http-equiv" in page.read_text() if page.exists() else None)
        if len(lines) == 20:
            log.write_text("".join(text))
        if len(lines) == 40:
            report.write(workdir)  # as the run does at its end
        assert len(lines) < 500
        return False

    path = command.follow(str(workdir), stop, seconds=0.01)
    assert path == workdir / "report.html" and "http-equiv" not in path.read_text()
    told = capsys.readouterr().out.splitlines()
    assert [line.rpartition(": ")[2] for line in told] == ["step 50", "step 200"]
    assert True in lines


def test_following_that_is_stopped_leaves_a_page_that_stays(workdir):
    calls = iter([False, True, True, True])
    assert "http-equiv" not in command.follow(str(workdir), lambda: next(calls)).read_text()
