from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from support import load_oracle

from clipx.config.binding import bind
from clipx.errors import ConfigError
from clipx.evaluators.retrieval import Retrieval
from clipx.types import Encoded

ORACLE = load_oracle("protoclip")


@dataclasses.dataclass
class Examples:
    """Each picture is one pixel whose value is its row. Each caption is a row number of a table."""

    owner: np.ndarray
    rows: int
    classes: tuple[str, ...] = ()

    def __len__(self):
        return self.rows

    def texts(self, row):
        return tuple(str(t) for t in np.flatnonzero(self.owner == row))

    def label(self, row):
        return None

    def batches(self, size):
        pixels = np.arange(self.rows, dtype=np.uint8)[:, None, None, None]
        pixels = np.broadcast_to(pixels, (self.rows, 1, 1, 3))
        yield from (pixels[i : i + size] for i in range(0, self.rows, size))


class Encode:
    def __init__(self, images, texts):
        self.images, self.texts, self.largest = np.asarray(images), np.asarray(texts), 0

    def image(self, pictures, fields=()):
        return Encoded(unit=self.images[pictures[:, 0, 0, 0]])

    def text(self, texts, fields=()):
        return Encoded(unit=self.texts[[int(t) for t in texts]])

    def similarity(self, images, texts, query="image"):
        scores = images.unit @ texts.unit.T
        self.largest = max(self.largest, scores.size)
        return scores


def sines(rows, columns, phase):
    i, j = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    return np.sin(0.7 * (i * columns + j) + phase)


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_oracle():
    images, owner = sines(10, 6, 0.2), np.repeat(np.arange(10), 2)
    texts = unit(images[owner] + 0.9 * sines(20, 6, 2.2))
    scores = Retrieval(Examples(owner, 10))(Encode(unit(images), texts))
    names = {"image2text": "image_to_text", "text2image": "text_to_image"}
    for key, percent in ORACLE["retrieval"]["metrics"].items():
        direction, _, recall = key.partition("-R")
        mine = f"{names[direction]}_R{recall}" if recall else "mean_recall"
        assert 100 * scores[mine] == pytest.approx(percent, rel=1e-5), key


@pytest.mark.parametrize("chunk, batch_size", [(1, 5), (7, 4), (100, 100)])
def test_equals_sorting_for_uneven_chunks_and_caption_counts(chunk, batch_size):
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(23), rng.integers(1, 5, 23))
    images = unit(rng.normal(size=(23, 6)))
    texts = unit(images[owner] + 0.7 * rng.normal(size=(len(owner), 6)))
    matrix = images @ texts.T
    by_image = np.argsort(-matrix, axis=1)
    to_text = np.array([1 + np.flatnonzero(owner[by_image[i]] == i)[0] for i in range(23)])
    by_text = np.argsort(-matrix, axis=0)
    to_image = np.array([1 + np.flatnonzero(by_text[:, t] == o)[0] for t, o in enumerate(owner)])
    encode = Encode(images, texts)
    scores = Retrieval(Examples(owner, 23), batch_size=batch_size, chunk=chunk)(encode)
    recalls = []
    for name, ranks in (("image_to_text", to_text), ("text_to_image", to_image)):
        assert scores[f"{name}_median_rank"] == np.median(ranks)
        for k in (1, 5, 10):
            assert scores[f"{name}_R@{k}"] == pytest.approx(np.mean(ranks <= k))
            recalls.append(np.mean(ranks <= k))
    assert scores["mean_recall"] == pytest.approx(np.mean(recalls))
    assert encode.largest <= chunk**2  # the complete score matrix is never computed


def test_ties_equal_the_mean_over_every_order():
    owner = np.array([0, 0, 1, 2, 2, 2, 3])
    images = np.array([[1.0, 0], [1, 0], [0, 1], [1, 1]])
    texts = np.array([[1, 0], [1, 0], [1, 0], [0, 1], [0, 1], [1, 0], [0, 0]])
    matrix = images @ texts.T
    scores = Retrieval(Examples(owner, 4), chunk=3)(Encode(images, texts))
    to_text, to_image = [], []
    for order in itertools.permutations(range(7)):
        ranked = np.array(order)[np.argsort(-matrix[:, order], axis=1, kind="stable")]
        to_text.append([1 + np.flatnonzero(owner[ranked[i]] == i)[0] for i in range(4)])
    for order in itertools.permutations(range(4)):
        ranked = np.array(order)[np.argsort(-matrix[order, :], axis=0, kind="stable")]
        to_image.append([1 + np.flatnonzero(ranked[:, t] == o)[0] for t, o in enumerate(owner)])
    for name, ranks in (("image_to_text", to_text), ("text_to_image", to_image)):
        for k in (1, 5):
            assert scores[f"{name}_R@{k}"] == pytest.approx(np.mean(np.array(ranks) <= k))
        assert scores[f"{name}_median_rank"] == pytest.approx(np.median(np.mean(ranks, axis=0)))


@pytest.mark.parametrize("value", [1.0, np.nan])
def test_a_collapsed_model_gets_exactly_chance(value):
    owner = np.repeat(np.arange(20), 2)
    scores = Retrieval(Examples(owner, 20), chunk=6)(
        Encode(np.full((20, 3), value), np.ones((40, 3)))
    )
    assert scores["text_to_image_R@1"] == pytest.approx(1 / 20)
    assert scores["text_to_image_R@10"] == pytest.approx(1 / 2)
    assert scores["image_to_text_R@1"] == pytest.approx(2 / 40)
    assert scores["image_to_text_R@5"] == pytest.approx(
        1 - (38 * 37 * 36 * 35 * 34) / (40 * 39 * 38 * 37 * 36)
    )


def test_captions_takes_the_first_of_each_picture():
    rng = np.random.default_rng(2)
    owner = np.repeat(np.arange(12), 3)
    images, texts = unit(rng.normal(size=(12, 4))), unit(rng.normal(size=(36, 4)))
    first = Retrieval(Examples(owner, 12), captions=1)(Encode(images, texts))
    alone = Retrieval(Examples(np.arange(12), 12))(Encode(images, texts[::3]))
    assert first == alone
    assert first != Retrieval(Examples(owner, 12))(Encode(images, texts))


@pytest.mark.parametrize(
    "owner, rows, said",
    [([0, 2], 3, "row 1 without a caption"), ([], 0, "an empty data set")],
)
def test_errors_of_the_set(owner, rows, said):
    with pytest.raises(ConfigError) as error:
        Retrieval(Examples(np.array(owner), rows))(Encode([], []))
    assert said in str(error.value)


@pytest.mark.parametrize("name", ["captions", "batch_size", "chunk"])
def test_a_count_below_one_is_a_config_error(name):
    with pytest.raises(ConfigError, match=f"retrieval.{name}"):
        bind(Retrieval, {name: 0}, where="retrieval", examples=None)


@pytest.mark.parametrize("each", [1, 3])
def test_chance_is_what_a_model_that_tells_nothing_apart_gets(each):
    owner = np.repeat(np.arange(40), each)[: 40 * each - 1 + (each == 1)]
    evaluator = Retrieval(Examples(owner, 40))
    alike = Encode(np.ones((40, 2)), np.ones((len(owner), 2)))
    assert evaluator.chance() == pytest.approx(evaluator(alike))
    assert evaluator.sizes() == {"pictures": 40, "captions": len(owner)}
