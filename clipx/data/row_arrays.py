"""Arrays of a row for each example of a set: an external teacher's features, or clusters.

Beside `name.npy` stands `name.json`, which says of which data it is (`fingerprint`, `rows`), what
it holds and how it was made. Row r belongs to the example whose `row` is r, in the whole set,
whatever `data.fraction` of it a run trains on. `python -m clipx.teacher` writes both.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32

from clipx.data.base import expand_user
from clipx.errors import DataError

_TILE = 1 << 16  # rows that are looked at together


def open_teacher(
    path: str, *, rows: int, fingerprint: str, width: int | None = None
) -> Float32[np.ndarray, "rows width"]:
    """A teacher's features, memory-mapped. Raises `DataError` for a file that is not there or not
    whole, holds something else, is made for other data or of another width, or has NaN."""
    file = _path(path)
    found = _open(file, np.float32, 2, "a teacher's features, float32 [rows, width]")
    _check(file, len(found), rows, fingerprint)
    if width not in (None, found.shape[1]):
        raise DataError(
            f"{file}: {found.shape[1]} numbers a row, expected {width}; "
            f"make it again with --dim={width}, or set the width that the objective expects"
        )
    for start in range(0, rows, _TILE):
        finite = np.isfinite(found[start : start + _TILE]).all(axis=1)
        if not finite.all():
            raise DataError(f"{file}: row {start + np.argmin(finite)} is not finite")
    return found


def open_clusters(path: str, *, rows: int, fingerprint: str) -> Int32[np.ndarray, " rows"]:
    """The cluster of each example. Raises `DataError` as `open_teacher` does."""
    file = _path(path)
    found = _open(file, np.int32, 1, "clusters, int32 [rows]")
    _check(file, len(found), rows, fingerprint)
    return found


def describe(path: str) -> dict[str, Any]:
    """What the json file beside an array says."""
    file = _path(path).with_suffix(".json")
    again = "write it again with `python -m clipx.teacher`"
    try:
        about = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{file}: no such file, so nothing says what {file.stem}.npy was made for; {again}, "
            f"from an array of your own with --features={file.stem}.npy --out=..."
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read ({error}); {again}") from None
    if not isinstance(about, dict) or not {"fingerprint", "rows"} <= about.keys():
        raise DataError(f"{file}: no fingerprint and rows in it; {again}")
    return about


def load(path: str) -> np.ndarray:
    """An array from a `.npy` file, memory-mapped. Raises `DataError` if it is none."""
    file = _path(path)
    try:
        found = np.load(file, mmap_mode="r")
    except FileNotFoundError:
        raise DataError(f"{file}: no such file") from None
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{file}: no whole array ({str(error).splitlines()[0]})") from None
    if not isinstance(found, np.ndarray):
        raise DataError(f"{file}: several arrays, expected the one of a .npy file")
    return found


@contextlib.contextmanager
def create(
    path: str, dtype: type, shape: tuple[int, ...], about: dict[str, Any]
) -> Iterator[Callable[[np.ndarray], Any]]:
    """A function that takes the rows of a new array, some at a time and in order. File and json
    are written aside, and stand at `path` once the block has ended well."""
    file = _path(path)
    aside = file.with_name(f".{file.name}.part")
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    try:
        with open(aside, "wb") as out:
            np.lib.format.write_array_header_1_0(out, header)
            yield lambda rows: out.write(np.ascontiguousarray(rows, dtype).data)
        said = file.with_suffix(".json")
        said.unlink(missing_ok=True)  # while there is none, no array counts
        aside.replace(file)
        aside.write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", "utf-8")
        aside.replace(said)
    finally:
        aside.unlink(missing_ok=True)


def _path(path: str) -> pathlib.Path:
    return pathlib.Path(expand_user(path))


def _open(file: pathlib.Path, dtype: type, axes: int, expected: str) -> np.ndarray:
    found = load(str(file))
    if found.dtype != dtype or found.ndim != axes:
        raise DataError(f"{file}: {found.dtype} of shape {found.shape}, expected {expected}")
    return found


def _check(file: pathlib.Path, found: int, rows: int, fingerprint: str) -> None:
    about = describe(str(file))
    if about["fingerprint"] != fingerprint:
        raise DataError(
            f"{file}: made for other data, of fingerprint {about['fingerprint']}, where the run's "
            f"has {fingerprint}; make it again with the config of this run"
        )
    if not found == about["rows"] == rows:
        raise DataError(
            f"{file}: {found:,} rows, {about['rows']} by its json file, where the data has {rows:,}"
        )
