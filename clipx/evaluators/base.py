"""What evaluators have in common: how they encode, what they read, and how they score."""

from __future__ import annotations

import fnmatch
import importlib.util
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from clipx.config import reading
from clipx.errors import ConfigError, install_hint
from clipx.types import Encoded, Metric

_LARGEST = 1 << 30  # bytes of a file of annotations

ACCURACIES = {  # the metrics of `accuracies`
    "top1": Metric("more", "percent", column="top-1", benchmark="acc1"),
    "top5": Metric("more", "percent", benchmark="acc5"),
    "mean_per_class": Metric("more", "percent", benchmark="mean_per_class_recall"),
}


class Encode(Protocol):
    """Both towers at fixed parameters. Results are NumPy arrays and are the same on any mesh."""

    def image(self, pictures: np.ndarray, fields: tuple[str, ...] = ()) -> Encoded:
        """Encodes uint8 pictures [n, h, w, 3]. Only `fields` of `Encoded` are filled; () means the
        fields that `similarity` needs."""
        ...

    def text(self, texts: Sequence[str], fields: tuple[str, ...] = ()) -> Encoded:
        """Encodes strings, tokenised as in training. `fields` as in `image`."""
        ...

    def similarity(
        self, images: Encoded, texts: Encoded, query: Literal["image", "text"] = "image"
    ) -> np.ndarray:
        """Scores [i, t], float32; a higher score means a better match. Only their order and, within
        one method, their differences mean anything. `query` is the side that picks: a method may
        score the two directions differently, and then only scores of one image, or of one text, are
        comparable."""
        ...

    def heat(self, pictures: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """Grad-CAM of the score of each picture [n, h, w, 3] with its own text: float32 [n, i, j]
        on the grid of the last convolutions, at least 0. Raises `ConfigError` for a tower without
        convolutions."""
        ...


class Examples(Protocol):
    """An evaluation set: decoded, resized and centre-cropped pictures, in row order. A bad example
    raises; nothing is skipped."""

    classes: tuple[str, ...]

    def __len__(self) -> int: ...

    def texts(self, row: int) -> tuple[str, ...]:
        """The captions of one row, read without decoding its picture if the source can."""
        ...

    def label(self, row: int) -> int | None: ...

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """Batches of uint8 pictures [n, h, w, 3]. n = size, except in the last batch."""
        ...


class Pictures(Protocol):
    """Reads picture files by path, for evaluators with folders of their own. A file that is missing
    or not a picture raises; nothing is skipped."""

    image_size: int

    def __call__(self, paths: Sequence[str | os.PathLike], size: int) -> Iterator[np.ndarray]:
        """Batches of uint8 pictures [n, h, w, 3]. n = size, except in the last batch. Each picture
        is made a square of `image_size` as `frame` says."""
        ...

    def sizes(self, paths: Sequence[str | os.PathLike]) -> list[tuple[int, int]]:
        """Width and height in pixels of each file, as stored on disk."""
        ...

    def frame(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Of a picture of `size` (width, height): (width and height to which it is resized, left
        and top of the square that is cut out of it)."""
        ...


@runtime_checkable
class Evaluator(Protocol):
    """A frozen dataclass that computes metrics of a model from its `encode`, never its trainer.

    If it has fields named `examples`, `train_examples` or `pictures`, the run fills them. Its other
    fields are its config keys. Each file has one subclass, and the file's name is its config name.

    An evaluator is built twice. The first time, to check its config section, the run passes None
    for the fields that it fills. The second time, when the data opens, the evaluator should check
    folders and annotations.

    metrics: what each returned number means, by name. A name may be an `fnmatch` pattern for a
    family of numbers, such as "class/*". An exact name wins over patterns, then the first pattern.
    task: the protocol's name in CLIP_benchmark; "" if it has none there.
    pairs: whether `examples` are pictures with captions, as training data is. Where the path of
    their source is empty, the run holds rows of its training data out for them.
    needs: what its examples must have beside pictures; "" if some of them may lack it.
    """

    metrics: ClassVar[Mapping[str, Metric]] = {}
    task: ClassVar[str] = ""
    pairs: ClassVar[bool] = False
    needs: ClassVar[Literal["", "captions", "labels"]] = ""

    def __call__(self, encode: Encode) -> dict[str, float]: ...

    def notes(self) -> list[str]:
        """What to say before the first evaluation, in lines: how the data set was understood."""
        return []

    def sizes(self) -> dict[str, int]:
        """What the open evaluator counts its metrics over, such as {"pictures": 1000}."""
        examples = getattr(self, "examples", None)
        return {} if examples is None else {"pictures": len(examples)}

    def chance(self) -> dict[str, float]:
        """The metrics, by name, of a model that tells nothing apart. Those are left out for which
        no number is known."""
        return {}


def declared(metrics: Mapping[str, Metric], name: str) -> str | None:
    """The key of `metrics` for `name`: the name itself, or the first pattern that matches; None
    without either."""
    if name in metrics:
        return name
    return next((key for key in metrics if fnmatch.fnmatchcase(name, key)), None)


def evaluate_all(evaluators: Mapping[str, Evaluator], encode: Encode) -> dict[str, float]:
    """All metrics of all evaluators, run in turn, by `<eval>/<metric>`. Exceptions pass through."""
    return {
        f"{name}/{metric}": float(value)
        for name, evaluator in evaluators.items()
        for metric, value in evaluator(encode).items()
    }


def rows_of(
    encode: Callable[..., Encoded], batches: Iterable[Sequence | np.ndarray], field: str
) -> Float[np.ndarray, "n c"]:
    """One field of `Encoded` for all rows, float32. NaN and infinity become 0, so that a diverged
    model scores like one that encodes everything alike."""
    encoded = [getattr(encode(batch, (field,)), field) for batch in batches]
    return np.nan_to_num(np.concatenate(encoded).astype(np.float32), posinf=0, neginf=0)


def unit(rows: Float[np.ndarray, "n c"]) -> Float[np.ndarray, "n c"]:
    """The rows scaled to length 1; rows of zeros stay zeros."""
    length = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.where(length, length, 1)


def captions_of(
    examples: Examples, where: str, *, most: int | None = None
) -> tuple[list[str], Int[np.ndarray, " t"]]:
    """All captions, at most the first `most` of each row, and the row that each belongs to. Raises
    `ConfigError` for a row without a caption and for an empty data set."""
    texts_of_rows = [examples.texts(row)[:most] for row in range(len(examples))]
    if not texts_of_rows:
        raise ConfigError(where, "an empty data set", "at least one example")
    counts = [len(texts) for texts in texts_of_rows]
    if 0 in counts:
        raise ConfigError(
            where,
            f"row {counts.index(0)} without a caption",
            "at least one caption for every row",
            "for a data set of class labels use the eval `zero_shot`",
        )
    rows = np.repeat(np.arange(len(counts)), counts)
    return [text for texts in texts_of_rows for text in texts], rows


def labels_of(examples: Examples, where: str, fix: str = "") -> np.ndarray:
    """The label of every row. Raises `ConfigError` for a row without a label and for an empty data
    set."""
    labels = [examples.label(row) for row in range(len(examples))]
    if not labels:
        raise ConfigError(where, "an empty data set", "at least one example")
    for row, label in enumerate(labels):
        if label is None:
            raise ConfigError(where, f"row {row} without a label", "a label for every row", fix)
    return np.asarray(labels)


def split_labels(
    train: Examples, test: Examples, where: str
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " m"]]:
    """The labels of the training set and of the test set. Raises `ConfigError` if their classes
    differ, for a row without a label, for an empty set, and for a single class to train on."""
    names = train.classes, test.classes
    if all(names) and tuple(names[0]) != tuple(names[1]):
        first = next((pair for pair in zip(*names) if pair[0] != pair[1]), ("", ""))
        raise ConfigError(
            f"{where}.train_examples",
            f"{len(names[0])} classes, and {len(names[1])} in the test set"
            + (f", the first to differ {first[0]!r} and {first[1]!r}" if any(first) else ""),
            "the classes of the test set, in the same order",
        )
    train_labels = labels_of(train, f"{where}.train_examples")
    if len(np.unique(train_labels)) < 2:
        raise ConfigError(f"{where}.train_examples", "one class", "at least two")
    return train_labels, labels_of(test, f"{where}.examples")


def accuracies(scores: Float[np.ndarray, "n c"], labels: Int[np.ndarray, " n"]) -> dict[str, float]:
    """`top1`, `top5` (with more than five classes) and `mean_per_class` (over the classes that have
    a row), between 0 and 1. A class that ties with the right one is ranked before it."""
    right = scores[np.arange(len(labels)), labels][:, None]
    rank = np.sum(~(scores < right), axis=1)
    metrics = {"top1": float(np.mean(rank <= 1))}
    if scores.shape[1] > 5:
        metrics["top5"] = float(np.mean(rank <= 5))
    recalls = [np.mean(rank[labels == label] <= 1) for label in np.unique(labels)]
    return metrics | {"mean_per_class": float(np.mean(recalls))}


def chance_of(classes: int) -> dict[str, float]:
    """The `accuracies` of a guess among so many classes; {} if their number is not known."""
    if not classes:
        return {}
    top5 = {"top5": 5 / classes} if classes > 5 else {}
    return {"top1": 1 / classes, **top5, "mean_per_class": 1 / classes}


def read_entries(path: str, where: str, keys: dict[str, type]) -> list[dict[str, Any]]:
    """The entries of a JSON file that holds a list of objects, each with at least `keys`. Raises
    `ConfigError` for a file that is missing or has another layout."""
    layout = ", ".join(f'"{key}": {kind.__name__}' for key, kind in keys.items())
    wanted = f"a JSON file: a list of {{{layout}}}"
    try:
        entries = reading.read_json(pathlib.Path(path).expanduser(), most=_LARGEST)
    except (OSError, ValueError) as error:  # ValueError: not JSON or not UTF-8
        reason = getattr(error, "strerror", None) or f"not JSON: {error}"
        raise ConfigError(where, f"{path!r} ({reason})", wanted) from None
    if not isinstance(entries, list) or not entries:
        raise ConfigError(where, f"{path!r}, which is not a list with entries", wanted)
    for index, entry in enumerate(entries):
        for key, kind in keys.items():
            if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
                value = entry.get(key, "nothing") if isinstance(entry, dict) else entry
                fault = f"entry {index} of {path!r} has {value!r} for {key!r}"
                raise ConfigError(where, fault, wanted)
    return entries


def need_scikit_learn(where: str) -> None:
    """Raises `ConfigError` if scikit-learn, which some protocols are defined by, is missing."""
    if importlib.util.find_spec("sklearn") is None:
        raise ConfigError(
            where,
            "no scikit-learn in this environment",
            "scikit-learn, which the protocol is defined by",
            install_hint("eval"),
        )
