"""`python -m clipx.teacher --config=FILE --model=roberta-large --out=teacher.npy`: what a language
model says of every caption of a config's data, once and for all, as ProtoCLIP's external teacher.

    --model     a text encoder of Hugging Face, a name or a folder, or `tfidf`, which needs no
                download: counts of words, weighted by how rare they are (scikit-learn)
    --features  an array of your own instead, [rows, numbers], of any teacher, also of pictures
    --teacher   what this command wrote before, for --clusters
    --clusters  writes so many clusters of the teacher's rows instead: `data.clusters`

A row is the mean over its captions (with `data.caption` = first: its first) of unit vectors, then
cut to its --dim principal components. All rows of the set are written, whatever `data.fraction` a
run uses. `data.teacher` and `data.clusters` say in a config where the files are. A model that was
stopped in its work goes on where it was when the command is given again.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import jax
import numpy as np
from absl import flags
from jaxtyping import Float32, Int32

from clipx import cli
from clipx.config import binding as configs
from clipx.data import features as features_of
from clipx.data import row_arrays as files
from clipx.data.base import Source, expand_user, fingerprint
from clipx.data.config import DataConfig
from clipx.errors import ConfigError, RunError
from clipx.ops import kmeans, pca
from clipx.training.schema import SourceSpec, split

_TILE = 8192  # rows that are read or projected together
_FIT_ROWS = 1_024_000  # from which components are found, at most; faiss's bound at width 1024
_ITERATIONS = 200  # of k-means, as CLIP-Lite's clusters


def open_data(config: Mapping[str, Any]) -> tuple[Source, DataConfig]:
    """All the data that a config's runs train on, or a share of."""
    if not isinstance(config.get("data"), Mapping):
        raise ConfigError("config.data", "nothing", "a section with a source", "set config.data")
    data, rest = split(config["data"], DataConfig, "config.data")
    if data.source == "mixture":
        raise ConfigError(
            "config.data.source", "'mixture', whose rows repeat", "a source without parts",
            "a pattern or a list as the path of one source",
        )  # fmt: skip
    beside = configs.fields(DataConfig)
    return SourceSpec.check(rest, data.source, "config.data", beside).open(), data


def _reduced(
    tiles: features_of.Tiles, rows: int, dim: int, about: dict[str, Any]
) -> Iterator[np.ndarray]:
    """The features cut to their principal components, in order; rows of zeros stay zeros. What
    was found on the way is added to `about`."""
    starts = range(0, rows, _TILE)
    used = np.concatenate([tiles(i, min(i + _TILE, rows)).any(axis=1) for i in starts])
    about["without"] = int(rows - used.sum())
    chosen = used.copy()
    if used.sum() > _FIT_ROWS:
        left = np.random.default_rng(0).permutation(np.flatnonzero(used))[_FIT_ROWS:]
        chosen[left] = False

    def sample() -> Iterable[np.ndarray]:
        for i in starts:
            part = chosen[i : i + _TILE]
            if part.any():
                yield tiles(i, min(i + _TILE, rows))[part]

    found = pca.fit(sample, dim)
    about["explained_variance"] = found.explained
    with features_of.bar(rows, "components") as shown:
        for i in starts:
            x = np.asarray(pca.project(found, tiles(i, min(i + _TILE, rows))))
            shown.update(len(x))
            yield x * used[i : i + _TILE, None]


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
) -> None:
    """Writes the teacher's rows, or their clusters, to `out`, and says what they are."""
    _one_of(model=model, features=features, teacher=teacher)
    if teacher and clusters is None:
        raise ConfigError("--clusters", "nothing", "how many, of the rows that --teacher names")
    file = _target(out, overwrite)
    aside = file.with_name(f".{file.stem}.raw")
    source, data = open_data(config)
    rows, first = len(source), data.caption == "first"
    about = {
        "fingerprint": fingerprint(source),
        "rows": rows,
        "captions": "first" if first else "mean",
    }
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
            tiles = features_of.embedded(
                source,
                first,
                features_of.TextModel(model, padding, batch_size, device),
                aside,
                about,
            )
        about["width"] = dim
        reduced = _reduced(tiles, rows, dim, about)
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
    print("\n".join(_said(out, about, None if clusters is None else found)))


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


def _said(out: str, about: Mapping[str, Any], clusters: np.ndarray | None) -> Iterator[str]:
    """What was written, in words."""
    missing = f", {about['without']:,} of them without features" if about["without"] else ""
    yield f"{out}: {about['rows']:,} rows{missing}, fingerprint {about['fingerprint']}"
    if clusters is None:
        share = f"{about['width']} components, {about['explained_variance']:.1%} of the variance"
        yield f"{share}; --config.data.teacher={out}"
    else:
        sizes = np.bincount(clusters[clusters >= 0], minlength=about["clusters"])
        yield (
            f"{len(sizes):,} clusters of {sizes.min():,} to {sizes.max():,} rows, median "
            f"{np.median(sizes):,.0f}; --config.data.clusters={out}"
        )


def main(overrides: list[tuple[str, str]]) -> None:
    values = flags.FLAGS
    names = ("model", "features", "teacher", "clusters", "dim", "batch_size", "padding", "device")
    options = {name: values[name].value for name in (*names, "overwrite")}
    try:
        make(cli.load_config(values.config, overrides), values.out, **options)
    except OSError as error:
        where = error.filename or values.out
        raise RunError(f"{where}: {error.strerror or error}") from None


if __name__ == "__main__":
    flags.DEFINE_string("config", None, "Config file, path.py or path.py:variant.")
    flags.DEFINE_string("out", None, "The .npy file to write; a .json stands beside it.")
    flags.DEFINE_string("model", "", "A Hugging Face text encoder, name or folder; or tfidf.")
    flags.DEFINE_string("features", "", "An array [rows, numbers] to use instead of a model.")
    flags.DEFINE_string("teacher", "", "What this command wrote before, for --clusters.")
    flags.DEFINE_integer("clusters", None, "Writes so many clusters instead.", lower_bound=1)
    flags.DEFINE_integer("dim", 64, "Principal components that are kept.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 64, "Captions that a model reads at once.", lower_bound=1)
    flags.DEFINE_enum("padding", "mask", ["mask", "zero"], "zero: as ProtoCLIP's own code.")
    flags.DEFINE_string("device", "", "Of the model: cpu, cuda, ...; cuda if there is one.")
    flags.DEFINE_bool("overwrite", False, "Writes over what is there.")
    cli.run(main, required=("config", "out"))
