"""Weighted k-nearest-neighbour classification on frozen features (Wu et al. 2018)."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from clipx.errors import ConfigError
from clipx.evaluators.base import (
    ACCURACIES,
    Encode,
    Evaluator,
    Examples,
    accuracies,
    rows_of,
    split_labels,
    unit,
)

TILE = 8192  # training rows that are compared at once


@dataclasses.dataclass(frozen=True)
class Knn(Evaluator):
    """Accuracies between 0 and 1 for every k of `neighbours`, `k20/top1`, `k20/top5` (with more
    than five classes) and `k20/mean_per_class`. A class with as many votes as the right one counts
    as before it.

    As DINO's eval_knn.py (arXiv:2104.14294, appendix F.1; after Wu et al. 2018, arXiv:1805.01978):
    `backbone` features of centre crops divided by their length; each of the k training pictures
    with the greatest cosine c votes for its class with exp(c / temperature). Of equal cosines the
    earlier row is nearer.
    """

    metrics = {
        f"k*/{name}": dataclasses.replace(metric, benchmark="")
        for name, metric in ACCURACIES.items()
    }

    examples: Examples
    train_examples: Examples
    neighbours: tuple[int, ...] = (20, 200)
    temperature: float = 0.07
    batch_size: int = 256  # of encoding, and test pictures that are compared at once

    def __post_init__(self):
        if self.batch_size < 1:
            raise ConfigError("knn.batch_size", str(self.batch_size), "at least 1")
        if min(self.neighbours, default=0) < 1:
            raise ConfigError("knn.neighbours", str(self.neighbours), "counts of at least 1")
        if not self.temperature > 0:
            raise ConfigError("knn.temperature", str(self.temperature), "more than 0")
        if self.train_examples is not None and max(self.neighbours) > len(self.train_examples):
            raise ConfigError(
                "knn.neighbours",
                f"{max(self.neighbours)} of {len(self.train_examples)} training examples",
                "at most as many as there are",
            )

    def __call__(self, encode: Encode) -> dict[str, float]:
        train, test = split_labels(self.train_examples, self.examples, "knn")
        bank, queries = (
            unit(rows_of(encode.image, examples.batches(self.batch_size), "backbone"))
            for examples in (self.train_examples, self.examples)
        )
        cosines, rows = nearest(queries, bank, max(self.neighbours), self.batch_size)
        weights, labels = np.exp(cosines.astype(np.float64) / self.temperature), train[rows]
        found = {}
        for k in self.neighbours:
            votes = np.zeros((len(test), int(max(train.max(), test.max())) + 1))
            np.add.at(votes, (np.arange(len(test))[:, None], labels[:, :k]), weights[:, :k])
            found |= {f"k{k}/{name}": value for name, value in accuracies(votes, test).items()}
        return found


def nearest(
    queries: Float[np.ndarray, "q c"], bank: Float[np.ndarray, "n c"], k: int, chunk: int
) -> tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]:
    """The k greatest products of each query with rows of `bank`, greatest first, and which rows.
    `chunk` queries meet a tile of the bank at a time."""
    tiles = -(-len(bank) // TILE)
    size = -(-len(bank) // tiles)
    rows = np.pad(np.arange(len(bank), dtype=np.int32), (0, none := tiles * size - len(bank)))
    rows[len(bank) :] = -1
    data = (
        jnp.asarray(np.pad(bank, ((0, none), (0, 0))).reshape(tiles, size, -1)),
        jnp.asarray(rows.reshape(tiles, size)),
    )
    parts = [_nearest(queries[i : i + chunk], *data, k) for i in range(0, len(queries), chunk)]
    return tuple(np.concatenate(part) for part in zip(*parts))


@functools.partial(jax.jit, static_argnames="k")
def _nearest(
    queries: Float[Array, "q c"], bank: Float[Array, "t r c"], rows: Int[Array, "t r"], k: int
):
    def merge(best, tile):
        features, own = tile
        products = jnp.matmul(queries, features.T, precision="highest")
        products = jnp.where(own < 0, -jnp.inf, products)
        all_rows = jnp.broadcast_to(own, products.shape)
        scores, rows = (jnp.concatenate(pair, axis=1) for pair in zip(best, (products, all_rows)))
        scores, places = jax.lax.top_k(scores, k)  # of equal ones the first
        return (scores, jnp.take_along_axis(rows, places, axis=1)), None

    none = (len(queries), k)
    start = jnp.full(none, -jnp.inf), jnp.full(none, -1, jnp.int32)
    return jax.lax.scan(merge, start, (bank, rows))[0]
