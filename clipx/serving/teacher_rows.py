"""An external teacher's rows for every example of a set, or their clusters: made and written."""

from __future__ import annotations

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
from clipx.errors import ConfigError
from clipx.ops import kmeans, pca
from clipx.serving import teacher_features as features_of
from clipx.training.schema import data_section

TILE = 8192  # rows that are read or projected together
FIT_ROWS = 1_024_000  # from which components are found, at most; faiss's bound at width 1024
_ITERATIONS = 200  # of k-means, as CLIP-Lite's clusters


def open_data(config: Mapping[str, Any]) -> tuple[Source, DataConfig]:
    """All the data that a config's runs train on, or a share of."""
    data, spec = data_section(config.get("data"))
    if data.source == "mixture":
        raise ConfigError(
            "config.data.source", "'mixture', whose rows repeat", "a source without parts",
            "a pattern or a list as the path of one source",
        )  # fmt: skip
    return spec.open(), data


def _reduced(
    tiles: features_of.Tiles, rows: int, dim: int, about: dict[str, Any]
) -> Iterator[np.ndarray]:
    """The features cut to their principal components, in order; rows of zeros stay zeros. What
    was found on the way is added to `about`."""
    starts = range(0, rows, TILE)
    used = np.concatenate([tiles(i, min(i + TILE, rows)).any(axis=1) for i in starts])
    about["without"] = int(rows - used.sum())
    chosen = used.copy()
    if used.sum() > FIT_ROWS:
        left = np.random.default_rng(0).permutation(np.flatnonzero(used))[FIT_ROWS:]
        chosen[left] = False

    def sample() -> Iterable[np.ndarray]:
        for i in starts:
            part = chosen[i : i + TILE]
            if part.any():
                yield tiles(i, min(i + TILE, rows))[part]

    found = pca.fit(sample, dim)
    about["explained_variance"] = found.explained
    with features_of.bar(rows, "components") as shown:
        for i in starts:
            x = np.asarray(pca.project(found, tiles(i, min(i + TILE, rows))))
            shown.update(len(x))
            yield x * used[i : i + TILE, None]


def _clusters(
    x: Float32[np.ndarray, "n d"], k: int, about: dict[str, Any]
) -> Int32[np.ndarray, " n"]:
    """The cluster of each row, -1 for one of zeros, which has no features."""
    used = x.any(axis=1)
    if not 1 <= k <= used.sum():
        raise ConfigError("--clusters", str(k), f"at most as many as rows: {used.sum():,}")
    found = kmeans.fit(
        x[used], k, key=jax.random.key(0), iterations=_ITERATIONS, progress=sys.stderr.isatty()
    )
    out = np.full(len(x), -1, np.int32)
    out[used] = found.assignment
    about |= {"clusters": k, "inertia": float(found.inertia), "without": int((~used).sum())}
    return out


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

    Returns (what the json file beside it says, the clusters or None). Arguments are the flags of
    `python -m clipx.teacher`. Raises `ConfigError` for flags that do not go together.
    """
    _one_of(model=model, features=features, teacher=teacher)
    if teacher and clusters is None:
        raise ConfigError("--clusters", "nothing", "how many, of the rows that --teacher names")
    file = _target(out, overwrite)
    aside = file.with_name(f".{file.stem}.raw")
    source, data = open_data(config)
    rows, first = len(source), data.caption == "first"
    about = {"fingerprint": fingerprint(source), "rows": rows}
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
    found = None
    if clusters is None:
        with files.create(out, np.float32, (rows, dim), about) as write:
            for tile in reduced:
                write(tile)
    else:
        found = _clusters(np.concatenate(list(reduced)), clusters, about)
        with files.create(out, np.int32, (rows,), about) as write:
            write(found)
    for left in (aside, aside.with_suffix(".json")):
        left.unlink(missing_ok=True)
    return about, found


def _one_of(**origins: str) -> None:
    """Raises `ConfigError` unless one of the flags is set."""
    given = [f"--{name}" for name, value in origins.items() if value]
    if len(given) != 1:
        raise ConfigError(
            "command line", " and ".join(given) or "no teacher",
            "one of " + ", ".join(f"--{name}" for name in origins),
        )  # fmt: skip


def _target(out: str, overwrite: bool) -> pathlib.Path:
    """The file to write. Raises `ConfigError` where it cannot or should not be written."""
    file = pathlib.Path(expand_user(out))
    if file.suffix != ".npy":
        raise ConfigError("--out", repr(out), "a file that ends in .npy", f"--out={out}.npy")
    if not file.parent.is_dir():
        raise ConfigError("--out", f"no folder {file.parent}", "one that is there")
    there = [str(f) for f in (file, file.with_suffix(".json")) if f.exists()]
    if there and not overwrite:
        raise ConfigError("--out", f"{there[0]}, which exists", "a new name", "--overwrite")
    return file
