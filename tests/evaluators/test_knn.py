from __future__ import annotations

import numpy as np
import pytest
from support.pixels import Encode, Examples, draw, unit

from clipx.config.binding import bind
from clipx.errors import ConfigError
from clipx.evaluators import knn
from clipx.evaluators.knn import Knn, nearest


@pytest.mark.parametrize("tile", [1000, 17])
def test_equals_the_definition(tile, monkeypatch):
    monkeypatch.setattr(knn, "TILE", tile)
    (seen, train), (unseen, test) = draw(0, 60, 7, 1.0), draw(1, 23, 7, 1.0)
    probe = Knn(Examples(list(test)), Examples(list(train), 1), (5, 20), 0.2, batch_size=9)
    found = probe(Encode("backbone", unseen.astype("f"), seen.astype("f")))
    assert len(found) == 6
    cosines = unit(unseen) @ unit(seen).T
    for k in (5, 20):
        votes = np.zeros((23, 7))
        for row, own in enumerate(np.argsort(-cosines, axis=1)[:, :k]):
            for place in own:
                votes[row, train[place]] += np.exp(cosines[row, place] / 0.2)
        right = votes.argmax(1) == test
        assert found[f"k{k}/top1"] == pytest.approx(right.mean())
        assert found[f"k{k}/mean_per_class"] == pytest.approx(
            np.mean([right[test == label].mean() for label in set(test)])
        )
        own = votes[np.arange(23), test][:, None]
        assert found[f"k{k}/top5"] == pytest.approx(np.mean((votes >= own).sum(1) <= 5))


def test_of_equal_rows_the_first_are_nearest(monkeypatch):
    monkeypatch.setattr(knn, "TILE", 3)
    bank = np.ones((8, 2), np.float32)
    bank[6] = 2
    cosines, rows = nearest(np.ones((1, 2), np.float32), bank, 4, 5)
    assert rows.tolist() == [[6, 0, 1, 2]] and cosines.tolist() == [[4, 2, 2, 2]]


def test_rows_that_are_not_finite_vote_for_nothing_better_than_chance():
    nan = np.full((10, 2), np.nan, np.float32)
    examples = Examples([0, 1] * 5)
    found = Knn(examples, examples, (10,))(Encode("backbone", nan))
    assert found["k10/top1"] == 0  # both classes have as many votes


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("neighbours", [], "none"),
        ("neighbours", [0], "0"),
        ("neighbours", [3, 5], "5 of 4 training examples"),
        ("temperature", 0.0, "0.0"),
        ("batch_size", 0, "0"),
    ],
)
def test_config_errors(key, value, said):
    with pytest.raises(ConfigError) as error:
        section, given = {"neighbours": [2], key: value}, Examples([0] * 4)
        bind(Knn, section, where="knn", examples=None, train_examples=given)
    assert f"knn.{key}" in str(error.value) and said in str(error.value)
