"""What the report shows of an episode: a map of its rows, and examples of its prototypes.

A run writes one JSON file for each episode, in the folder `episodes` of its workdir, right after it
has computed the episode's labels. `sample` chooses the rows whose features are needed: at most
2,000, however long the episode is.
"""

from __future__ import annotations

import base64
import io
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from clipx.config import reading
from clipx.data.loader import Loader
from clipx.errors import MetricsError
from clipx.training.workdir import write_json

FOLDER = "episodes"
COLOURED = 10  # the map colours this many of the largest clusters of each labelling
_SPREAD, _MEMBERS = 1000, 1000  # rows on the map: from anywhere, and of coloured clusters
_PROTOTYPES, _NEAREST = 3, 8  # prototypes of each modality, and pictures and captions of each
_SIDE = 128  # longest side of a stored picture in pixels

# the cluster of every row of the episode, by labelling: "image", "text", "external"
Labels = Mapping[str, Int[np.ndarray, " m"]]
# places in the episode -> the pictures, uint8 [h, w, 3], and the captions there
Load = Callable[[Sequence[int]], tuple[Sequence[np.ndarray], Sequence[str]]]


class Cluster(NamedTuple):
    """A cluster of a labelling, and the number of rows of the episode in it."""

    cluster: int
    rows: int


class Prototype(NamedTuple):
    """A cluster of `modality`, shown by the rows nearest to its mean, nearest first."""

    modality: str
    cluster: int
    rows: int  # in the cluster
    pictures: list[str]  # data URIs
    captions: list[str]


class Episode(NamedTuple):
    """The contents of an episode's file. A sampled row has the same index in every list of `points`
    and `colours`."""

    episode: int
    rows: int  # of the complete episode
    variance: list[float]  # each axis's share of the variance within the modalities
    points: dict[str, list[tuple[float, float]]]  # by modality: the rows on the map
    colours: dict[str, list[int]]  # by labelling: the index in `clusters`, -1 for other clusters
    clusters: dict[str, list[Cluster]]  # by labelling, the largest first
    prototypes: list[Prototype]


def sample(labels: Labels) -> Int[np.ndarray, " s"]:
    """The places in the episode to look at, ascending: 2,000, or all of a shorter episode.

    About half of them are random rows. The other half are rows of the coloured clusters, equally
    many of each. The same labels give the same places on every process.
    """
    (count,) = {len(of_rows) for of_rows in labels.values()}
    shuffled = np.random.default_rng(0).permutation(count)
    each = _MEMBERS // (COLOURED * len(labels))
    wanted = [
        shuffled[of_rows[shuffled] == cluster][:each]
        for of_rows in map(np.asarray, labels.values())
        for cluster, _ in _largest(of_rows)
    ]
    wanted = np.concatenate([*wanted, shuffled])
    first = np.sort(np.unique(wanted, return_index=True)[1])
    return np.sort(wanted[first[: _SPREAD + _MEMBERS]])


def write(
    workdir: pathlib.Path,
    episode: int,
    *,
    rows: Int[np.ndarray, " s"],
    features: Mapping[str, Float[np.ndarray, "s d"]],
    labels: Labels,
    load: Load,
) -> pathlib.Path:
    """Writes an episode's file, atomically, and returns its path. Only one process may call it.

    rows: the result of `sample(labels)`. features: of these rows, by modality, "image" and "text".
    A modality whose name is also a labelling gets prototypes. Raises `MetricsError` if the file
    cannot be written.
    """
    labels = {name: np.asarray(of_rows) for name, of_rows in labels.items()}
    features = {name: _finite(x) for name, x in features.items()}
    clusters = {name: _largest(of_rows) for name, of_rows in labels.items()}
    points, variance = _map(features)
    value = Episode(
        episode=episode,
        rows=len(next(iter(labels.values()))),
        variance=variance.round(4).tolist(),
        points={name: xy.round(4).tolist() for name, xy in points.items()},
        colours={name: _places(labels[name][rows], clusters[name]) for name in labels},
        clusters=clusters,
        prototypes=_prototypes(rows, features, labels, clusters, load),
    )
    path = workdir / FOLDER / f"{episode:06d}.json"
    plain = value._asdict() | {"prototypes": [p._asdict() for p in value.prototypes]}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, plain)
    except OSError as error:
        raise MetricsError(f"cannot write {path}: {error.strerror}") from None
    return path


def files(workdir: pathlib.Path) -> list[pathlib.Path]:
    """The files that `write` wrote, by episode."""
    return sorted((workdir / FOLDER).glob("[0-9]*.json"))


