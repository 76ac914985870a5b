"""Weighted k-nearest-neighbour classification on frozen features (Wu et al. 2018)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from clipx.config.ranges import Count, Range
from clipx.errors import ConfigError
from clipx.evaluators.base import (
    ACCURACIES,
    Encode,
    Evaluator,
    Examples,
    accuracies,
    chance_of,
    rows_of,
    split_labels,
    unit,
)

TILE = 8192  # training rows that are compared at once


@dataclasses.dataclass(frozen=True)
class Knn(Evaluator):
    """Accuracies between 0 and 1 for every k of `neighbours`, such as `k20/top1`, `k20/top5` (with
    more than five classes) and `k20/mean_per_class`. A class with as many votes as the right one is
    ranked before it.

    As DINO's eval_knn.py (arXiv:2104.14294, appendix F.1; after Wu et al. 2018, arXiv:1805.01978):
    features are the `backbone` output for centre crops, divided by their length. Each of the k
    training pictures with the greatest cosine c votes for its class with weight
    exp(c / temperature). Among equal cosines the earlier row is nearer.
    """

    metrics = {
        f"k*/{name}": dataclasses.replace(metric, benchmark="")
        for name, metric in ACCURACIES.items()
    }

    needs = "labels"

    examples: Examples
    train_examples: Examples
    neighbours: tuple[Count, ...] = (20, 200)
    temperature: Annotated[float, Range(0.002, 1000)] = 0.07  # less overflows a vote
    batch_size: Count = 256  # of encoding; also test pictures that are compared at once

    def __post_init__(self):
        if not self.neighbours:
            raise ConfigError("knn.neighbours", "none", "at least one count")
        if self.train_examples is not None and max(self.neighbours) > len(self.train_examples):
            raise ConfigError(
                "knn.neighbours",
                f"{max(self.neighbours)} of {len(self.train_examples)} training examples",
                "at most as many neighbours as training examples",
            )

    def sizes(self) -> dict[str, int]:
        return {**super().sizes(), "training pictures": len(self.train_examples)}

    def chance(self) -> dict[str, float]:
        chance = chance_of(len(self.examples.classes))
        return {f"k{k}/{name}": x for k in self.neighbours for name, x in chance.items()}

    def __call__(self, encode: Encode) -> dict[str, float]:
        train, test = split_labels(self.train_examples, self.examples, "knn")
        bank, queries = (
            unit(rows_of(encode.image, examples.batches(self.batch_size), "backbone"))
            for examples in (self.train_examples, self.examples)
        )
        cosines, rows = nearest(queries, bank, max(self.neighbours), self.batch_size)
        weights, labels = np.exp(cosines.astype(np.float64) / self.temperature), train[rows]
        metrics = {}
        for k in self.neighbours:
            votes = np.zeros((len(test), int(max(train.max(), test.max())) + 1))
            np.add.at(votes, (np.arange(len(test))[:, None], labels[:, :k]), weights[:, :k])
            metrics |= {f"k{k}/{name}": value for name, value in accuracies(votes, test).items()}
        return metrics


def nearest(
    queries: Float[np.ndarray, "q c"], bank: Float[np.ndarray, "n c"], k: int, chunk: int
) -> tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]:
    """The k greatest inner products of each query with rows of `bank`, greatest first, and the
    numbers of those rows. `chunk` queries are compared with one tile of the bank at a time."""
    tiles = -(-len(bank) // TILE)
    size = -(-len(bank) // tiles)
    padding = tiles * size - len(bank)
    rows = np.pad(np.arange(len(bank), dtype=np.int32), (0, padding))
    rows[len(bank) :] = -1
    data = (
        jnp.asarray(np.pad(bank, ((0, padding), (0, 0))).reshape(tiles, size, -1)),
        jnp.asarray(rows.reshape(tiles, size)),
    )
    chunks = [_nearest(queries[i : i + chunk], *data, k) for i in range(0, len(queries), chunk)]
    products, neighbours = zip(*chunks)
    return np.concatenate(products), np.concatenate(neighbours)


_Best = tuple[Float[Array, "q k"], Int[Array, "q k"]]  # inner products, and their rows


@functools.partial(jax.jit, static_argnames="k")
def _nearest(
    queries: Float[Array, "q c"], bank: Float[Array, "t r c"], rows: Int[Array, "t r"], k: int
) -> _Best:
    """`nearest` for a bank of t tiles. Rows that pad the last tile have the number -1."""

    def merge(best: _Best, tile: tuple[Float[Array, "r c"], Int[Array, " r"]]):
        features, numbers = tile
        products = jnp.matmul(queries, features.T, precision="highest")
        products = jnp.where(numbers < 0, -jnp.inf, products)
        numbers = jnp.broadcast_to(numbers, products.shape)
        scores, rows = (jnp.concatenate(pair, axis=1) for pair in zip(best, (products, numbers)))
        scores, places = jax.lax.top_k(scores, k)  # the first among equal scores
        return (scores, jnp.take_along_axis(rows, places, axis=1)), None

    shape = (len(queries), k)
    start = jnp.full(shape, -jnp.inf), jnp.full(shape, -1, jnp.int32)
    return jax.lax.scan(merge, start, (bank, rows))[0]
