"""An order of rows in which neighbours are alike: what a row's hard negative stands next to."""

from __future__ import annotations

import threading

import numpy as np
from jaxtyping import Int, Int32


def paired(clusters: Int[np.ndarray, " n"], rng: np.random.Generator) -> Int32[np.ndarray, " n"]:
    """A permutation of the rows in which places 2i and 2i + 1 share a cluster, but for the rows
    that clusters of odd size leave over, of which every two are a pair as well. Which rows are a
    pair, and where it stands, is as chance has it."""
    rows = rng.permutation(len(clusters)).astype(np.int32)
    rows = rows[np.argsort(clusters[rows], kind="stable")]
    sizes = np.unique(clusters, return_counts=True)[1]
    left = np.cumsum(sizes)[sizes % 2 == 1] - 1
    rows = np.concatenate([np.delete(rows, left), rng.permutation(rows[left])])
    pairs = rows[: len(rows) // 2 * 2].reshape(-1, 2)
    return np.concatenate([rng.permutation(pairs).ravel(), rows[2 * len(pairs) :]])


class Pairs:
    """The row at (epoch, position), a `paired` permutation each epoch: a pure function of the seed.

    An epoch's permutation is made when its first row is asked for, and that of two epochs is kept,
    as batches are loaded ahead of their turn.
    """

    def __init__(self, clusters: Int[np.ndarray, " n"], seed: int):
        self._clusters, self._seed = clusters, seed
        self._epochs: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()  # made once, however many threads wait for it

    def __reduce__(self):
        return Pairs, (self._clusters, self._seed)

    def __call__(self, epoch: int, position: int) -> int:
        with self._lock:
            if epoch not in self._epochs:
                draws = np.random.Philox(key=[self._seed, 2], counter=[0, 0, 0, epoch])
                rows = paired(self._clusters, np.random.Generator(draws))
                latest = sorted(self._epochs)[-1:]
                self._epochs = {e: self._epochs[e] for e in latest} | {epoch: rows}
            return int(self._epochs[epoch][position])
