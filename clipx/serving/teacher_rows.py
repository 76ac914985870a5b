"""Makes an external teacher's rows for every example of a data set, or clusters of those rows."""

from __future__ import annotations

import contextlib
import pathlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Float32, Int32

from clipx.data import row_arrays as files
from clipx.data.base import Source, expand_user, fingerprint
from clipx.data.config import DataConfig
from clipx.data.threads import progress_bar
from clipx.data.threads import shown as working
from clipx.errors import ConfigError
from clipx.ops import kmeans, pca
from clipx.serving import teacher_features as features_of
from clipx.training.schema import data_section

TILE = 8192  # rows that are read or projected at once
FIT_ROWS = 1_024_000  # most rows for the principal components; faiss's bound at width 1024
_ITERATIONS = 200  # of k-means, as for CLIP-Lite's clusters


def open_data(config: Mapping[str, Any]) -> tuple[Source, DataConfig]:
    """The complete training data of a config, even if its runs use only a share, and the `data`
    section. Raises `ConfigError` for a mixture."""
    data, spec = data_section(config.get("data"))
    if data.source == "mixture":
        raise ConfigError(
            "config.data.source", "'mixture', in which rows repeat", "a source without parts",
            "give one source a pattern or a list as its path",
        )  # fmt: skip
    return spec.open(), data


def _reduced(
    tiles: features_of.Tiles, rows: int, dim: int, about: dict[str, Any]
) -> Iterator[np.ndarray]:
    """Tiles of the features' first `dim` principal components, in row order. Rows of zeros stay
    zeros. Adds the keys "without" and "explained_variance" to `about`."""
    starts = range(0, rows, TILE)
    used = np.concatenate([tiles(i, min(i + TILE, rows)).any(axis=1) for i in starts])
    about["without"] = int(rows - used.sum())
    chosen = used.copy()
    if used.sum() > FIT_ROWS:
        left = np.random.default_rng(0).permutation(np.flatnonzero(used))[FIT_ROWS:]
        chosen[left] = False

    def sample() -> Iterable[np.ndarray]:
        for i in starts:
            mask = chosen[i : i + TILE]
            if mask.any():
                yield tiles(i, min(i + TILE, rows))[mask]

    components = pca.fit(sample, dim)
    about["explained_variance"] = components.explained
    with progress_bar(rows, "components") as shown:
        for i in starts:
            x = tiles(i, min(i + TILE, rows))
            x = np.asarray(pca.project(components, x))  # pyright: ignore[reportArgumentType]
            shown.update(len(x))
            yield x * used[i : i + TILE, None]


def _clusters(
    x: Float32[np.ndarray, "n d"], k: int, about: dict[str, Any]
) -> Int32[np.ndarray, " n"]:
    """The cluster of each row; -1 for a row of zeros, which has no features. Adds the keys
    "clusters", "inertia" and "without" to `about`."""
    used = x.any(axis=1)
    if not 1 <= k <= used.sum():
        raise ConfigError("--clusters", str(k), f"at most as many as rows: {used.sum():,}")
    bar = sys.stderr.isatty()  # else a line each ten seconds
    with contextlib.nullcontext() if bar else working("finding clusters"):
        fit = kmeans.fit(
            x[used],  # pyright: ignore[reportArgumentType]
            k,
            key=jax.random.key(0),
            iterations=_ITERATIONS,
            progress=bar,
        )
    clusters = np.full(len(x), -1, np.int32)
    clusters[used] = fit.assignment
    about |= {"clusters": k, "inertia": float(fit.inertia), "without": int((~used).sum())}
    return clusters


def make(
    config: Mapping[str, Any],
    out: str,
    *,
    model: str = "",
    features: str = "",
    teacher: str = "",
    clusters: int | None = None,
    dim: int = 64,
    batch_size: int = 64,
    padding: Literal["mask", "zero"] = "mask",
    device: str = "",
    overwrite: bool = False,
) -> tuple[dict[str, Any], Int32[np.ndarray, " rows"] | None]:
    """Writes the teacher's rows, or their clusters, to `out`.

    Returns (contents of the JSON file beside `out`, clusters or None). Arguments are the flags of
    `python -m clipx.teacher`. Raises `ConfigError` for flags that exclude each other.
    """
    _one_of(model=model, features=features, teacher=teacher)
    if teacher and clusters is None:
        raise ConfigError("--clusters", "nothing", "how many clusters to make of --teacher's rows")
    file = _target(out, overwrite)
    aside = file.with_name(f".{file.stem}.raw.npy")
    source, data = open_data(config)
    rows, first = len(source), data.caption == "first"
    about: dict[str, Any] = {"fingerprint": fingerprint(source), "rows": rows}
    about["captions"] = "first" if first else "mean"
    if teacher:
        reduced = iter([files.open_teacher(teacher, rows=rows, fingerprint=about["fingerprint"])])
        about = files.describe(teacher) | {"teacher": teacher}
    else:
        if features:
            about |= {"features": features}
            tiles = features_of.given(features, rows)
        elif model == "tfidf":
            about |= {"model": model, "words": features_of.WORDS}
            tiles = features_of.word_counts(source, first)
        else:
            about |= {"model": model, "padding": padding, "length": features_of.LENGTH}
            encode = features_of.TextModel(model, padding, batch_size, device)
            tiles = features_of.embedded(source, first, encode, aside, about)
        about["width"] = dim
        reduced = _reduced(tiles, rows, dim, about)
    labels = None
    if clusters is None:
        with files.create(out, np.float32, (rows, dim), about) as write:
            for tile in reduced:
                write(tile)
    else:
        labels = _clusters(np.concatenate(list(reduced)), clusters, about)
        with files.create(out, np.int32, (rows,), about) as write:
            write(labels)
    for left in (aside, aside.with_suffix(".json")):
        left.unlink(missing_ok=True)
    return about, labels


def _one_of(**origins: str) -> None:
    """Raises `ConfigError` unless exactly one of the flags is set."""
    flags = [f"--{name}" for name, value in origins.items() if value]
    if len(flags) != 1:
        raise ConfigError(
            "command line", " and ".join(flags) or "no teacher",
            "one of " + ", ".join(f"--{name}" for name in origins),
        )  # fmt: skip


def _target(out: str, overwrite: bool) -> pathlib.Path:
    """The path of the file to write. Raises `ConfigError` if it cannot be written, or if it exists
    and `overwrite` is off."""
    file = pathlib.Path(expand_user(out))
    if file.suffix != ".npy":
        raise ConfigError("--out", repr(out), "a file that ends in .npy", f"--out={out}.npy")
    if not file.parent.is_dir():
        raise ConfigError("--out", f"no folder {file.parent}", "a file in an existing folder")
    existing = [str(f) for f in (file, file.with_suffix(".json")) if f.exists()]
    if existing and not overwrite:
        raise ConfigError("--out", f"{existing[0]}, which exists", "a new name", "--overwrite")
    return file
