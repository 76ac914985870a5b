"""Clustering: how well k-means on image features finds the classes (ProtoCLIP's zero_shot.py)."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from clipx.config.ranges import Count, Range, Seed
from clipx.errors import ConfigError
from clipx.evaluators.base import (
    Encode,
    Evaluator,
    Examples,
    labels_of,
    need_scikit_learn,
    rows_of,
)
from clipx.ops import kmeans
from clipx.types import Metric

ROWS_PER_CLUSTER = 256  # faiss trains on at most this many, sampled at random


@dataclasses.dataclass(frozen=True)
class Clustering(Evaluator):
    """`ari` and `ami`: the adjusted Rand index and the adjusted mutual information (arithmetic
    mean) between the classes and the k-means clusters of the pictures' unit embeddings. 1 for
    identical partitions, about 0 for a random one.

    iterations, restarts, seed: of the k-means. Its k is the greatest label plus one. It trains on
    at most 256 k rows, sampled by `seed`, and starts from k random rows; then every row is assigned
    to its nearest centroid. The original always uses faiss's seed 1234.
    """

    metrics = {"ari": Metric("more"), "ami": Metric("more", column="ami")}

    needs = "labels"

    examples: Examples
    iterations: Annotated[int, Range(1, 10_000)] = 100
    restarts: Annotated[int, Range(1, 1000)] = 5
    seed: Seed = 0
    batch_size: Count = 256

    def __post_init__(self):
        need_scikit_learn("clustering")

    def __call__(self, encode: Encode) -> dict[str, float]:
        from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score

        labels = labels_of(self.examples, "clustering.examples")
        k = int(labels.max()) + 1
        if not 2 <= k <= len(labels):
            raise ConfigError(
                "clustering.examples",
                f"{len(labels)} examples, with greatest label {k - 1}",
                "at least two classes, and at least as many examples",
            )
        rows = rows_of(encode.image, self.examples.batches(self.batch_size), "unit")
        clusters = self._clusters(rows, k)
        return {
            "ari": float(adjusted_rand_score(labels, clusters)),
            "ami": float(adjusted_mutual_info_score(labels, clusters)),
        }

    def _clusters(self, rows: Float[np.ndarray, "n d"], k: int) -> Int[np.ndarray, " n"]:
        sample, most = rows, ROWS_PER_CLUSTER * k
        if len(rows) > most:
            chosen = np.random.default_rng(self.seed).choice(len(rows), most, replace=False)
            sample = rows[np.sort(chosen)]
        fit = kmeans.fit(
            jnp.asarray(sample),
            k,
            key=jax.random.key(self.seed),
            iterations=self.iterations,
            restarts=self.restarts,
        )
        return nearest_centroid(rows, np.asarray(fit.centroids), self.batch_size)


def nearest_centroid(
    rows: Float[np.ndarray, "n d"], centroids: Float[np.ndarray, "k d"], chunk: int
) -> Int[np.ndarray, " n"]:
    """The index of each row's nearest centroid, computed for `chunk` rows at a time."""
    half = np.sum(np.square(centroids), axis=1) / 2
    scores = (rows[i : i + chunk] @ centroids.T - half for i in range(0, len(rows), chunk))
    return np.concatenate([np.argmax(score, axis=1) for score in scores])
