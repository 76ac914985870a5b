"""Pictures of an episode: where its rows lie on a map, and what some of its prototypes hold.

A run writes them where the labels of an episode are new, one JSON file an episode in the folder
`episodes` of its workdir; the report shows them. `sample` names the rows whose features are wanted,
a few thousand at most, however long the episode is.
"""

from __future__ import annotations

import base64
import io
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from clipx.data.loader import Loader
from clipx.errors import MetricsError
from clipx.training.checkpoint import read_json, write_json

FOLDER = "episodes"
COLOURED = 10  # the largest clusters of each labelling, which a map tells apart
_SPREAD, _MEMBERS = 1000, 1000  # rows that are on the map: any, and of coloured clusters
_PROTOTYPES, _NEAREST = 3, 8  # of each modality; pictures and captions of each
_SIDE = 128  # pixels of a picture, at most

Labels = Mapping[str, Int[np.ndarray, " m"]]
# pictures uint8 [h, w, 3] and captions of so many places in the episode
Load = Callable[[Sequence[int]], tuple[Sequence[np.ndarray], Sequence[str]]]


class Cluster(NamedTuple):
    """A cluster of a labelling and how many rows of the episode it has."""

    cluster: int
    rows: int


class Prototype(NamedTuple):
    """The rows nearest to the mean of a cluster of `modality`, nearest first."""

    modality: str
    cluster: int
    rows: int
    pictures: list[str]  # data URIs
    captions: list[str]


class Episode(NamedTuple):
    """What a file holds. The points of one row have one index in every list."""

    episode: int
    rows: int  # of the whole episode
    variance: list[float]  # the two axes' shares of that inside a modality
    points: dict[str, list[tuple[float, float]]]  # by modality
    colours: dict[str, list[int]]  # by labelling: a place in `clusters`, -1 for all others
    clusters: dict[str, list[Cluster]]  # by labelling, the largest first
    prototypes: list[Prototype]


def sample(labels: Labels) -> Int[np.ndarray, " s"]:
    """The places in the episode that are looked at, ascending: 2,000, or all of a shorter episode.
    About half are any, as many as that are of the clusters that are coloured, alike of each.

    `labels`: the cluster of every row of the episode, by labelling: "image", "text", "external".
    The same labels give the same rows, on any process.
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
    """The path of the file of an episode, written whole or not at all. One process calls it.

    rows: what `sample` says of `labels`. features: by modality, "image" and "text", of these rows
    alone. A modality whose name is a labelling's has prototypes. Raises `MetricsError` if the file
    cannot be written.
    """
    labels = {name: np.asarray(of_rows) for name, of_rows in labels.items()}
    features = {name: _finite(x) for name, x in features.items()}
    clusters = {name: _largest(of_rows) for name, of_rows in labels.items()}
    points, variance = _flat(features)
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
    """What `write` wrote, by episode."""
    return sorted((workdir / FOLDER).glob("[0-9]*.json"))


def read(path: pathlib.Path) -> Episode:
    """What `write` wrote of one episode. Raises `ValueError` for a file that is not its own."""
    value = read_json(path)
    try:
        return Episode(
            **value
            | {
                "clusters": {k: [Cluster(*c) for c in v] for k, v in value["clusters"].items()},
                "prototypes": [Prototype(**p) for p in value["prototypes"]],
            }
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"not the file of an episode: {error}") from None


def loading(loader: Loader, step: int) -> Load:
    """What loads the pictures and captions of an episode that starts at `step`: the first views of
    both, as `loader` crops and chooses them."""
    episode_steps = loader.schedule.sampling.episode_steps

    def load(places: Sequence[int]) -> tuple[list[np.ndarray], list[str]]:
        pieces = [
            loader.load(step + place % episode_steps, np.array([place // episode_steps]))
            for place in places
        ]
        captions = [loader.tokenizer.decode(piece["text"][0, 0]) for piece in pieces]
        return [piece["image"][0, 0] for piece in pieces], captions

    return load


def thumbnail(pixels: UInt8[np.ndarray, "h w 3"]) -> str:
    """A data URI of at most 128 pixels a side."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((_SIDE, _SIDE))
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(encoded.getvalue()).decode()


def _finite(features: Float[np.ndarray, "s d"]) -> Float[np.ndarray, "s d"]:
    return np.nan_to_num(features.astype(np.float64), posinf=0.0, neginf=0.0)


def _largest(labels: Int[np.ndarray, " m"]) -> list[Cluster]:
    counts = np.bincount(labels)
    order = np.argsort(-counts, kind="stable")[:COLOURED]
    return [Cluster(int(cluster), int(counts[cluster])) for cluster in order if counts[cluster]]


def _places(labels: Int[np.ndarray, " s"], clusters: Sequence[Cluster]) -> list[int]:
    place = {cluster.cluster: i for i, cluster in enumerate(clusters)}
    return [place.get(label, -1) for label in labels.tolist()]


def _flat(
    features: Mapping[str, Float[np.ndarray, "s d"]],
) -> tuple[dict[str, Float[np.ndarray, "s 2"]], Float[np.ndarray, " 2"]]:
    """All features on two axes, by modality, and these axes' shares of the variance: the principal
    axes of what a modality's rows differ in, as the gap between modalities would else be one."""
    means = {name: x.mean(0) for name, x in features.items()}
    within = np.concatenate([x - means[name] for name, x in features.items()])
    variance, axes = np.linalg.eigh(within.T @ within)
    shares = variance[:-3:-1] / max(variance.sum(), 1e-12)
    axes = axes[:, :-3:-1]
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), [0, 1]])  # an axis has no sign of its own
    origin = np.mean(list(means.values()), axis=0)
    return {name: (x - origin) @ axes for name, x in features.items()}, shares


def _prototypes(rows, features, labels: Labels, clusters, load: Load) -> list[Prototype]:
    """Those of the largest clusters of each modality; one call loads all their pictures."""
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
        prototypes.append(Prototype(name, *cluster, uris, texts))
    return prototypes
