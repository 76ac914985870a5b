"""Episodes in the report: maps of their rows, and the rows nearest to their prototypes."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from clipx.errors import RunError
from clipx.reporting.charts import COLOURS, Figure, svg
from clipx.training import episodes
from clipx.training.episodes import Episode

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_EPISODES = 9  # at most on the page: all of a long run's would make it too large
_CLUSTERS = (*COLOURS[:-1], "#d56fb2", "#83a02f", "#93684a")  # colours, the largest cluster first
_REST = COLOURS[-1]  # colour of all smaller clusters
_MARKS = {"image": ("o", 9), "text": ("^", 13)}  # marker and its area in a map, by modality
_PLURALS = {"image": "pictures", "text": "captions", "external": "the teacher's rows"}


class Prototype(NamedTuple):
    """The rows nearest to the mean of a cluster."""

    title: str
    colour: str  # of its cluster on the map
    nearest: Sequence[tuple[str, str]]  # (data URI of a picture, caption)


class Sheet(NamedTuple):
    """The maps and prototypes of one episode."""

    title: str
    maps: Sequence[Figure]
    prototypes: Sequence[Prototype]


def sheets(workdir: pathlib.Path) -> list[Sheet]:
    """At most nine of the workdir's episodes, spread evenly over the run, the newest first. Raises
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
    """The maps and prototypes of one episode. The map of an external teacher's clusters comes
    last."""
    labellings = sorted(episode.clusters, key=lambda name: (name == "external", name))
    return Sheet(
        title=f"Episode {episode.episode:,}, of {episode.rows:,} rows",
        maps=[clusters(episode, labelling) for labelling in labellings],
        prototypes=[_prototype(episode, prototype) for prototype in episode.prototypes],
    )


def clusters(episode: Episode, labelling: str) -> Figure:
    """The map of an episode's rows, pictures and captions, coloured by the clusters of
    `labelling`."""
    known, colours = episode.clusters[labelling], np.array(episode.colours[labelling])
    parts = [(-1, {"color": _REST, "alpha": 0.35})]
    parts += [(i, {"color": _CLUSTERS[i]}) for i in range(len(known))]

    def draw(axes: Axes) -> None:
        for place, look in parts:
            for modality, points in episode.points.items():
                marker, area = _MARKS.get(modality, ("s", 9))
                x, y = np.array(points)[colours == place].reshape(-1, 2).T
                size = area if place < 0 else 2 * area
                axes.scatter(x, y, size, marker=marker, linewidths=0, zorder=-1, **look)
        axes.set_rasterization_zorder(0)  # thousands of points become one bitmap
        axes.set_aspect("equal", adjustable="datalim")
        axes.tick_params(left=False, bottom=False, labelleft=False, labelbottom=False)
        first, second = episode.variance
        axes.set_xlabel(f"first axis: {first:.0%} of the variance inside a modality")
        axes.set_ylabel(f"second axis: {second:.0%}")

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
