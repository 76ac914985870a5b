from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from clipx.config import ConfigError, bind
from clipx.evaluators import linear_probe
from clipx.evaluators.linear_probe import LinearProbe, accuracy, choose_cost, logistic, sgd
from clipx.types import Encoded

LogisticRegression = pytest.importorskip("sklearn.linear_model").LogisticRegression


@dataclasses.dataclass
class Examples:
    """Pictures of one pixel: the row in its red, the set in its green."""

    labels: list
    which: int = 0
    classes: tuple[str, ...] = ()

    def __len__(self):
        return len(self.labels)

    def label(self, row):
        return self.labels[row]

    def batches(self, size):
        pixels = np.zeros((len(self), 1, 1, 3), np.uint8)
        pixels[:, 0, 0, 0], pixels[:, 0, 0, 1] = np.arange(len(self)), self.which
        yield from (pixels[i : i + size] for i in range(0, len(self), size))


class Encode:
    def __init__(self, *sets):
        self.sets = sets

    def image(self, pictures, fields=()):
        assert fields == ("backbone",)
        return Encoded(backbone=np.stack([self.sets[p[1]][p[0]] for p in pictures[:, 0, 0]]))


def draw(seed, rows, classes, spread):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, rows)
    centres = np.random.default_rng(9).normal(size=(classes, 8))
    return centres[labels] + spread * rng.normal(size=(rows, 8)), labels


@pytest.mark.parametrize("preset", ["logistic", "imagenet"])
def test_classes_apart_are_told_apart_and_others_not(preset):
    (seen, train), (unseen, test) = draw(0, 120, 7, 0.2), draw(1, 50, 7, 0.2)
    test[:5] = (test[:5] + 1) % 7  # these are wrong, but for the top 5
    probe = LinearProbe(Examples(list(test)), Examples(list(train), 1), preset, batch_size=32)
    found = probe(Encode(unseen, seen))
    assert found["top1"] == pytest.approx(0.9)
    assert 0.9 <= found["top5"] <= 1
    assert set(found) - {"top1", "top5"} == ({"cost"} if preset == "logistic" else set())


@pytest.mark.parametrize("classes", [2, 4])
def test_logistic_standardises_by_the_training_set(classes):
    (seen, train), (unseen, _) = draw(2, 60, classes, 1.0), draw(3, 20, classes, 1.0)
    seen, unseen = seen * [1, 9, 1, 1, 1, 1, 1, 0] + 5, unseen * [1, 9, 1, 1, 1, 1, 1, 0] + 5
    scale = np.where(seen.std(0) > 1e-9, seen.std(0), 1)
    model = LogisticRegression(C=0.3, max_iter=1000).fit((seen - seen.mean(0)) / scale, train)
    expected = model.predict_log_proba((unseen - seen.mean(0)) / scale)
    found = logistic(seen, train, unseen, classes + 1, 0.3)
    assert (found[:, -1] == -np.inf).all()  # a class of the test set alone
    found = found[:, :-1] if classes > 2 else found[:, :-1] / 2  # a margin, and its two halves
    found -= np.log(np.exp(found).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_cost_is_the_one_best_on_a_held_out_fifth(monkeypatch):
    labels, asked = np.arange(50) % 2, []
    right = {0.1: 6, 1.0: 8, 10.0: 8}  # of ten

    def scores(features, own, unseen, classes, cost):
        asked.append((len(own), len(unseen), set(features[:, 0]) & set(unseen[:, 0])))
        correct = np.arange(10) < right[cost]
        answer = np.where(correct, labels[unseen[:, 0]], 1 - labels[unseen[:, 0]])
        return np.eye(2)[answer]

    monkeypatch.setattr(linear_probe, "logistic", scores)
    rows = np.arange(50)[:, None]
    assert choose_cost(rows, labels, 2, (10.0, 0.1, 1.0)) == 1.0
    assert asked == [(40, 10, set())] * 3


def test_sgd_equals_its_definition(monkeypatch):
    monkeypatch.setattr(linear_probe, "_SGD_BATCH", 16)
    (seen, train), (unseen, _) = draw(4, 40, 3, 1.0), draw(5, 10, 3, 1.0)
    found = sgd(seen.astype(np.float32), train, unseen.astype(np.float32), 3, 4)
    rng, total = np.random.default_rng(0), 12  # 4 epochs of 3 batches
    kernel, bias = initial_kernel(3), np.zeros(3)
    assert 0.005 < kernel.std() < 0.02
    speeds = [np.zeros_like(kernel), np.zeros(3)]
    for step in range(total):
        if step % 3 == 0:
            order = rng.permutation(40)
            batches = np.concatenate([order, order[:8]]).reshape(3, 16)
        x, y = seen[batches[step % 3]], train[batches[step % 3]]
        p = np.exp(x @ kernel + bias)
        error = (p / p.sum(1, keepdims=True) - np.eye(3)[y]) / 16
        speeds = [0.9 * v + g for v, g in zip(speeds, (x.T @ error, error.sum(0)))]
        rate = 0.3 * np.cos(np.pi / 2 * step / total) ** 2
        kernel, bias = kernel - rate * speeds[0], bias - rate * speeds[1]
    np.testing.assert_allclose(found, unseen @ kernel + bias, rtol=1e-3, atol=1e-4)


def initial_kernel(classes):
    """Rows of zeros leave the kernel as it was."""
    zeros, labels = np.zeros((4, 8), np.float32), np.zeros(4, int)
    identity = np.concatenate([np.eye(8), np.zeros((1, 8))]).astype(np.float32)
    scores = sgd(zeros, labels, identity, classes, 1)
    return scores[:8] - scores[8]


def test_equal_scores_are_never_right():
    scores, labels = np.array([[1.0, 1, 0], [2, 1, 0], [np.nan] * 3]), np.array([0, 0, 0])
    assert accuracy(scores, labels, 1) == pytest.approx(1 / 3)
    assert accuracy(scores, labels, 2) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "test, train, said",
    [
        (Examples([0, 1]), Examples([0, None]), "row 1 without a label"),
        (Examples([]), Examples([0, 1]), "an empty data set"),
        (Examples([0]), Examples([1, 1]), "one class"),
        (Examples([0]), Examples([0, 1]), "2 examples"),
        (
            Examples([0], 0, ("cat", "dog")),
            Examples([0, 1], 1, ("ape", "dog")),
            "the first to differ 'ape' and 'cat'",
        ),
    ],
)
def test_errors_of_the_sets(test, train, said):
    with pytest.raises(ConfigError) as error:
        LinearProbe(test, train)(Encode(np.eye(2), np.eye(2)))
    assert said in str(error.value)


@pytest.mark.parametrize(
    "key, value", [("epochs", 0), ("batch_size", 0), ("costs", [-1.0]), ("preset", "svm")]
)
def test_config_errors_come_before_any_example_is_read(key, value):
    with pytest.raises(ConfigError) as error:
        bind(LinearProbe, {key: value}, examples=None, train_examples=None)
    assert key in str(error.value)


def test_only_one_preset_needs_scikit_learn(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    bind(LinearProbe, {"preset": "imagenet"}, examples=None, train_examples=None)
    with pytest.raises(ConfigError, match="clipx\\[eval\\]"):
        bind(LinearProbe, {}, examples=None, train_examples=None)
