"""Regularised canonical correlation analysis."""

import numpy as np
import pytest
from sklearn.cross_decomposition import CCA as Reference

from clipx.errors import ConfigError
from clipx.ops import cca


def pairs(n=3000, c=7, e=5):
    """Rows of two sides that share three directions, far from zero."""
    draw = np.random.default_rng(0)
    shared = draw.standard_normal((n, 3)) * [3, 2, 1]
    x = shared @ draw.standard_normal((3, c)) + draw.standard_normal((n, c)) + 50
    y = shared @ draw.standard_normal((3, e)) + draw.standard_normal((n, e)) - 20
    return x.astype(np.float32), y.astype(np.float32)


def test_equals_scikit_learns(monkeypatch):
    """Without a regulariser: correlations and directions. Tiles do not divide the rows."""
    monkeypatch.setattr(cca, "_TILE", 700)
    x, y = pairs()
    fitted = cca.fit(x, y, dim=3, regularizer=0)
    reference = Reference(3, scale=False, max_iter=10_000, tol=1e-12).fit(x, y)
    for ours, theirs in zip(
        ((x - fitted.x_mean) @ fitted.x_kernel, (y - fitted.y_mean) @ fitted.y_kernel),
        reference.transform(x, y),
    ):
        cosines = (ours * theirs).sum(0)
        cosines /= np.linalg.norm(ours, axis=0) * np.linalg.norm(theirs, axis=0)
        np.testing.assert_allclose(np.abs(cosines), 1, atol=1e-4)
        np.testing.assert_allclose(ours.mean(0), 0, atol=1e-4)
        np.testing.assert_allclose(ours.std(0), 1, atol=1e-4)
    left, right = reference.transform(x, y)
    expected = [np.corrcoef(a, b)[0, 1] for a, b in zip(left.T, right.T)]
    np.testing.assert_allclose(fitted.correlations, expected, atol=1e-5)


def test_regularised():
    """The kernels whiten the regularised covariances and diagonalise what is between them."""
    x, y = pairs()
    fitted = cca.fit(x, y, dim=5, regularizer=0.5)
    x, y = x.astype(np.float64), y.astype(np.float64)
    sides = []
    for rows, mean, kernel in (
        (x, fitted.x_mean, fitted.x_kernel),
        (y, fitted.y_mean, fitted.y_kernel),
    ):
        np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-6)
        covariance = np.cov(rows.T, bias=True)
        ridge = 0.5 * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
        np.testing.assert_allclose(kernel.T @ (covariance + ridge) @ kernel, np.eye(5), atol=1e-5)
        sides.append((rows - rows.mean(0)) @ kernel)
    between = sides[0].T @ sides[1] / len(x)
    np.testing.assert_allclose(between, np.diag(fitted.correlations), atol=1e-5)


def test_reads_a_tile_at_a_time(monkeypatch):
    """The rows may be a memory map that no memory holds."""
    monkeypatch.setattr(cca, "_TILE", 512)
    x, y = pairs()

    class Rows:
        def __init__(self, rows):
            self.rows, self.shape, self.read = rows, rows.shape, 0

        def __len__(self):
            return len(self.rows)

        def __getitem__(self, index):
            assert isinstance(index, slice)
            taken = self.rows[index]
            assert len(taken) <= 512
            self.read += len(taken)
            return taken

    rows = Rows(x), Rows(y)
    tiled = cca.fit(*rows, dim=3)
    assert [side.read for side in rows] == [len(x), len(y)]
    monkeypatch.setattr(cca, "_TILE", len(x))
    for a, b in zip(tiled, cca.fit(x, y, dim=3)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "x, y, dim, found",
    [
        (np.zeros((9, 4)), np.zeros((8, 3)), 2, "9 rows of 4 numbers and 8 of 3"),
        (np.zeros((9, 4)), np.zeros((9, 3)), 4, "4 directions"),
        (np.ones((9, 4)), np.eye(9, 3), 2, "identical rows"),
        (np.full((9, 4), np.nan), np.eye(9, 3), 2, "not finite"),
    ],
)
def test_refused(x, y, dim, found):
    with pytest.raises(ConfigError, match=found):
        cca.fit(x, y, dim=dim)
