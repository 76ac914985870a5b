"""Which rows a run trains on and where each stands: a pure function of (seed, step, position)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Int, Int32

from clipx.data.base import Example, Source
from clipx.data.pairs import Pairs

_ROW = 3  # the stream of draws of rows; 0 to 2 are a row's picture and texts, 4 is the survey's


def order(
    rows: int, seed: int, clusters: Int32[np.ndarray, " rows"] | None = None
) -> Callable[[int, int], int]:
    """A function (epoch, position) -> row. Each epoch is a permutation of its own of all rows.

    Nothing is stored: any place is found in constant time. With `clusters`, positions 2i and 2i + 1
    hold rows of one cluster, as `pairs.paired` describes; that takes eight bytes a row.
    """
    if clusters is not None:
        return Pairs(np.asarray(clusters, np.int32), seed)
    import grain  # here, because it imports JAX where it can

    # Hashed: grain shuffles epoch e with seed + e, which makes neighbouring seeds share epochs
    (hashed,) = np.random.SeedSequence(seed).generate_state(1)
    shuffled = grain.MapDataset.range(rows).shuffle(seed=int(hashed))
    shuffled[0]  # sets up grain's own statistics, before threads do
    return functools.partial(_at, shuffled, rows)


def _at(shuffled, rows: int, epoch: int, position: int) -> int:
    return shuffled[epoch * rows + position]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How rows are drawn. The default: epochs, each a shuffle of all rows."""

    episode_steps: int | None = None  # positions count within an episode, not within an epoch
    with_replacement: bool = False  # every row of a batch is drawn on its own
    clusters: Int32[np.ndarray, " rows"] | None = None  # one for each row: see `order`


EPOCHS = Sampling()


class Schedule:
    """The row at each position of each step's global batch, and the random draws of that place.

    An epoch is rows // batch_size steps. The rows that its order puts last wait for another epoch.
    """

    def __init__(self, rows: int, batch_size: int, seed: int, sampling: Sampling):
        self.rows, self.batch_size, self.seed, self.sampling = rows, batch_size, seed, sampling
        self._order = order(rows, seed, sampling.clusters)

    @property
    def steps_per_epoch(self) -> int:
        return self.rows // self.batch_size

    def row(self, step: int, position: int, skip: int = 0) -> int:
        """The row at a place, or the one that replaces it after `skip` rows that cannot be used."""
        if self.sampling.with_replacement:
            drawn = int(self.rng(step, position, _ROW).integers(self.rows))
            return (drawn + skip) % self.rows
        epoch, place = self._place(step, position)
        return self._order(epoch, (place + skip) % self.rows)

    def place(self, step: int, position: int) -> int:
        """The place in the epoch; in the episode, where there are episodes."""
        if episode := self.sampling.episode_steps:
            return position * episode + step % episode
        return self._place(step, position)[1]

    def rng(self, step: int, position: int, stream: int = 0) -> np.random.Generator:
        """A generator for one place in one step. Each `stream` is independent of the others."""
        return np.random.Generator(
            np.random.Philox(key=[self.seed, 0], counter=[0, stream, step, position])
        )

    def _place(self, step: int, position: int) -> tuple[int, int]:
        """The epoch, and the place in it."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        return epoch, step_of_epoch * self.batch_size + position


def share(source: Source, fraction: float) -> Source:
    """`source` itself, or a fixed random share of its rows."""
    return source if fraction == 1 else Share(source, fraction)


def chosen(rows: int, fraction: float) -> Int[np.ndarray, " n"]:
    """The rows of a set of `rows` that `Share` keeps, in its order."""
    return np.random.default_rng(0).permutation(rows)[: int(rows * fraction)]


class Share:
    """A source of floor(rows * fraction) rows of another, chosen by a shuffle that is always the
    same. Each example keeps the row id that it has there. No subclass of `Source`: no config asks
    for it by name."""

    def __init__(self, source: Source, fraction: float):
        self._source, self._rows = source, chosen(len(source), fraction)
        self.classes = source.classes

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Example:
        return self._source[int(self._rows[row])]

    def keys(self) -> Iterator[str]:
        keys = list(self._source.keys())
        return (keys[row] for row in self._rows)
