from __future__ import annotations

import numpy as np
import pytest
from support.pixels import Encode, Examples, draw

from clipx.config.binding import bind
from clipx.errors import ConfigError
from clipx.evaluators import linear_probe
from clipx.evaluators.base import accuracies
from clipx.evaluators.linear_probe import _SGD, LinearProbe, choose_cost, logistic, sgd

RAW = ("protoclip", "protoclip_logistic")


@pytest.mark.parametrize(
    "preset, more",
    [
        ("logistic", {"cost"}),
        ("protoclip_logistic", set()),
        ("clip_lite", set()),
        ("slip", {"best_on_test"}),
        ("protoclip", {"best_on_test"}),
    ],
)
def test_classes_apart_are_told_apart_and_others_not(preset, more):
    (seen, train), (unseen, test) = draw(0, 120, 7, 0.2), draw(1, 50, 7, 0.2)
    test[:5] = (test[:5] + 1) % 7  # wrong labels: misses for top 1, mostly hits for top 5
    probe = LinearProbe(Examples(list(test)), Examples(list(train), 1), preset, batch_size=32)
    found = probe(Encode("raw" if preset in RAW else "backbone", unseen, seen))
    assert found["top1"] == pytest.approx(0.9)
    assert 0.9 <= found["top5"] <= 1 and 0.7 < found["mean_per_class"] < 0.95
    assert set(found) - {"top1", "top5", "mean_per_class"} == more
    assert found.get("best_on_test", 1) >= found["top1"]


@pytest.mark.parametrize("classes", [2, 7])
def test_logistic_standardises_by_the_training_set(classes):
    sklearn = pytest.importorskip("sklearn.linear_model")
    (seen, train), (unseen, _) = draw(2, 120, classes, 1.0), draw(3, 20, classes, 1.0)
    seen, unseen = seen * [1, 9, 1, 1, 1, 1, 1, 0] + 5, unseen * [1, 9, 1, 1, 1, 1, 1, 0] + 5
    scale = np.where(seen.std(0) > 1e-9, seen.std(0), 1)
    model = sklearn.LogisticRegression(C=0.3, max_iter=1000, tol=1e-8)
    model.fit((seen - seen.mean(0)) / scale, train)
    expected = model.predict_log_proba((unseen - seen.mean(0)) / scale)
    found = logistic(seen, train, unseen, classes + 1, 0.3)
    assert (found[:, -1] == -np.inf).all()  # a class that only the test set has
    found = found[:, :-1]
    found -= np.log(np.exp(found).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("standardise", [True, False])
def test_logistic_equals_scikit_learns_within_a_tenth_of_a_point(standardise, monkeypatch):
    """On scikit-learn's 1,797 digits, in tiles of 256 rows of which the last is not full."""
    monkeypatch.setattr(linear_probe, "CHUNK", 256)
    datasets = pytest.importorskip("sklearn.datasets")
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    rows, labels = datasets.load_digits(return_X_y=True)
    rows /= 16
    order = np.random.default_rng(0).permutation(len(labels))
    seen, held = order[:700], order[700:]
    mean, std = rows[seen].mean(0), rows[seen].std(0)
    scaled = (rows - mean) / np.where(std > 1e-6, std, 1) if standardise else rows
    for cost in (1e-3, 1e-1):
        found = logistic(
            rows[seen].astype("f"), labels[seen], rows[held], 10, cost, standardise=standardise
        )
        model = LogisticRegression(C=cost, max_iter=1000, tol=1e-6)
        with threadpool_limits(1):  # more threads wait for each other on a busy machine
            model.fit(scaled[seen], labels[seen])
        expected = model.score(scaled[held], labels[held])
        assert np.mean(found.argmax(1) == labels[held]) == pytest.approx(expected, abs=1e-3)


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


@pytest.mark.parametrize("preset", ["clip_lite", "protoclip"])
def test_sgd_equals_its_definition(preset):
    recipe = _SGD[preset]._replace(batch=16, epochs=4, decay=0.01 * (preset == "protoclip"))
    seen, train = draw(4, 40, 3, 1.0)
    probes = list(sgd(seen.astype(np.float32), train, 3, recipe))
    assert len(probes) == 4
    zeros = np.zeros((4, 8), np.float32)
    (first,) = sgd(zeros, np.zeros(4, int), 3, recipe._replace(epochs=1, decay=0.0))
    kernel, bias = (
        np.asarray(first.kernel),
        np.zeros(3),
    )  # rows of zeros leave the initial kernel unchanged
    assert 0.005 < kernel.std() < 0.02
    rng, speeds, places = np.random.default_rng(0), [0 * kernel, 0 * bias], []
    for step in range(12):  # 4 epochs of 3 batches
        if step % 3 == 0:
            order = np.arange(40) if preset == "protoclip" else rng.permutation(40)
            filled = order if preset == "protoclip" else np.concatenate([order, order[:8]])
            places = np.split(filled, [16, 32])
            turn = step / 12
        x, y = seen[places[step % 3]], train[places[step % 3]]
        p = np.exp(x @ kernel + bias)
        error = (p / p.sum(1, keepdims=True) - np.eye(3)[y]) / len(y)
        slopes = x.T @ error + recipe.decay * kernel, error.sum(0) + recipe.decay * bias
        speeds = [0.9 * v + g for v, g in zip(speeds, slopes)]
        turn = turn if preset == "protoclip" else step / 12
        rate = recipe.rate / 2 * (1 + np.cos(np.pi * turn))
        kernel, bias = kernel - rate * speeds[0], bias - rate * speeds[1]
    np.testing.assert_allclose(probes[-1].kernel, kernel, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(probes[-1].bias, bias, rtol=1e-3, atol=1e-4)


def test_the_best_epoch_is_reported_beside_the_last(monkeypatch):
    kernels = [np.eye(2), -np.eye(2)]
    given = []

    def probes(features, labels, classes, recipe):
        given.append(recipe.epochs)
        yield from (linear_probe.Probe(kernel, np.zeros(2)) for kernel in kernels)

    monkeypatch.setattr(linear_probe, "sgd", probes)
    examples = Examples([0, 1])
    encode = Encode("raw", np.eye(2))
    found = LinearProbe(examples, examples, "protoclip", epochs=2)(encode)
    assert given == [2] and (found["top1"], found["best_on_test"]) == (0, 1)


def test_equal_scores_are_never_right():
    scores, labels = np.array([[1.0, 1, 0], [2, 1, 0], [np.nan] * 3]), np.array([0, 0, 0])
    assert accuracies(scores, labels) == {
        "top1": pytest.approx(1 / 3),
        "mean_per_class": pytest.approx(1 / 3),
    }
    more = np.concatenate([scores, np.tile([1.0, 1, 0], (3, 1)).T[:, :3]], axis=1)
    assert accuracies(more, labels)["top5"] == pytest.approx(2 / 3)


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
        LinearProbe(test, train)(Encode("backbone", np.eye(2), np.eye(2)))
    assert said in str(error.value)


@pytest.mark.parametrize(
    "key, value", [("epochs", 0), ("batch_size", 0), ("costs", [-1.0]), ("preset", "svm")]
)
def test_config_errors_come_before_any_example_is_read(key, value):
    with pytest.raises(ConfigError) as error:
        bind(LinearProbe, {key: value}, examples=None, train_examples=None)
    assert key in str(error.value)
