"""An order of rows in which neighbours are similar, so that each is the other's hard negative."""

from __future__ import annotations

import threading

import numpy as np
from jaxtyping import Int, Int32


def paired(clusters: Int[np.ndarray, " n"], rng: np.random.Generator) -> Int32[np.ndarray, " n"]:
    """A random permutation of the rows in which places 2i and 2i + 1 hold rows of one cluster.

    A cluster of odd size has one row left over. These rows are paired with each other.
    """
    rows = rng.permutation(len(clusters)).astype(np.int32)
    rows = rows[np.argsort(clusters[rows], kind="stable")]
    sizes = np.unique(clusters, return_counts=True)[1]
    leftover = np.cumsum(sizes)[sizes % 2 == 1] - 1
    rows = np.concatenate([np.delete(rows, leftover), rng.permutation(rows[leftover])])
    pairs = rows[: len(rows) // 2 * 2].reshape(-1, 2)
    return np.concatenate([rng.permutation(pairs).ravel(), rows[2 * len(pairs) :]])


class Pairs:
    """A function (epoch, position) -> row, with one `paired` permutation per epoch and seed.

    The permutation of an epoch is computed at its first use. Two epochs are kept, because batches
    of the next epoch are loaded ahead of time.
    """

    def __init__(self, clusters: Int[np.ndarray, " n"], seed: int):
        self._clusters, self._seed = clusters, seed
        self._epochs: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()  # threads that need the same epoch compute it once

    def __reduce__(self):
        return Pairs, (self._clusters, self._seed)

    def __call__(self, epoch: int, position: int) -> int:
        with self._lock:
            if epoch not in self._epochs:
                bits = np.random.Philox(key=[self._seed, 2], counter=[0, 0, 0, epoch])
                rows = paired(self._clusters, np.random.Generator(bits))
                latest = sorted(self._epochs)[-1:]
                self._epochs = {e: self._epochs[e] for e in latest} | {epoch: rows}
            return int(self._epochs[epoch][position])
