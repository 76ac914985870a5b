"""Rows that a run holds out: which they are, and that equal pictures stay together."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from support import ROOT
from support.pictures import Pictures, encode, photo

from clipx.data.base import Example, Source, fingerprint
from clipx.data.config import DataConfig
from clipx.data.holdout import hold_out, split
from clipx.data.sources.webdataset import WebDataset
from clipx.errors import ConfigError

FLICKR8K = ROOT.parent / "shared" / "data" / "flickr8k-112"
AUTO = DataConfig(source="x")


@dataclasses.dataclass(frozen=True)
class Captions(Source):
    """One row for each caption: `each` rows in turn show the same picture. `flat` are pixels."""

    rows: int = 60
    each: int = 3
    flat: bool = False
    classes = ()

    def __len__(self):
        return self.rows

    def __getitem__(self, row):
        number = row % (self.rows // self.each)
        pixels = photo(8, 8, seed=number)
        image = pixels if self.flat else encode(pixels, "PNG")
        return Example(image, (f"{number}", f"row {row}"), row, f"key{row}")


def everything(parts):
    return sorted([*parts.rows, *parts.held_out.rows])


def test_a_tenth_is_held_out_and_never_trained_on():
    data = Pictures(rows=50, captions=2)
    parts = split(data, AUTO, ["retrieval"])
    assert (len(parts.train), len(parts.held_out)) == (45, 5)
    assert everything(parts) == list(range(50))
    keys = [parts.held_out[i].key for i in range(5)]
    assert keys == list(parts.held_out.keys()) and not set(keys) & set(parts.train.keys())
    assert [parts.held_out[i].texts for i in range(5)] == [
        data[row].texts for row in parts.held_out.rows
    ]
    (guess,) = parts.train.guesses()
    assert guess == ("holdout", 5, "evals.retrieval.data has no path")
    said = parts.describe(data, ["retrieval"])
    assert said[0].startswith("held out 5 of 50 rows (5 pictures, too few to compare models by)")


def test_without_an_eval_that_needs_them_none_are_held_out():
    data = Pictures(rows=20)
    parts = split(data, AUTO, [])
    assert parts.train is data and parts.held_out is None and parts.describe(data, []) == []
    parts = split(data, dataclasses.replace(AUTO, holdout=3), [])  # said in the config
    assert len(parts.train) == 17 and parts.train.guesses() == ()


@pytest.mark.parametrize("flat", [False, True])
def test_rows_of_one_picture_stay_together_and_are_one_example(flat):
    data = Captions(flat=flat)
    parts = split(data, dataclasses.replace(AUTO, holdout=7), ["retrieval"])
    assert len(parts.held_out) == 2 and len(parts.train) == 54  # 6 of at most 7 rows
    seen = {row % 20 for row in parts.rows.tolist()}
    assert not seen & {row % 20 for row in parts.held_out.rows.tolist()}
    first = parts.held_out[0]
    assert first.texts == tuple(
        [str(first.row), *(f"row {first.row + step}" for step in (0, 20, 40))]
    )


def test_rows_are_chosen_by_the_picture_alone():
    data, moved = Pictures(rows=40), Pictures(rows=40, words="other", captions=1)
    rows = hold_out(data, 8).rows
    assert (hold_out(moved, 8).rows == rows).all()  # other captions and keys, the same pictures
    assert set(hold_out(data, 4).rows) < set(rows)
    more = set(hold_out(Pictures(rows=44), 9).rows)  # new rows leave most of them where they are
    assert len(more & set(rows.tolist())) >= 7


def test_a_share_is_taken_from_the_others():
    data = Pictures(rows=50)
    whole, half = (split(data, dataclasses.replace(AUTO, fraction=f), ["r"]) for f in (1.0, 0.5))
    assert (whole.held_out.rows == half.held_out.rows).all()
    assert set(half.rows) < set(whole.rows) and len(half.train) == 22
    keys = np.array([f"key{row}" for row in range(50)])
    assert list(half.train.keys()) == keys[half.rows].tolist()
    assert [half.train[i].row for i in range(22)] == half.rows.tolist()
    assert fingerprint(half.train) != fingerprint(whole.train)


def test_rows_that_cannot_be_used_are_not_held_out():
    bad, broken = tuple(range(0, 15)), tuple(range(15, 30))
    data = Pictures(rows=40, bad=bad, broken=broken)
    held_out = hold_out(data, 8)
    assert len(held_out) == 8 and held_out.rows.min() >= 30
    with pytest.raises(ConfigError, match=r"2 rows with 0 usable picture\(s\)"):
        hold_out(Pictures(rows=2, bad=(0, 1)), 1)
    with pytest.raises(ConfigError, match="no picture that can be decoded"):
        hold_out(Pictures(rows=2, broken=(0, 1)), 1)


@pytest.mark.parametrize(("rows", "held"), [(2, 1), (9, 1), (19, 1), (20, 2)])
def test_a_tiny_set_holds_at_least_one_picture_out(rows, held):
    parts = split(Pictures(rows=rows), AUTO, ["retrieval"])
    assert (len(parts.held_out), len(parts.train)) == (held, rows - held)
    assert len(split(Captions(12, 3), AUTO, ["retrieval"]).held_out) == 1  # three rows


@pytest.mark.parametrize(
    ("rows", "holdout", "said"),
    [
        (1, "auto", "1 of 1 rows"),
        (5, 5, "5 of 5 rows"),
        (200_000, "auto", "reads every picture"),
    ],
)
def test_what_cannot_be_held_out_is_refused(rows, holdout, said):
    with pytest.raises(ConfigError) as error:
        split(Pictures(rows=rows), dataclasses.replace(AUTO, holdout=holdout), ["retrieval"])
    assert said in str(error.value) and "--config.evals.retrieval.data.path=" in str(error.value)


def test_a_source_that_is_one_picture_is_refused():
    with pytest.raises(ConfigError, match="at least two different pictures"):
        hold_out(Captions(6, 6), 1)


@pytest.mark.skipif(not FLICKR8K.is_dir(), reason=f"no pictures in {FLICKR8K}")
def test_real_pictures_keep_their_captions():
    data = WebDataset(str(FLICKR8K / "test-000000.tar"))
    parts = split(data, AUTO, ["retrieval"])
    assert (len(data), len(parts.train), len(parts.held_out)) == (1000, 900, 100)
    assert everything(parts) == list(range(1000))
    for picture in range(0, 100, 9):
        example = parts.held_out[picture]
        assert example == data[int(parts.held_out.rows[picture])] and len(example.texts) == 5
