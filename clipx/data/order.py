"""Which row a run trains on at which place: a pure function of (seed, step, position)."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from jaxtyping import Int, Int32

from clipx.data.base import Account, Example, Guess, Source
from clipx.data.limits import Limits
from clipx.data.pairs import Pairs

if TYPE_CHECKING:
    from grain import MapDataset

_OPENING = threading.Lock()  # of any order: its first row may be asked for by several threads
_NONE = np.zeros(0, np.int64)
_ROW = 3  # random stream that selects rows; 0 to 2: a row's image and texts, 4: the survey's crops
_INSTEAD = 5  # and all after it: streams that select what stands in for a row that is left out


def order(
    rows: int, seed: int, clusters: Int32[np.ndarray, " rows"] | None = None
) -> Callable[[int, int], int]:
    """Returns a function (epoch, position) -> row. Each epoch is another permutation of all rows.

    The permutations are computed on demand in constant time and memory. With `clusters`, positions
    2i and 2i + 1 hold rows of the same cluster (see `pairs.paired`), which takes 8 bytes per row.
    """
    if clusters is not None:
        return Pairs(np.asarray(clusters, np.int32), seed)
    return _Shuffled(rows, seed)


class _Shuffled:
    """What `order` returns without clusters. Grain is imported for the first row."""

    def __init__(self, rows: int, seed: int):
        self._rows, self._seed = rows, seed
        self._shuffled: MapDataset[int] | None = None

    def __call__(self, epoch: int, position: int) -> int:
        if self._shuffled is None:
            with _OPENING:
                if self._shuffled is None:
                    self._shuffled = self._open()
        row = self._shuffled[epoch * self._rows + position]
        assert row is not None  # grain's type allows for filtered rows
        return row

    def _open(self) -> MapDataset[int]:
        import grain  # not at the top: grain imports JAX if it is installed

        # grain shuffles epoch e with seed + e; hashing keeps neighbouring seeds from sharing epochs
        (hashed,) = np.random.SeedSequence(self._seed).generate_state(1)
        shuffled = grain.MapDataset.range(self._rows).shuffle(seed=int(hashed))
        shuffled[0]  # sets up grain's statistics before several threads could
        return shuffled


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How rows are sampled. The default is epochs, each a shuffle of all rows."""

    episode_steps: int | None = None  # steps per episode: places count within an episode then
    with_replacement: bool = False  # sample every row of a batch independently
    clusters: Int32[np.ndarray, " rows"] | None = None  # the cluster of each row: see `order`
    left_out: frozenset[int] = frozenset()  # rows that are never sampled


EPOCHS = Sampling()


class Schedule:
    """The row and the random generators for each position of each step's global batch.

    An epoch has rows // batch_size steps. The last rows % batch_size rows of an epoch's order are
    left out of that epoch.
    """

    def __init__(self, rows: int, batch_size: int, seed: int, sampling: Sampling):
        self.rows, self.batch_size, self.seed, self.sampling = rows, batch_size, seed, sampling
        self._order = order(rows, seed, sampling.clusters)

    @property
    def steps_per_epoch(self) -> int:
        return self.rows // self.batch_size

    def row(self, step: int, position: int, skip: int = 0) -> int:
        """The row at a position, or its replacement after `skip` bad rows. A row that is left out
        is replaced by a random one: its neighbours in the order may be left out too."""
        row = self._row(step, position, skip)
        if row in self.sampling.left_out:
            draws = self.rng(step, position, _INSTEAD + skip)
            while row in self.sampling.left_out:
                row = int(draws.integers(self.rows))
        return row

    def _row(self, step: int, position: int, skip: int) -> int:
        if self.sampling.with_replacement:
            sampled = int(self.rng(step, position, _ROW).integers(self.rows))
            return (sampled + skip) % self.rows
        epoch, place = self._place(step, position)
        return self._order(epoch, (place + skip) % self.rows)

    def place(self, step: int, position: int) -> int:
        """The place in the episode if `sampling` has episodes, else the place in the epoch."""
        if episode_steps := self.sampling.episode_steps:
            return position * episode_steps + step % episode_steps
        return self._place(step, position)[1]

    def rng(self, step: int, position: int, stream: int = 0) -> np.random.Generator:
        """The generator of one position in one step. Streams are independent of each other."""
        return np.random.Generator(
            np.random.Philox(key=[self.seed, 0], counter=[0, stream, step, position])
        )

    def _place(self, step: int, position: int) -> tuple[int, int]:
        """Returns (epoch, place in the epoch)."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        return epoch, step_of_epoch * self.batch_size + position


def spread(rows: int, most: int) -> Int[np.ndarray, " n"]:
    """At most `most` of `rows` rows, spread evenly over them, the first and the last among them."""
    return np.unique(np.linspace(0, rows - 1, most).round().astype(np.int64)) if rows else _NONE


def chosen(rows: int, fraction: float) -> Int[np.ndarray, " n"]:
    """The rows that `Share` keeps out of `rows`, in its order."""
    return np.random.default_rng(0).permutation(rows)[: int(rows * fraction)]


class Subset:
    """Some rows of another source, in the order given.

    Examples keep their row ids. Not a subclass of `Source`, because no config selects it by name.
    """

    alike: ClassVar[bool] = False

    def __init__(
        self, source: Source, rows: Int[np.ndarray, " n"], guesses: tuple[Guess, ...] = ()
    ):
        """guesses: what was guessed to choose the rows."""
        self._source, self._rows, self._guesses = source, rows, guesses
        self.classes, self.limits = source.classes, source.limits

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Example:
        return self._source[int(self._rows[row])]

    def glance(self, row: int) -> Example:
        return self._source.glance(int(self._rows[row]))

    def keys(self) -> Iterator[str]:
        keys = list(self._source.keys())
        return (keys[row] for row in self._rows)

    def limit(self, limits: Limits) -> None:
        self._source.limit(limits)
        self.limits = limits

    def account(self) -> Account | None:
        return self._source.account()

    def guesses(self) -> tuple[Guess, ...]:
        return (*self._source.guesses(), *self._guesses)
