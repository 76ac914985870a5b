"""Regularised canonical correlation analysis of two sets of features, of any number of rows."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from clipx.errors import ConfigError

_TILE = 4096  # rows that are read at once


class CCA(NamedTuple):
    """The result of `fit`. `(x - x_mean) @ x_kernel` and `(y - y_mean) @ y_kernel` are the
    canonical coordinates, with a variance of at most 1 each."""

    x_mean: Float[np.ndarray, " c"]
    y_mean: Float[np.ndarray, " e"]
    x_kernel: Float[np.ndarray, "c d"]
    y_kernel: Float[np.ndarray, "e d"]
    correlations: Float[np.ndarray, " d"]  # in 0..1, largest first


def fit(
    x: Float[np.ndarray, "n c"],
    y: Float[np.ndarray, "n e"],
    *,
    dim: int,
    regularizer: float = 1.0,
) -> CCA:
    """The `dim` pairs of directions along which the rows of x and y correlate most.

    `regularizer` times the mean variance of a side is added to its variances (ridge, Vinod 1976),
    and the correlations are those of the sums. Rows are read a tile at a time, so x and y may be
    memory maps of any length. Everything is computed in float64 on the host, and the entry of
    largest magnitude of each column of `x_kernel` is positive, so the same rows give the same
    result.

    Raises `ConfigError` for fewer than two rows, for more directions than the narrower side has
    columns, for columns that all are constant, and for values that are not finite.
    """
    from scipy import linalg  # a fifth of a second, which most runs need not spend

    rows, (c, e) = len(x), (x.shape[1], y.shape[1])
    if rows != len(y) or rows < 2 or not 1 <= dim <= min(c, e):
        raise ConfigError(
            "CCA",
            f"{dim} directions of {rows:,} rows of {c:,} numbers and {len(y):,} of {e:,}",
            "as many rows on both sides, at least two, and no more directions than numbers in a "
            "row of either",
        )
    mean, covariance = _moments(x, y)
    if not np.isfinite(covariance).all():
        raise ConfigError("CCA", "values that are not finite", "finite features")
    roots = []
    for part in (slice(c), slice(c, None)):
        own = covariance[part, part]
        variance = np.trace(own) / len(own)
        if not variance > 0:
            raise ConfigError("CCA", f"{rows:,} identical rows on one side", "rows that differ")
        ridge = max(regularizer, 1e-9) * variance  # a singular covariance stays invertible
        roots.append(linalg.cholesky(own + ridge * np.eye(len(own)), lower=True))
    between = linalg.solve_triangular(roots[0], covariance[:c, c:], lower=True)
    between = linalg.solve_triangular(roots[1], between.T, lower=True).T
    left, correlations, right = linalg.svd(between, full_matrices=False)
    x_kernel = linalg.solve_triangular(roots[0], left[:, :dim], lower=True, trans=1)
    y_kernel = linalg.solve_triangular(roots[1], right[:dim].T, lower=True, trans=1)
    largest = np.take_along_axis(x_kernel, np.abs(x_kernel).argmax(axis=0)[None], axis=0)
    x_kernel, y_kernel = x_kernel * np.sign(largest), y_kernel * np.sign(largest)
    parts = (mean[:c], mean[c:], x_kernel, y_kernel, correlations[:dim])
    return CCA(*(part.astype(np.float32) for part in parts))


def _moments(
    x: Float[np.ndarray, "n c"], y: Float[np.ndarray, "n e"]
) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, "k k"]]:
    """Mean and covariance of the rows [x, y], in float64, in one pass."""
    total = products = shift = None
    for start in range(0, len(x), _TILE):
        tile = slice(start, start + _TILE)
        rows = np.concatenate([np.asarray(x[tile]), np.asarray(y[tile])], axis=1).astype(np.float64)
        if shift is None or total is None or products is None:
            # sums of rows near zero lose no digits when the mean is subtracted from the products
            shift = rows.mean(axis=0)
            total, products = np.zeros(shift.shape), np.zeros((len(shift),) * 2)
        rows -= shift
        total += rows.sum(axis=0)
        products += rows.T @ rows
    assert shift is not None and total is not None and products is not None
    mean = total / len(x)
    return shift + mean, products / len(x) - np.outer(mean, mean)
