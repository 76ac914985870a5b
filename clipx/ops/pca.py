"""Principal components of more rows than the memory holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from clipx.errors import ConfigError

_TILE = 8192  # rows that are multiplied at once


class PCA(NamedTuple):
    """What `fit` found; `project` applies it."""

    mean: Float[np.ndarray, " c"]
    components: Float[np.ndarray, "c d"]  # orthonormal columns, the most important first
    explained: float  # their share of the variance


def fit(tiles: Callable[[], Iterable[Float[np.ndarray, "m c"]]], d: int) -> PCA:
    """The d directions in which rows differ most. `tiles()` gives all rows, some at a time and
    twice: once for their mean, once for their covariance.

    Products are computed on the device in float32; sums and eigenvectors in float64 on the host,
    as features of one model lie so close together that the smaller components drown otherwise. In
    each component the largest number is positive, so that the same rows give the same components.

    Raises `ConfigError` for no more rows than d, fewer columns, and rows that are all the same.
    """
    rows, total = 0, np.zeros(())
    for tile in tiles():
        rows, total = rows + len(tile), total + tile.sum(axis=0, dtype=np.float64)
    columns = total.size
    if not 1 <= d <= min(columns, rows - 1):
        raise ConfigError(
            "PCA",
            f"{d} components of {rows:,} rows of {columns:,} numbers",
            "at most as many as there are numbers, and fewer than rows",
        )
    mean = (total / rows).astype(np.float32)
    products = np.zeros((columns, columns))
    for tile in tiles():
        for start in range(0, len(tile), _TILE):
            x = np.zeros((_TILE, columns), np.float32)  # of one shape, to be compiled once
            part = tile[start : start + _TILE]
            x[: len(part)] = part - mean
            products += np.asarray(_products(x))
    values, vectors = np.linalg.eigh(products)  # ascending
    if not values[-1] > 0:
        raise ConfigError("PCA", f"{rows:,} rows that are all the same", "rows that differ")
    components = vectors[:, ::-1][:, :d]
    largest = np.take_along_axis(components, np.abs(components).argmax(axis=0)[None], axis=0)
    components = (components * np.sign(largest)).astype(np.float32)
    return PCA(mean, components, float(values[-d:].sum() / values.sum()))


def project(pca: PCA, x: Float[Array, "m c"]) -> Float[Array, "m d"]:
    """The rows of x along the components: centred, neither whitened nor normalised again."""
    return _project(x, pca.mean, pca.components)


@jax.jit
def _products(x: Float[Array, "m c"]) -> Float[Array, "c c"]:
    return jnp.matmul(x.T, x, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def _project(x, mean, components):
    return jnp.matmul(x - mean, components, precision=jax.lax.Precision.HIGHEST)
