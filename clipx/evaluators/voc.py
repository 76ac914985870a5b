"""VOC07 classification: one linear SVM per class on frozen features (Goyal et al. 2019)."""

from __future__ import annotations

import dataclasses
import pathlib
import warnings
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from clipx.config import reading
from clipx.config.ranges import Count, Positive
from clipx.errors import ConfigError
from clipx.evaluators.base import Encode, Evaluator, Pictures, need_scikit_learn, rows_of, unit
from clipx.types import Metric

_FOLDS = 3
_TREE = (
    "the folder VOCdevkit, with VOC2007/ImageSets/Main/<class>_trainval.txt and <class>_test.txt "
    "and VOC2007/JPEGImages/<id>.jpg"
)
_FIX = "unpack VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar in one folder"


class Split(NamedTuple):
    ids: tuple[str, ...]
    labels: dict[str, Int[np.ndarray, " n"]]  # by class: 1 yes, -1 no, 0 only "difficult" objects


@dataclasses.dataclass(frozen=True)
class Voc(Evaluator):
    """`mAP` between 0 and 1: the mean over classes of the average precision on VOC2007's test set.

    path: the folder VOCdevkit, with trainval and test unpacked in it.
    costs: candidates for the SVM's C. The best mean average precision over 3 folds of trainval
    wins, the smallest C of equally good ones.
    per_class: also report `class/<name>` for every class.

    The protocol is voc_clf.py of VirTex and CLIP-Lite. Features are the `backbone` output in
    evaluation mode, divided by their length. The SVM is scikit-learn's LinearSVC in its dual form,
    with positives weighted 2 to 1. A picture in which all objects of the class are "difficult" is a
    negative in training and is left out of the test. The average precision is the step integral
    over all recalls, not VOC's own 11 points.
    """

    metrics = {
        "mAP": Metric("more", "percent"),
        "class/*": Metric("more", "percent", detail=True),
    }

    pictures: Pictures
    path: str
    costs: tuple[Positive, ...] = (0.01, 0.1, 1.0, 10.0)
    batch_size: Count = 256
    per_class: bool = False

    def __post_init__(self):
        if not self.costs:
            raise ConfigError("voc.costs", "none", "at least one number")
        need_scikit_learn("voc")
        if self.pictures is not None:
            self._splits()

    def __call__(self, encode: Encode) -> dict[str, float]:
        from sklearn.metrics import average_precision_score

        train, test = self._splits()
        train_rows, test_rows = (self._features(encode, split) for split in (train, test))
        precision = {}
        for name in train.labels:
            svm = fit(train_rows, train.labels[name] == 1, self.costs)
            clear = test.labels[name] != 0
            scores = svm.decision_function(test_rows[clear])
            precision[name] = average_precision_score(test.labels[name][clear] == 1, scores)
        result = {"mAP": float(np.mean(list(precision.values())))}
        if self.per_class:
            result |= {f"class/{name}": float(value) for name, value in precision.items()}
        return result

    def _features(self, encode: Encode, split: Split) -> Float[np.ndarray, "n c"]:
        files = [self._folder / "JPEGImages" / f"{name}.jpg" for name in split.ids]
        return unit(rows_of(encode.image, self.pictures(files, self.batch_size), "backbone"))

    @property
    def _folder(self) -> pathlib.Path:
        return pathlib.Path(self.path).expanduser() / "VOC2007"

    def _splits(self) -> tuple[Split, Split]:
        """Trainval and test. Raises `ConfigError` for a missing file, and for a class with too few
        pictures to train or test on."""
        lists = self._folder / "ImageSets" / "Main"
        classes = sorted(
            file.name[: -len("_trainval.txt")] for file in lists.glob("*_trainval.txt")
        )
        if not classes:
            raise ConfigError("voc.path", f"no *_trainval.txt in {lists}", _TREE, _FIX)
        if not (self._folder / "JPEGImages").is_dir():
            raise ConfigError("voc.path", f"no folder {self._folder / 'JPEGImages'}", _TREE, _FIX)
        train, test = (_read(lists, classes, part) for part in ("trainval", "test"))
        for name in classes:
            positives = int((train.labels[name] == 1).sum())
            if min(positives, len(train.ids) - positives) < _FOLDS:
                raise ConfigError(
                    "voc.path",
                    f"{positives} of {len(train.ids)} pictures of trainval with class {name!r}",
                    f"at least {_FOLDS} with it and {_FOLDS} without it",
                )
            if not (test.labels[name] == 1).any():
                raise ConfigError(
                    "voc.path", f"no picture of test with class {name!r}", "at least one picture"
                )
        return train, test


def _read(lists: pathlib.Path, classes: list[str], part: str) -> Split:
    """The split `part`, "trainval" or "test". All classes must list the same pictures."""
    ids: tuple[str, ...] = ()
    labels = {}
    for name in classes:
        file = lists / f"{name}_{part}.txt"
        try:
            rows = [line.split() for line in reading.read_text(file).splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError("voc.path", f"{file} ({reason})", _TREE, _FIX) from None
        for row in rows:
            if len(row) != 2 or row[1] not in ("-1", "0", "1"):
                raise ConfigError(
                    "voc.path", f"{file} with a line {' '.join(row)!r}", "<id> and -1, 0 or 1"
                )
        listed = tuple(row[0] for row in rows)
        if (ids or listed) != listed:
            raise ConfigError(
                "voc.path", f"other pictures in {file} than for {classes[0]}", "the same pictures"
            )
        ids, labels[name] = listed, np.array([int(row[1]) for row in rows], int)
    return Split(ids, labels)


def fit(
    features: Float[np.ndarray, "n c"], positive: Bool[np.ndarray, " n"], costs: tuple[float, ...]
) -> Any:
    """The SVM of one class, trained on all rows. Its C has the best mean average precision over 3
    stratified, unshuffled folds."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    targets, folds = np.where(positive, 1, -1), StratifiedKFold(_FOLDS)
    with warnings.catch_warnings():  # the protocol stops at 2,000 iterations, converged or not
        warnings.simplefilter("ignore", ConvergenceWarning)
        best, best_cost = -np.inf, 0.0
        for cost in sorted(costs):
            scores = cross_val_score(
                _svm(cost), features, targets, cv=folds, scoring="average_precision"
            )
            if scores.mean() > best:
                best, best_cost = scores.mean(), cost
        return _svm(best_cost).fit(features, targets)


def _svm(cost: float) -> Any:
    from sklearn.svm import LinearSVC

    return LinearSVC(
        C=cost,
        class_weight={1: 2, -1: 1},
        penalty="l2",
        loss="squared_hinge",
        # newer versions of scikit-learn would choose the primal form by default
        dual=True,  # pyright: ignore[reportArgumentType]
        max_iter=2000,
        random_state=0,
    )
