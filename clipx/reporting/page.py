"""The report: one self-contained HTML page about a run."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from clipx.config import reading, secrets
from clipx.data.base import Source
from clipx.data.threads import shown
from clipx.errors import RunError
from clipx.evaluators.base import Encode
from clipx.reporting import afterwards, charts, episode_maps, gallery
from clipx.reporting.afterwards import spelled_sizes
from clipx.reporting.gallery import Samples
from clipx.reporting.templates import render, write_page
from clipx.training import episodes, guesses, metrics
from clipx.training.metric_table import best, metric, short, spelled

FILE = "report.html"
_FILES = {
    metrics.FILE: "metrics, one JSON object per logged step",
    "config.json": "the complete config, defaults included",
    guesses.FILE: "the settings of the config that were taken from the data, and why",
    "checkpoints": "training states, to resume from or to evaluate",
    "episodes": "maps of the rows of each episode, and the rows nearest to its prototypes",
    "tensorboard": "the same metrics, for TensorBoard",
}


class Score(NamedTuple):
    """A row of the table of evaluation metrics, formatted."""

    name: str
    best: str
    step: str  # step of the best value
    last: str
    chance: str  # of a model that tells nothing apart; "" if no number is known


class Looked(NamedTuple):
    """What a look at a run's evals with its model adds to the page."""

    samples: Samples | None = None
    chance: Mapping[str, float] = {}  # by `<eval>/<metric>`
    sizes: Mapping[str, Mapping[str, int]] = {}  # by eval, as `Evaluator.sizes` has them


_UNSEEN = Looked()


def write(
    workdir: str | os.PathLike,
    *,
    samples: Samples | None = None,
    looked: Looked = _UNSEEN,
    refresh: int = 0,
) -> pathlib.Path:
    """Writes report.html from the workdir's files, and returns its path. The file is replaced as a
    whole or not at all. samples: those of `looked`, without the rest. refresh: seconds after
    which a browser opens it again; 0: it does not.

    Raises `RunError` without metrics, without matplotlib or jinja2, for a broken file, or if the
    page cannot be written.
    """
    folder = pathlib.Path(workdir)
    rows = metrics.read(folder)
    if not rows:
        raise RunError(f"no metrics in {folder / metrics.FILE}: is this the workdir of a run?")
    config_file = folder / "config.json"
    try:
        config = reading.read_json(config_file, dict[str, Any]) if config_file.is_file() else {}
    except (OSError, ValueError) as error:
        raise RunError(f"{config_file} cannot be read: {error}") from None
    looked = looked if samples is None else looked._replace(samples=samples)
    text = page(rows, secrets.cut_all(config), looked, folder, refresh)
    write_page(folder / FILE, text)
    return folder / FILE


def write_run(
    workdir: str | os.PathLike, run: Any, encode: Encode, held_out: Source | None = None
) -> pathlib.Path | None:
    """Writes report.html with what `encode` finds among the pictures and captions of the run's
    first eval that has both, and returns its path.

    run: a `training.run.Run`. held_out: the rows that it holds out of its training data, if they
    are open already; else they are read again. Every process must call this function, because
    encoding is collective. Process 0 writes; the others return None. Raises `RunError` as `write`
    does.
    """
    samples = None
    if (pairs := run.samples(held_out)) is not None:
        samples = look(encode, pairs)
    if jax.process_index() != 0:
        return None
    evaluators = run.evaluators(held_out)
    chance = {f"{n}/{k}": x for n, e in evaluators.items() for k, x in e.chance().items()}
    sizes = {name: evaluator.sizes() for name, evaluator in evaluators.items()}
    return write(workdir, looked=Looked(samples, chance, sizes))


def look(encode: Encode, pairs: Any) -> Samples:
    """What a model finds among the pairs of an eval, a `training.samples.Pairs`."""
    with shown("searching for the report", silent=jax.process_index() != 0):
        return gallery.look(encode, *pairs)


