"""Pictures of a test set that are in the training set: as they are, decoded alike, or nearly."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image
from support import ROOT
from support.pictures import encode, photo

from clipx.data import pictures
from clipx.data.base import Example, Source
from clipx.data.overlap import KINDS, against, prints, table
from clipx.data.sources.webdataset import WebDataset

FLICKR8K = ROOT.parent / "shared" / "data" / "flickr8k-112"


@dataclasses.dataclass(frozen=True)
class Given(Source):
    images: tuple
    name: str = "train"
    classes = ()

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row):
        return Example(self.images[row], ("x",), row, f"{self.name}{row}")


def resized(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


PHOTOS = [photo(60, 80, seed=seed) for seed in range(12)]
TRAIN = Given(tuple(encode(pixels, quality=95) for pixels in PHOTOS))


def report(*images):
    return against([TRAIN], Given(images, "test"))


def test_each_picture_is_counted_once_by_what_is_most_alike():
    same = encode(pictures.decode(TRAIN[1]), "PNG")
    found = report(TRAIN[0].image, same, encode(PHOTOS[2], quality=30), b"no")
    found_other = report(encode(photo(60, 80, seed=99)))
    assert [found[kind]["count"] for kind in KINDS] == [1, 1, 1]
    assert [found[kind]["examples"] for kind in KINDS] == [
        [[f"test{i}", f"train{i}"]] for i in range(3)
    ]
    assert (found["pictures"], found["bad"]) == (3, 1)
    lines = table(found)
    assert lines[0] == ("3 of 3 test pictures are in the training set (1 more cannot be decoded)")
    assert "    test2 = train2" in lines
    assert table(found_other) == ["0 of 1 test pictures are in the training set"]


@pytest.mark.parametrize(
    "change",
    [
        lambda pixels: resized(pixels, 40, 30),
        lambda pixels: resized(pixels, 200, 150),
        lambda pixels: (pixels * 0.8).astype(np.uint8),
        lambda pixels: np.asarray(Image.fromarray(pixels).convert("L").convert("RGB")),
        lambda pixels: pixels[1:-1, 1:-1],
    ],
    ids=["half", "double", "darker", "grey", "cropped"],
)
def test_a_changed_picture_is_nearly_equal(change):
    found = report(*(encode(change(pixels), quality=60) for pixels in PHOTOS))
    assert found["nearly equal pixels"]["count"] >= 11


def test_flat_pictures_of_other_levels_are_others():
    flat = [np.full((20, 20, 3), level, np.uint8) for level in (0, 128, 250)]
    train, same = Given((encode(flat[0], "PNG"), encode(flat[1], "PNG"))), encode(flat[1], "BMP")
    found = against([train], Given((same, encode(flat[2], "PNG")), "test"))
    assert [found[kind]["count"] for kind in KINDS] == [0, 1, 0]


def test_parts_arrays_and_empty_sets():
    parts = [Given((PHOTOS[0],), "a"), Given((PHOTOS[1], PHOTOS[0]), "b")]
    found = against(parts, Given((PHOTOS[1], PHOTOS[0]), "test"))
    assert found["equal bytes"]["examples"] == [["test0", "b0"], ["test1", "a0"]]
    assert against([Given(())], Given((PHOTOS[0],)))["pictures"] == 1
    assert against([Given((PHOTOS[0],))], Given(()))["pictures"] == 0


@pytest.mark.skipif(not FLICKR8K.is_dir(), reason=f"no pictures in {FLICKR8K}")
def test_real_pictures_are_told_apart():
    shards = [str(FLICKR8K / name) for name in ("train-000000.tar", "test-000000.tar")]
    train, test = map(WebDataset, shards)

    def first(source, count):
        return Given(tuple(source[row].image for row in range(count)))

    several = first(train, 150), first(test, 100)
    found = against([several[0]], several[1])
    assert [found[kind]["count"] for kind in KINDS] == [0, 0, 0]
    small = [resized(pictures.decode(several[0][row]), 56, 56) for row in range(20)]
    found = against([several[0]], Given(tuple(encode(image, quality=50) for image in small)))
    assert found["nearly equal pixels"]["count"] >= 18
    assert len(prints(several[1]).rows) == 100
