from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from clipx.config.binding import bind
from clipx.data.pictures import Pictures
from clipx.errors import ConfigError, DataError
from clipx.evaluators.voc import Voc, fit
from clipx.types import Encoded

svm = pytest.importorskip("sklearn.svm")
average_precision_score = pytest.importorskip("sklearn.metrics").average_precision_score


def write(folder, labels: dict[str, dict[str, list[int]]], values: dict[str, list]):
    """Writes a VOCdevkit of one-colour pictures. `values` are their red and green."""
    lists, images = folder / "VOC2007/ImageSets/Main", folder / "VOC2007/JPEGImages"
    lists.mkdir(parents=True)
    images.mkdir()
    for part, start in (("trainval", 0), ("test", 5000)):
        ids = [f"{start + i:06}" for i in range(len(values[part]))]
        (lists / f"{part}.txt").write_text(
            "\n".join(ids) + "\n"
        )  # this list has no class in its name
        for name, value in zip(ids, values[part]):
            Image.new("RGB", (24, 16), (*value, 0)).save(images / f"{name}.jpg", quality=100)
        for name, by_part in labels.items():
            lines = [f"{i} {label:2d}\n" for i, label in zip(ids, by_part[part])]
            (lists / f"{name}_{part}.txt").write_text("".join(lines))
    return folder


class Encode:
    """The `backbone` output is the picture's mean red and green; only its direction matters."""

    def __init__(self):
        self.seen = []

    def image(self, pictures, fields=()):
        assert fields == ("backbone",)
        self.seen.append(pictures.shape)
        return Encoded(backbone=np.round(pictures.mean((1, 2))[:, :2]))


def on_arc(angles):
    return [(round(200 * np.cos(a)), round(200 * np.sin(a))) for a in np.radians(angles)]


# Red pictures show a "dog", green ones a "cat", more clearly the nearer to 0 or 90 degrees.
TRAIN = on_arc([2, 5, 8, 11, 14, 75, 78, 81, 84, 87])
LABELS = {
    "cat": {"trainval": [-1] * 5 + [1] * 5, "test": [1, 0, -1, 1, -1]},
    "dog": {"trainval": [1] * 5 + [-1] * 5, "test": [-1, -1, 0, 1, 1]},
}
TEST = on_arc([60, 80, 50, 40, 20])  # by angle: cat's [difficult, yes, no, yes, no]


def test_average_precision_leaves_out_what_is_difficult(tmp_path):
    write(tmp_path, LABELS, {"trainval": TRAIN, "test": TEST})
    encode = Encode()
    found = Voc(Pictures(16), str(tmp_path), batch_size=4, per_class=True)(encode)
    # Cats rank yes, no, yes, no once the difficult one at the top is gone; dogs yes, yes, no, no.
    cat = (1 + 2 / 3) / 2
    assert found == pytest.approx({"mAP": (cat + 1) / 2, "class/cat": cat, "class/dog": 1})
    assert encode.seen == [(4, 16, 16, 3)] * 2 + [(2, 16, 16, 3), (4, 16, 16, 3), (1, 16, 16, 3)]


def folds(there):
    """Three folds as (train, held-out) rows. Fold k holds out the k-th third of the positives and
    of the negatives, in row order."""
    fold = np.empty(len(there), int)
    for rows in (np.flatnonzero(there), np.flatnonzero(~there)):
        for k, third in enumerate(np.array_split(rows, 3)):
            fold[third] = k
    return [(np.flatnonzero(fold != k), np.flatnonzero(fold == k)) for k in range(3)]


def test_the_cost_is_chosen_as_the_protocol_says():
    rng = np.random.default_rng(0)
    there = np.repeat([False, True, False], [15, 9, 15])
    features = rng.normal(size=(39, 12)) + 0.6 * there[:, None]
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    means, svms = {}, {}
    for cost in (0.01, 0.1, 1.0, 10.0):
        probe = svm.LinearSVC(
            C=cost, dual=True, class_weight={True: 2}, max_iter=2000, random_state=1
        )
        precision = []
        for train, held in folds(there):
            scores = probe.fit(features[train], there[train]).decision_function(features[held])
            precision.append(average_precision_score(there[held], scores))
        means[cost] = np.mean(precision)
        svms[cost] = probe.fit(features, there).decision_function(features)
    best = max(means, key=means.get)
    assert sorted(means.values())[-1] > sorted(means.values())[-2]  # else the choice is not tested
    found = fit(features, there, (10.0, 0.1, 1.0, 0.01))
    assert found.get_params()["C"] == best
    np.testing.assert_allclose(found.decision_function(features), svms[best], atol=1e-2)