def page(
    rows: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    looked: Looked,
    workdir: pathlib.Path,
    refresh: int = 0,
) -> str:
    """The page as HTML. Without samples it has no similarity matrix and no queries.

    rows: of metrics.jsonl, in order.
    """
    training, evaluations, renewals = (
        [row for row in rows if _kind(row) == kind] for kind in ("training", "eval", "episode")
    )
    evals = config.get("evals") or {}
    scores = _scores(evaluations, evals, looked.chance)
    samples = looked.samples
    matrix = gallery.matrix(samples) if samples else None
    queries = gallery.queries(samples) if samples else []
    used = {hit.picture for query in queries for hit in query.hits}
    used |= set(matrix.pictures) if matrix else set()
    primary = config.get("train", {}).get("best", "")
    return render(
        "report.html",
        refresh=refresh,
        title=_title(config, workdir),
        workdir=workdir.resolve(),
        facts=_facts(rows[-1], training, config),
        scores=scores,
        primary=primary if primary in [score.name for score in scores] else "",
        training=charts.training(training),
        evaluations=charts.evaluations(evaluations, evals),
        renewals=charts.evaluations(renewals, evals),
        episodes=episode_maps.sheets(workdir),
        afterwards=afterwards.evaluations(workdir),
        sizes=[(name, spelled_sizes(sizes)) for name, sizes in looked.sizes.items() if sizes],
        matrix=matrix,
        queries=queries,
        depth=gallery.DEPTH,
        uris={i: episodes.thumbnail(samples.pictures[i]) for i in sorted(used)} if samples else {},
        files=[(name, about) for name, about in _FILES.items() if (workdir / name).exists()],
        config=json.dumps(config, indent=2, ensure_ascii=False) if config else "",
    )


def _kind(row: Mapping[str, Any]) -> str:
    """What a row of metrics.jsonl reports: "training" (it has a `loss`), "episode" or "eval"."""
    if "loss" in row:
        return "training"
    return "episode" if any(key.startswith("episode/") for key in row) else "eval"


def _title(config: Mapping[str, Any], workdir: pathlib.Path) -> str:
    method = config.get("objective", {}).get("name")
    image = config.get("image", {})
    data = config.get("data", {}).get("source")
    parts = [method, image.get("variant") or image.get("name"), data]
    return " · ".join(str(p) for p in parts if p) or workdir.resolve().name


def _facts(
    last: Mapping[str, Any], training: Sequence[Mapping[str, Any]], config: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """(value, label) for the head of the page. last: the last row of metrics.jsonl."""
    facts = [(f"{last['step']:,}", "steps")]
    if "epoch" in last:
        facts.append((f"{last['epoch']:.4g}", "epochs"))
    if "examples" in last:
        facts.append((f"{last['examples']:,}", "examples"))
    if size := config.get("train", {}).get("batch_size"):
        facts.append((f"{size:,}", "batch"))
    if start := config.get("train", {}).get("extended_from"):
        facts.append((f"{start:,}", "extended at step"))
    if training:
        facts.append((short(training[-1]["loss"]), "last loss"))
        if "chance_loss" in training[-1]:
            facts.append((short(training[-1]["chance_loss"]), "loss at chance"))
        speeds = [row["images_per_second"] for row in training if "images_per_second" in row]
        if speeds:
            facts.append((short(float(np.median(speeds))), "images/s (median)"))
    return facts


def _scores(
    evaluations: Sequence[Mapping[str, Any]], evals: Mapping[str, Any], chance: Mapping[str, float]
) -> list[Score]:
    """The best and last value of every evaluation metric; metrics of detail are left out."""
    scores = []
    for name, points in charts.series(evaluations).items():
        kind = metric(name, evals)
        if not kind.detail:
            step, value = best(kind, points)
            last = spelled(kind, points[-1][1])
            at_chance = spelled(kind, chance[name]) if name in chance else ""
            scores.append(Score(name, spelled(kind, value), f"{step:,}", last, at_chance))
    return scores
