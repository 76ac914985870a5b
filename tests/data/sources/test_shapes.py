"""Captions match the pictures, rows are reproducible, and training has no held-out pair."""

from __future__ import annotations

import pickle
import re

import numpy as np
import pytest

from clipx.config.binding import bind
from clipx.data.sources.shapes import CLASSES, COLOURS, HELD_OUT, SHAPES, Shapes
from clipx.errors import ConfigError

NAMED = re.compile(rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})")


@pytest.fixture(scope="module")
def train():
    return Shapes(size=600, image_size=48)


@pytest.fixture(scope="module")
def rows(train):
    return [train[i] for i in range(len(train))]


def colour_mask(image: np.ndarray, colour: str) -> np.ndarray:
    return np.abs(image.astype(int) - COLOURS[colour]).max(-1) < 18


def test_a_row_is_a_pure_function_of_split_and_index(train, rows):
    for i in (5, 599, 0):
        again = Shapes(size=10**6, image_size=48)[i]
        assert (again.image == rows[i].image).all() and again[1:] == rows[i][1:]
    assert pickle.loads(pickle.dumps(train))[7].texts == rows[7].texts
    assert len({row.image.tobytes() for row in rows}) == len(rows)
    assert Shapes("test", 9)[7].texts != Shapes("train", 9)[7].texts
    with pytest.raises(IndexError):
        train[600]


def test_held_out_pairs_are_neither_shown_nor_named_in_training(rows):
    named = [NAMED.findall(text) for row in rows for text in row.texts]
    seen = {f"{colour} {shape}" for pairs in named for colour, shape in pairs}
    held = {CLASSES[i] for i in HELD_OUT}
    assert len(CLASSES) >= 64 and len(held) >= 12
    assert seen == set(CLASSES) - held


def test_every_colour_and_every_shape_keeps_most_of_its_pairs():
    for parts, pairs in ((COLOURS, 8), (SHAPES, 12)):
        for part in parts:
            mine = [i for i, name in enumerate(CLASSES) if part in name.split()]
            assert len(mine) == pairs
            assert 1 <= sum(i in HELD_OUT for i in mine) <= 2


def test_the_test_split_shows_one_held_out_object_each():
    test = Shapes("test", 64, 48)
    rows = [test[i] for i in range(64)]
    assert {row.label for row in rows} == set(HELD_OUT)
    for row in rows:
        names = [pair for text in row.texts for pair in NAMED.findall(text)]
        assert {" ".join(name) for name in names} == {CLASSES[row.label]}
        assert colour_mask(row.image, names[0][0]).mean() > 0.01


def test_shapes_are_where_the_captions_say(rows):
    checked = set()
    for row in rows:
        if "grey" in " ".join(row.texts):  # the edges of every outline are grey too
            continue
        ys, xs = np.indices(row.image.shape[:2]) / row.image.shape[0] - 0.5
        if row.label is None:
            first, relation, second = re.fullmatch(r"a (.*?) (left|right|above|below).* a (.*)",
                                                   row.texts[0]).groups()  # fmt: skip
            masks = [colour_mask(row.image, name.split()[0]) for name in (first, second)]
            if first.split()[0] == second.split()[0]:
                continue
            (x, y), (u, v) = ((xs[mask].mean(), ys[mask].mean()) for mask in masks)
            assert {"left": x < u, "right": x > u, "above": y < v, "below": y > v}[relation]
            checked.add((2, relation))
        else:
            size, colour = re.search(rf"(large|small) ({'|'.join(COLOURS)})", row.texts[2]).groups()
            mask = colour_mask(row.image, colour)
            extent = max(np.ptp(np.where(mask.any(axis))) for axis in (0, 1))
            assert (extent / len(mask) > 0.37) == (size == "large")
            place = row.texts[3].rpartition(" ")[2]
            if place != "middle" and size == "small":
                x, y = xs[mask].mean(), ys[mask].mean()
                far = {"left": -x, "right": x, "top": -y, "bottom": y}[place]
                assert far > 0.12
                checked.add((1, place))
    assert len(checked) == 8


def test_articles_and_templates(rows):
    assert not any(re.search(r"\ba [aeiou]", text) for row in rows for text in row.texts)
    assert len({NAMED.sub("it", text) for row in rows for text in row.texts}) > 20


def test_pictures_have_the_configured_size_and_a_light_background(rows):
    assert Shapes(size=1, image_size=33)[0].image.shape == (33, 33, 3)
    for row in rows:
        assert row.image.dtype == np.uint8
        if "in the middle" in row.texts[3]:
            corner = row.image[:3, :3]
            assert corner.min() >= 222 and np.ptp(corner, (0, 1)).max() <= 15


@pytest.mark.parametrize("values", [{"size": 0}, {"image_size": 8}])
def test_impossible_sizes(values):
    with pytest.raises(ConfigError, match="expected: (at least|from) 1"):
        bind(Shapes, values)