def test_of_equal_costs_the_smallest_is_taken():
    there = np.arange(12) % 2 == 0
    features = np.stack([there, ~there], axis=1).astype(np.float32)
    assert fit(features, there, (1.0, 10.0, 0.1)).C == 0.1


def test_what_is_difficult_is_a_negative_in_training(tmp_path):
    # Five difficult cats are at angles between the other cats and the dogs. As negatives in
    # training they score below 0; as positives, or left out, they would not.
    train = TRAIN + on_arc([60, 61, 62, 63, 64])
    labels = {"cat": {"trainval": LABELS["cat"]["trainval"] + [0] * 5, "test": [1, -1]}}
    write(tmp_path, labels, {"trainval": train, "test": on_arc([85, 62])})
    voc, encode = Voc(Pictures(16), str(tmp_path), costs=(10.0,)), Encode()
    split = voc._splits()[0]
    fitted = fit(voc._features(encode, split), split.labels["cat"] == 1, (10.0,))
    score = fitted.decision_function(voc._features(encode, split))
    assert (score[5:10] > 0).all() and (score[10:] < 0).all()
    assert voc(encode) == {"mAP": 1}


def test_a_model_that_diverged_gets_the_share_of_positives(tmp_path):
    class Broken:
        def image(self, pictures, fields=()):
            return Encoded(backbone=np.full((len(pictures), 3), np.nan))

    write(tmp_path, LABELS, {"trainval": TRAIN, "test": TEST})
    found = Voc(Pictures(16), str(tmp_path), per_class=True)(Broken())
    assert (found["class/cat"], found["class/dog"]) == pytest.approx((1 / 2, 1 / 2))


def test_a_missing_folder_list_or_picture_says_what_is_expected_where(tmp_path):
    with pytest.raises(ConfigError) as error:
        Voc(Pictures(16), str(tmp_path / "none"))
    assert f"no *_trainval.txt in {tmp_path}/none/VOC2007/ImageSets/Main" in str(error.value)
    assert "VOC2007/JPEGImages/<id>.jpg" in str(error.value)
    write(tmp_path, LABELS, {"trainval": TRAIN, "test": TEST})
    (tmp_path / "VOC2007/JPEGImages/005001.jpg").unlink()
    with pytest.raises(DataError, match="005001.jpg"):
        Voc(Pictures(16), str(tmp_path))(Encode())
    (tmp_path / "VOC2007/ImageSets/Main/dog_test.txt").unlink()
    with pytest.raises(ConfigError, match="dog_test.txt"):
        Voc(Pictures(16), str(tmp_path))


@pytest.mark.parametrize(
    "file, text, said",
    [
        ("cat_trainval.txt", "000000 1 1\n", "'000000 1 1'"),
        ("dog_trainval.txt", "000001 1\n", "other pictures in"),
        ("dog_test.txt", None, "no picture of test with class 'dog'"),
        ("cat_trainval.txt", None, "0 of 10 pictures of trainval with class 'cat'"),
    ],
)
def test_wrong_lists(tmp_path, file, text, said):
    write(tmp_path, LABELS, {"trainval": TRAIN, "test": TEST})
    path = tmp_path / "VOC2007/ImageSets/Main" / file
    path.write_text(text or path.read_text().replace(" 1\n", " 0\n"))
    with pytest.raises(ConfigError) as error:
        Voc(Pictures(16), str(tmp_path))
    assert said in str(error.value)


@pytest.mark.parametrize("key, value", [("costs", []), ("costs", [0, 1]), ("batch_size", 0)])
def test_config_errors_come_before_any_file_is_read(key, value):
    with pytest.raises(ConfigError, match=f"voc.{key}"):
        bind(Voc, {"path": "no/such", key: value}, where="voc", pictures=None)


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"\[eval\]"):
        bind(Voc, {"path": "no/such"}, pictures=None)
