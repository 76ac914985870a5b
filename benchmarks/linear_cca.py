"""`python benchmarks/linear_cca.py --train=FOLDER --test=FOLDER`: what linear canonical
correlations of two frozen encoders reach, with NumPy alone: the line to beat.

Each folder holds the results `image` and `text` of `clipx.embed`. Captions of an image are averaged
for fitting; `--regularizer` times the mean variance is added to each variance; a score is the
cosine of the canonical coordinates, each weighted by the root of its correlation. Prints retrieval
among the test images with all their captions, in %.
"""

from __future__ import annotations

import argparse
import pathlib
import time

import numpy as np


def load(folder: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(features of images [rows, c], of captions [captions, e], the row of each caption), without
    rows that could not be read."""
    image, text = pathlib.Path(folder, "image"), pathlib.Path(folder, "text")
    x, y = (np.load(side / "backbone.npy").astype(np.float64) for side in (image, text))
    counts = np.diff(np.load(text / "offsets.npy"))
    row = np.repeat(np.arange(len(x)), counts)
    good = ~(np.load(image / "bad.npy") | np.load(text / "bad.npy")) & (counts > 0)
    kept = good[row]
    return x[good].mean(axis=1), y[kept], (np.cumsum(good) - 1)[row[kept]]


def root_inverse(covariance: np.ndarray, regularizer: float) -> np.ndarray:
    """covariance**(-1/2), after a share of the mean variance is added to its diagonal."""
    width = len(covariance)
    ridge = regularizer * np.trace(covariance) / width * np.eye(width)
    values, vectors = np.linalg.eigh(covariance + ridge)
    return (vectors / np.sqrt(values)) @ vectors.T


def fit(x: np.ndarray, y: np.ndarray, dim: int, regularizer: float):
    """(mean of x, its map to `dim` weighted coordinates, the same of y)."""
    a, b = x - x.mean(0), y - y.mean(0)
    wx, wy = (root_inverse(z.T @ z / len(z), regularizer) for z in (a, b))
    u, correlations, v = np.linalg.svd(wx @ (a.T @ b / len(a)) @ wy)
    root = np.sqrt(correlations[:dim])
    return x.mean(0), wx @ u[:, :dim] * root, y.mean(0), wy @ v[:dim].T * root


def recalls(scores: np.ndarray, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """R@1, 5 and 10 in %, image to text and text to image. scores: [images, captions]; row: the
    image of each caption."""
    ks = np.array([1, 5, 10])
    own = scores[row, np.arange(len(row))]
    to_image = (scores > own).sum(axis=0)
    best = np.full(len(scores), -np.inf)
    np.maximum.at(best, row, own)
    to_text = (scores > best[:, None]).sum(axis=1)
    return tuple(100 * (rank[:, None] < ks).mean(axis=0) for rank in (to_text, to_image))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--train", required=True, help="folder with image/ and text/ to fit")
    parser.add_argument("--test", required=True, help="folder with image/ and text/ to score")
    parser.add_argument("--dim", type=int, default=256, help="canonical directions")
    parser.add_argument("--regularizer", type=float, default=1.0, help="share of the mean variance")
    args = parser.parse_args()
    x, y, row = load(args.train)
    started = time.perf_counter()
    sums = np.zeros((len(x), y.shape[1]))
    np.add.at(sums, row, y)
    x_mean, x_map, y_mean, y_map = fit(
        x, sums / np.bincount(row)[:, None], args.dim, args.regularizer
    )
    x, y, row = load(args.test)
    z, w = (x - x_mean) @ x_map, (y - y_mean) @ y_map
    z, w = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (z, w))
    both = recalls(z @ w.T, row)
    shown = [" / ".join(f"{value:.1f}" for value in values) for values in both]
    mean = (both[0][2] + both[1][2]) / 2
    print("| | image→text R@1 / 5 / 10 | text→image R@1 / 5 / 10 | mean R@10 |")
    print("|---|---|---|---|")
    print(f"| linear CCA, {args.dim} directions | {shown[0]} | {shown[1]} | {mean:.1f} |")
    print(f"\nfitted and scored in {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
