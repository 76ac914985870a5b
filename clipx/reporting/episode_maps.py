"""Episodes as the report shows them: maps of their rows, and what their prototypes hold."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from clipx.errors import RunError
from clipx.reporting.charts import COLOURS, Figure, svg
from clipx.training import episodes
from clipx.training.episodes import Episode

_EPISODES = 9  # on the page: all of a long run's would make it too large
_CLUSTERS = (*COLOURS[:-1], "#d56fb2", "#83a02f", "#93684a")  # the largest first
_REST = COLOURS[-1]  # all smaller clusters
_MARKS = {"image": ("o", 9), "text": ("^", 13)}  # of the points of a modality, and their area
_PLURALS = {"image": "pictures", "text": "captions", "external": "the teacher's rows"}


class Prototype(NamedTuple):
    """The rows nearest to the mean of a cluster."""

    title: str
    colour: str  # of its cluster on the map
    nearest: Sequence[tuple[str, str]]  # (data URI of a picture, caption)


class Sheet(NamedTuple):
    """All that the page shows of one episode."""

    title: str
    maps: Sequence[Figure]
    prototypes: Sequence[Prototype]


def sheets(workdir: pathlib.Path) -> list[Sheet]:
    """Episodes that there are files of: the newest, then others, from all of the run. Raises
    `RunError` for a broken file."""
    paths = episodes.files(workdir)
    places = np.linspace(len(paths) - 1, 0, min(_EPISODES, len(paths))).round().astype(int)
    shown = []
    for path in (paths[place] for place in places):
        try:
            shown.append(sheet(episodes.read(path)))
        except ValueError as error:
            raise RunError(f"{path}: {error}") from None
    return shown


def sheet(episode: Episode) -> Sheet:
    """One episode, drawn. Its external labelling comes last."""
    labellings = sorted(episode.clusters, key=lambda name: (name == "external", name))
    return Sheet(
        title=f"Episode {episode.episode:,}, of {episode.rows:,} rows",
        maps=[clusters(episode, labelling) for labelling in labellings],
        prototypes=[_prototype(episode, prototype) for prototype in episode.prototypes],
    )


def clusters(episode: Episode, labelling: str) -> Figure:
    """The map of an episode's rows, pictures and captions, in the colours of the clusters that
    `labelling` has them in."""
    known, colours = episode.clusters[labelling], np.array(episode.colours[labelling])
    parts = [(-1, {"color": _REST, "alpha": 0.35})]
    parts += [(i, {"color": _CLUSTERS[i]}) for i in range(len(known))]

    def draw(axes) -> None:
        for place, look in parts:
            for modality, points in episode.points.items():
                marker, area = _MARKS.get(modality, ("s", 9))
                x, y = np.array(points)[colours == place].reshape(-1, 2).T
                size = area if place < 0 else 2 * area
                axes.scatter(x, y, size, marker=marker, linewidths=0, zorder=-1, **look)
        axes.set_rasterization_zorder(0)  # thousands of points become one picture
        axes.set_aspect("equal", adjustable="datalim")
        axes.tick_params(left=False, bottom=False, labelleft=False, labelbottom=False)
        first, second = episode.variance
        axes.set_xlabel(f"first axis, {first:.0%} of the variance inside a modality")
        axes.set_ylabel(f"second, {second:.0%}")

    title = f"Clusters of {_PLURALS.get(labelling, labelling)}"
    legend = [(_CLUSTERS[i], f"{c.cluster} ({c.rows:,})") for i, c in enumerate(known)]
    drawn = svg(f"{title} {episode.episode}", (5.4, 4.2), draw)
    return Figure(title, drawn, [*legend, (_REST, "all others")])


def _prototype(episode: Episode, prototype: episodes.Prototype) -> Prototype:
    modality = prototype.modality
    numbers = [cluster.cluster for cluster in episode.clusters[modality]]
    rows_of = _PLURALS.get(modality, modality)
    return Prototype(
        title=f"cluster {prototype.cluster} of {rows_of}, {prototype.rows:,} rows",
        colour=_CLUSTERS[numbers.index(prototype.cluster)],
        nearest=list(zip(prototype.pictures, prototype.captions)),
    )
