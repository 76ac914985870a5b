"""Stored features of a frozen tower, one row or several for each example of a data set.

`python -m clipx.embed` writes a folder with `features.json`, which says what the arrays were made
of, and

    backbone.npy  float32 [rows, v, c]: the tower's pooled output for v views of each picture;
                  of captions float32 [captions, c]
    tokens.npy    float32, the same with [n, c]: the tower's output per token; only on request
    bad.npy       bool [rows]: rows that could not be used, whose features are zeros. The file
                  `quarantine.jsonl` names them
    offsets.npy   int64 [rows + 1], of captions: those of row r are offsets[r] to offsets[r + 1]
    ids.npy       int32 [captions, context], of captions: their token ids

Arrays are memory-mapped: opening a folder reads their headers, and a batch reads its own rows.
"""

from __future__ import annotations

import mmap
import pathlib
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from clipx.data import row_arrays
from clipx.data.base import expand_user
from clipx.data.reading import unchanged
from clipx.data.row_writer import Rows
from clipx.data.storage import of_file
from clipx.errors import BadSample, DataError

FILE = "features.json"
# the arrays of a batch
FEATURES = ("image_features", "image_tokens", "text_features", "text_tokens")
AGAIN = "write it again with `python -m clipx.embed`"


def layout(
    tower: str, *, views: int, width: int, tokens: tuple[int, ...] = (), context: int = 0
) -> dict[str, Rows]:
    """What each file of a folder holds. tokens: the shape [n, c] of a row's token features; ()
    stores none."""
    lead = (views,) if tower == "image" else ()
    arrays = {"backbone.npy": Rows(np.float32, (*lead, width)), "bad.npy": Rows(np.bool_)}
    if tokens:
        arrays["tokens.npy"] = Rows(np.float32, (*lead, *tokens))
    if tower == "text":
        arrays |= {"offsets.npy": Rows(np.int64), "ids.npy": Rows(np.int32, (context,))}
    return arrays


def _mapped(file: pathlib.Path) -> np.ndarray:
    """The array of a file. Only the pages that are asked for are read, without those that follow:
    rows are read in random order."""
    array = row_arrays.load(str(file))
    mapped: mmap.mmap | None = getattr(array, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_RANDOM"):
        mapped.madvise(mmap.MADV_RANDOM)
    return np.asarray(array)  # indexed several times as fast as `np.memmap`


class FeatureRows:
    """The features of one tower in a folder, for the rows of a source.

    rows: the rows of the folder that the source has, in its order; None: all. A worker process that
    unpickles an instance maps the files again. Raises `DataError` for a folder that is missing,
    incomplete or damaged.

    Attributes:
        about: the contents of features.json.
    """

    def __init__(self, folder: str, rows: Int[np.ndarray, " rows"] | None = None):
        self.folder, self.rows = folder, rows
        path = pathlib.Path(expand_user(folder))
        if not (path / FILE).exists():
            raise DataError(f"{path}: no {FILE}, expected a folder that `clipx.embed` has finished")
        self.about: dict[str, Any] = row_arrays.describe(str(path / FILE), AGAIN)
        names = layout(self.about.get("tower", ""), views=0, width=0, tokens=(0, 0))
        if not self.about.get("tokens"):
            names.pop("tokens.npy")
        self._files = tuple(of_file(str(path / name)) for name in names if (path / name).exists())
        arrays = {name[:-4]: _mapped(path / name) for name in names}
        self._bad: Bool[np.ndarray, " rows"] = arrays["bad"]
        self._arrays = arrays
        lengths = {len(self._bad), self.about["rows"], len(arrays["backbone"])}
        if "offsets" in arrays:
            lengths = {len(self._bad), self.about["rows"], len(arrays["offsets"]) - 1}
        backbone = arrays["backbone"]
        shaped = backbone.dtype == np.float32 and backbone.ndim == (2 if "ids" in arrays else 3)
        if len(lengths) > 1 or not shaped:
            raise DataError(f"{path}: not the {self.about['rows']} rows of {FILE}; {AGAIN}")

    def __reduce__(self):
        return FeatureRows, (self.folder, self.rows)

    @property
    def views(self) -> int:
        """Stored views of each picture."""
        return self._arrays["backbone"].shape[1]

    @property
    def width(self) -> int:
        """Channels c of the features."""
        return self._arrays["backbone"].shape[-1]

    @property
    def row_bytes(self) -> int:
        """Bytes that a row of a batch takes."""
        return sum(x[:1].nbytes for x in self._arrays.values())

    def check(self, index: int) -> int:
        """The folder's row of the source's row `index`. Raises `BadSample` for a bad row."""
        row = index if self.rows is None else int(self.rows[index])
        if self._bad[row]:
            raise BadSample(f"row {row}", f"it has no features: see {self.folder}/quarantine.jsonl")
        return row

    def captions(self, index: int) -> range:
        """The numbers of the captions of the source's row `index`. Raises `BadSample` for a bad
        row."""
        row = self.check(index)
        return range(int(self._arrays["offsets"][row]), int(self._arrays["offsets"][row + 1]))

    def images(
        self, indices: Int[np.ndarray, " n"], draws: Float[np.ndarray, "n v"], tokens: bool
    ) -> dict[str, np.ndarray]:
        """Features [n, v, ...] of the source's rows: one stored view for each of v views.

        draws: uniform in [0, 1). They choose among several stored views: view i has those whose
        number is i, i + v, i + 2v, ...
        """
        rows = indices if self.rows is None else self.rows[indices]
        v = draws.shape[1]
        first = np.arange(v)
        count = np.maximum(-(-(self.views - first) // v), 1)
        chosen = np.minimum(first + v * (draws * count).astype(np.int64), self.views - 1)
        return self._taken("image", (rows[:, None], chosen), tokens)

    def texts(self, numbers: Int[np.ndarray, "n u"], tokens: bool) -> dict[str, np.ndarray]:
        """Features [n, u, ...] of captions by their numbers, and the token ids `text`."""
        ids = self._arrays["ids"][numbers]
        return {"text": ids, **self._taken("text", numbers, tokens)}

    def _taken(self, tower: str, index: Any, tokens: bool) -> dict[str, np.ndarray]:
        for file in self._files:  # a read of a mapped file that was cut would end the process
            unchanged(file)
        taken = {f"{tower}_features": self._arrays["backbone"][index]}
        return taken | ({f"{tower}_tokens": self._arrays["tokens"][index]} if tokens else {})
