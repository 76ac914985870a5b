"""Principal components of data sets that do not fit in memory."""

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
    """The result of `fit`; `project` applies it to rows."""

    mean: Float[np.ndarray, " c"]
    components: Float[np.ndarray, "c d"]  # orthonormal columns, largest variance first
    explained: float  # the components' share of the variance, in 0..1


def fit(tiles: Callable[[], Iterable[Float[np.ndarray, "m c"]]], d: int) -> PCA:
    """The d principal components of the rows: the directions of largest variance.

    `tiles()` yields all rows, some at a time. It is called twice: for the mean and for the
    covariance.

    Products are computed on the device in float32; sums and eigenvectors in float64 on the host.
    Features of one model are so close together that rounding would otherwise drown the smaller
    components. The entry of largest magnitude of each component is positive, so that the same rows
    give the same components.

    Raises `ConfigError` for d or fewer rows, for fewer than d columns, and for identical rows.
    """
    rows, total = 0, np.zeros(())
    for tile in tiles():
        rows, total = rows + len(tile), total + tile.sum(axis=0, dtype=np.float64)
    columns = total.size
    if not 1 <= d <= min(columns, rows - 1):
        raise ConfigError(
            "PCA",
            f"{d} components of {rows:,} rows of {columns:,} numbers",
            "no more components than numbers in a row, and fewer components than rows",
        )
    mean = (total / rows).astype(np.float32)
    products = np.zeros((columns, columns))
    for tile in tiles():
        for start in range(0, len(tile), _TILE):
            x = np.zeros((_TILE, columns), np.float32)  # of one shape, so that it compiles once
            chunk = tile[start : start + _TILE]
            x[: len(chunk)] = chunk - mean
            products += np.asarray(_products(x))
    values, vectors = np.linalg.eigh(products)  # ascending
    if not values[-1] > 0:
        raise ConfigError("PCA", f"{rows:,} identical rows", "rows that differ")
    components = vectors[:, ::-1][:, :d]
    largest = np.take_along_axis(components, np.abs(components).argmax(axis=0)[None], axis=0)
    components = (components * np.sign(largest)).astype(np.float32)
    return PCA(mean, components, float(values[-d:].sum() / values.sum()))


def project(pca: PCA, x: Float[Array, "m c"]) -> Float[Array, "m d"]:
    """The coordinates of x's rows along the components: centred, not whitened, not normalised."""
    return _project(x, pca.mean, pca.components)


@jax.jit
def _products(x: Float[Array, "m c"]) -> Float[Array, "c c"]:
    return jnp.matmul(x.T, x, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def _project(x: Array, mean: Array, components: Array) -> Array:
    return jnp.matmul(x - mean, components, precision=jax.lax.Precision.HIGHEST)
