"""Arrays with one row per example of a data set: an external teacher's features, or clusters.

`python -m clipx.teacher` writes `name.npy` and, beside it, `name.json`. The json file identifies
the data (`fingerprint`, `rows`), and says what the array holds and how it was made. Row r of the
array belongs to the example with `Example.row` r, regardless of `data.fraction`.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypedDict

import numpy as np
from jaxtyping import Float32, Int32

from clipx.config import reading, regular, secrets
from clipx.data.base import expand_user
from clipx.data.row_writer import Rows, RowWriter
from clipx.errors import DataError

_TILE = 1 << 16  # rows to check at a time
_AGAIN = "write it again with `python -m clipx.teacher`"


class _About(TypedDict):
    """The json file beside an array."""

    fingerprint: str
    rows: int


def open_teacher(
    path: str, *, rows: int, fingerprint: str, width: int | None = None
) -> Float32[np.ndarray, "rows width"]:
    """A teacher's features, memory-mapped.

    Raises `DataError` if the file is missing or incomplete, is not an array of features, was
    written for other data or with another width, or has a value that is not finite.
    """
    file = _path(path)
    features = _open(file, np.float32, 2, "a teacher's features, float32 [rows, width]")
    _check(file, len(features), rows, fingerprint)
    if width not in (None, features.shape[1]):
        raise DataError(
            f"{file}: {features.shape[1]} numbers per row, expected {width}; write it again with "
            f"--dim={width}, or set the objective's width to {features.shape[1]}"
        )
    for start in range(0, rows, _TILE):
        finite = np.isfinite(features[start : start + _TILE]).all(axis=1)
        if not finite.all():
            raise DataError(
                f"{file}: row {start + np.argmin(finite)} is not finite (it has NaN or infinity); "
                f"{_AGAIN}"
            )
    return features


def open_clusters(path: str, *, rows: int, fingerprint: str) -> Int32[np.ndarray, " rows"]:
    """The cluster of each example (-1 if it has no caption), memory-mapped.

    Raises `DataError` if the file is missing or incomplete, is not an array of clusters, or was
    written for other data.
    """
    file = _path(path)
    clusters = _open(file, np.int32, 1, "clusters, int32 [rows]")
    _check(file, len(clusters), rows, fingerprint)
    return clusters


def describe(path: str, again: str = _AGAIN) -> dict[str, Any]:
    """The contents of the json file beside the array at `path`. again: how to write it anew.

    Raises `DataError` if the file is missing or lacks `fingerprint` or `rows`.
    """
    file = _path(path).with_suffix(".json")
    try:
        about: _About = reading.read_json(file, _About)
    except FileNotFoundError:
        raise DataError(
            f"{file}: no such file, but only it says for which data {file.stem}.npy was written; "
            f"{_AGAIN} (for an array of your own: --features={file.stem}.npy --out=...)"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read ({error}); {again}") from None
    return dict(about)


def has(path: str, about: Mapping[str, Any]) -> bool:
    """Whether the array at `path` is complete and its json file has the contents `about`."""
    file = _path(path)
    return (
        file.exists()
        and file.with_suffix(".json").exists()
        and describe(path) == secrets.cut_all(about)
    )


def load(path: str) -> np.ndarray:
    """The array of a `.npy` file, memory-mapped. Raises `DataError` if there is none."""
    file = _path(path)
    try:
        regular.refuse(file, file.stat())
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{file}: no such file") from None
    except Exception as error:  # NumPy parses a header as Python code, which fails in many ways
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{file}: not a complete .npy file ({reason})") from None
    if not isinstance(array, np.ndarray):
        raise DataError(f"{file}: an archive of arrays, expected a .npy file with one array")
    return array


@contextlib.contextmanager
def create(
    path: str, dtype: type, shape: tuple[int, ...], about: dict[str, Any]
) -> Iterator[Callable[[np.ndarray], Any]]:
    """Context with a function that appends rows to a new array at `path`, in order.

    The array and its json file, with the contents `about`, replace those at `path` when the block
    ends without an exception. Otherwise nothing is left.
    """
    file = _path(path)
    with RowWriter(file, {file.name: Rows(dtype, shape[1:])}, keep=False) as writer:
        yield lambda rows: writer.write(writer.done + len(rows), {file.name: rows})
        writer.finish(about)


def _path(path: str) -> pathlib.Path:
    return pathlib.Path(expand_user(path))


def _open(file: pathlib.Path, dtype: type, axes: int, expected: str) -> np.ndarray:
    array = load(str(file))
    if array.dtype != dtype or array.ndim != axes:
        raise DataError(f"{file}: {array.dtype} of shape {array.shape}, expected {expected}")
    return array


def _check(file: pathlib.Path, length: int, rows: int, fingerprint: str) -> None:
    about = describe(str(file))
    if about["fingerprint"] != fingerprint:
        raise DataError(
            f"{file}: made for other data, with fingerprint {about['fingerprint']}, expected "
            f"{fingerprint}, that of this run's data; {_AGAIN} and this run's config"
        )
    if not length == about["rows"] == rows:
        raise DataError(
            f"{file}: {length:,} rows, {about['rows']} by its json file, expected the {rows:,} "
            f"rows of the data; {_AGAIN}"
        )
