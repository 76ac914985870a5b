"""Sheets of the report: pictures and captions side by side, as HTML."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from clipx.reporting import charts
from clipx.reporting.charts import short
from clipx.training.episodes import Cluster, Episode, Prototype

_QUERIES, _FOUND = 8, 5
_MATRIX = 20  # pictures in the matrix: more would be too small to see


class Samples(NamedTuple):
    """What a model says of held-out pairs. Captions may be several a picture."""

    pictures: UInt8[np.ndarray, "n h w 3"]
    captions: Sequence[str]
    similarity: Float[np.ndarray, "n t"]
    owner: Int[np.ndarray, " t"]  # the picture that each caption belongs to


def section(title: str, content: str, note: str = "") -> str:
    """A part of the page; nothing without content."""
    if not content:
        return ""
    note = f'<p class="note">{note}</p>' if note else ""
    return f"<section><h2>{html.escape(title)}</h2>{note}{content}</section>\n"


def grid(figures: Sequence[str]) -> str:
    """Figures side by side."""
    return f'<div class="grid">{"".join(figures)}</div>' if figures else ""


def matrix(samples: Samples, uris: Sequence[str]) -> str:
    """How similar each caption is to each picture. `uris`: the pictures as data URIs."""
    captions = _first_captions(samples)[:_MATRIX]
    pictures = samples.owner[captions]
    scores = np.asarray(samples.similarity, np.float64)[np.ix_(pictures, captions)].T
    finite = scores[np.isfinite(scores)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    shade = np.nan_to_num((scores - low) / max(high - low, 1e-12))
    right = sum(int(np.argmax(row) == i) for i, row in enumerate(shade))
    head = "".join(f'<th><img src="{uris[p]}" alt="picture {p}"></th>' for p in pictures)
    lines = []
    for i, caption in enumerate(captions):
        text = html.escape(samples.captions[caption])
        cells = "".join(
            f'<td{" class=own" if i == j else ""} style="--s:{shade[i, j]:.3f}" '
            f'title="{text} | picture {pictures[j]}: {scores[i, j]:.4g}"></td>'
            for j in range(len(captions))
        )
        lines.append(f'<tr><th scope=row title="{text}"><span>{text}</span></th>{cells}</tr>')
    note = (
        f"A caption a row, a picture a column; the pairs that belong together are outlined. "
        f"{right} of {len(captions)} captions score their own picture highest here. "
        f'<span class="scale">{short(low)}<i></i>{short(high)}</span>'
    )
    table = f'<table class="matrix"><tr><td></td>{head}</tr>{"".join(lines)}</table>'
    return section("Similarity of a held-out batch", f'<div class="scroll">{table}</div>', note)


def queries(samples: Samples, uris: Sequence[str]) -> str:
    """What some captions find."""
    distinct = _first_captions(samples, distinct=True)
    places = np.linspace(0, len(distinct) - 1, min(_QUERIES, len(distinct))).round().astype(int)
    cards = []
    for caption in (distinct[place] for place in places):
        text = samples.captions[caption]
        # Another picture with the very same caption is as right as the caption's own.
        same = [i for i, other in enumerate(samples.captions) if other == text]
        right = {int(samples.owner[i]) for i in same}
        score = np.nan_to_num(samples.similarity[:, caption].astype(np.float64), nan=-np.inf)
        order = np.argsort(-score, kind="stable")
        found = "".join(
            f'<li class="{"right" if int(p) in right else ""}"><img src="{uris[p]}" '
            f'alt="picture {p}"><span>{"✓ " if int(p) in right else ""}{short(score[p])}</span>'
            "</li>"
            for p in order[:_FOUND]
        )
        rank = 1 + next(i for i, p in enumerate(order) if int(p) in right)
        cards.append(
            f"<article><h3>“{html.escape(text)}”</h3><ol>{found}</ol>"
            f'<p class="note">right picture at rank {rank} of {len(order)}</p></article>'
        )
    note = f"The {_FOUND} pictures, of {len(uris)}, that score highest; the right one is outlined."
    return section("Queries", f'<div class="queries">{"".join(cards)}</div>', note)


def _first_captions(samples: Samples, distinct: bool = False) -> list[int]:
    """The first caption of each picture, in the order of the pictures."""
    first: dict[int, int] = {}
    for caption, picture in enumerate(samples.owner):
        first.setdefault(int(picture), caption)
    chosen = [first[picture] for picture in sorted(first)]
    if distinct:
        chosen = list({samples.captions[c]: c for c in reversed(chosen)}.values())[::-1]
    return chosen


def episodes(shown: Sequence[Episode], curves: Sequence[str]) -> str:
    """Maps and prototypes of episodes, the newest first and all others folded; before them
    `curves`, figures of what all episodes have."""
    content = grid(curves)
    for i, episode in enumerate(shown):
        name = f"Episode {episode.episode:,}, of {episode.rows:,} rows"
        if i == 0:
            content += f"<h3>{name}</h3>{_episode(episode)}"
        else:
            content += f"<details><summary>{name}</summary>{_episode(episode)}</details>"
    note = (
        "Some rows of an episode on the two principal axes of what pictures, and captions, differ "
        "in among themselves: a dot is a picture, a triangle a caption. Both have the colour of "
        "the cluster that their row is in; a cluster's rows are counted in brackets. Below, the "
        "rows nearest to the means of the largest clusters."
    )
    return section("Episodes", content, note if shown else "")


def _episode(episode: Episode) -> str:
    labellings = sorted(episode.clusters, key=lambda name: (name == "external", name))
    maps = "".join(charts.clusters(episode, labelling) for labelling in labellings)
    cards = "".join(_prototype(p, episode.clusters[p.modality]) for p in episode.prototypes)
    return f'<div class="maps">{maps}</div><div class="prototypes">{cards}</div>'


def _prototype(prototype: Prototype, clusters: Sequence[Cluster]) -> str:
    place = [cluster.cluster for cluster in clusters].index(prototype.cluster)
    nearest = "".join(
        f'<li title="{html.escape(caption)}"><img src="{uri}" alt="picture">'
        f"<span>{html.escape(caption)}</span></li>"
        for uri, caption in zip(prototype.pictures, prototype.captions)
    )
    return (
        f'<article><h3><i style="background:{charts.CLUSTERS[place]}"></i>cluster '
        f"{prototype.cluster} of {charts.plural(prototype.modality)}, {prototype.rows:,} rows</h3>"
        f"<ol>{nearest}</ol></article>"
    )