def read(path: pathlib.Path) -> Episode:
    """An episode from the file that `write` wrote. Raises `ValueError` for any other file."""
    try:
        value = reading.read_json(path, dict[str, Any])
        return Episode(
            **value
            | {
                "clusters": {k: [Cluster(*c) for c in v] for k, v in value["clusters"].items()},
                "prototypes": [Prototype(**p) for p in value["prototypes"]],
            }
        )
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"not the file of an episode: {error}") from None


def loading(loader: Loader, step: int) -> Load:
    """A function that loads pictures and captions of the episode that starts at `step`: the first
    view and the first text of a row, as `loader` crops and chooses them."""
    episode_steps = loader.schedule.sampling.episode_steps
    assert episode_steps is not None  # callers ask only about objectives with episodes

    def load(places: Sequence[int]) -> tuple[list[np.ndarray], list[str]]:
        pieces = [
            loader.load(step + place % episode_steps, np.array([place // episode_steps]))
            for place in places
        ]
        captions = [loader.tokenizer.decode(piece["text"][0, 0]) for piece in pieces]
        return [piece["image"][0, 0] for piece in pieces], captions

    return load


def thumbnail(pixels: UInt8[np.ndarray, "h w 3"], side: int = _SIDE) -> str:
    """The picture as a JPEG data URI, scaled down to at most `side` pixels a side."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((side, side))
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(encoded.getvalue()).decode()


def _finite(features: Float[np.ndarray, "s d"]) -> Float[np.ndarray, "s d"]:
    """`features` in float64, with 0 for NaN and infinities."""
    return np.nan_to_num(features.astype(np.float64), posinf=0.0, neginf=0.0)


def _largest(labels: Int[np.ndarray, " m"]) -> list[Cluster]:
    """The `COLOURED` largest clusters, without empty ones, the largest first."""
    counts = np.bincount(labels)
    order = np.argsort(-counts, kind="stable")[:COLOURED]
    return [Cluster(int(cluster), int(counts[cluster])) for cluster in order if counts[cluster]]


def _places(labels: Int[np.ndarray, " s"], clusters: Sequence[Cluster]) -> list[int]:
    """The index in `clusters` of each label, -1 for labels that are not there."""
    place = {cluster.cluster: i for i, cluster in enumerate(clusters)}
    return [place.get(label, -1) for label in labels.tolist()]


def _map(
    features: Mapping[str, Float[np.ndarray, "s d"]],
) -> tuple[dict[str, Float[np.ndarray, "s 2"]], Float[np.ndarray, " 2"]]:
    """The features projected to two axes, by modality, and each axis's share of the variance.

    The axes are the principal axes of the variance within the modalities. Otherwise the gap between
    the modalities would be one of them.
    """
    means = {name: x.mean(0) for name, x in features.items()}
    within = np.concatenate([x - means[name] for name, x in features.items()])
    variance, axes = np.linalg.eigh(within.T @ within)
    shares = variance[:-3:-1] / max(variance.sum(), 1e-12)
    axes = axes[:, :-3:-1]
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), [0, 1]])  # eigenvectors have no fixed sign
    origin = np.mean(list(means.values()), axis=0)
    return {name: (x - origin) @ axes for name, x in features.items()}, shares


def _prototypes(
    rows: Int[np.ndarray, " s"],
    features: Mapping[str, Float[np.ndarray, "s d"]],
    labels: Labels,
    clusters: Mapping[str, Sequence[Cluster]],
    load: Load,
) -> list[Prototype]:
    """Prototypes of the largest clusters of each modality. `load` is called once, for all."""

    chosen = []
    for name in (name for name in features if name in labels):
        for cluster in clusters[name][:_PROTOTYPES]:
            members = np.flatnonzero(labels[name][rows] == cluster.cluster)
            x = features[name][members]
            near = np.argsort(np.linalg.norm(x - x.mean(0), axis=1), kind="stable")[:_NEAREST]
            chosen.append((name, cluster, rows[members[near]].tolist()))
    pictures, captions = load([place for *_, places in chosen for place in places])
    shown = iter(zip(map(thumbnail, pictures), captions, strict=True))
    prototypes = []
    for name, cluster, places in chosen:
        pairs = [next(shown) for _ in places]
        uris, texts = map(list, zip(*pairs))
        prototypes.append(Prototype(name, cluster.cluster, cluster.rows, uris, texts))
    return prototypes
