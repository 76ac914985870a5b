"""What an evaluator sees of a run: a way to encode, and the examples it was given."""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from clipx.errors import ConfigError, install_hint
from clipx.types import Encoded, Metric

ACCURACIES = {  # what `accuracies` finds
    "top1": Metric("more", "percent", column="top-1", benchmark="acc1"),
    "top5": Metric("more", "percent", benchmark="acc5"),
    "mean_per_class": Metric("more", "percent", benchmark="mean_per_class_recall"),
}


class Encode(Protocol):
    """Both towers at fixed parameters. Rows come back as NumPy arrays, on any mesh the same."""

    def image(self, pictures: np.ndarray, fields: tuple[str, ...] = ()) -> Encoded:
        """Encodes uint8 pictures [n, h, w, 3]. `fields` of `Encoded` are filled; () means those
        that `similarity` needs."""

    def text(self, texts: Sequence[str], fields: tuple[str, ...] = ()) -> Encoded:
        """Encodes strings, tokenised as in training."""

    def similarity(self, images: Encoded, texts: Encoded) -> np.ndarray:
        """Scores [i, t], float32; higher is more alike. Only their order and, within one method,
        their differences mean anything."""

    def heat(self, pictures: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """Where each picture [n, h, w, 3] is like its own text: Grad-CAM of their score, float32
        [n, i, j] on the grid of the last convolutions, at least 0. `ConfigError` for a tower
        without convolutions."""


class Examples(Protocol):
    """An evaluation set: decoded, resized and centre-cropped, in the order of its rows. A bad
    example raises; nothing is skipped."""

    classes: tuple[str, ...]

    def __len__(self) -> int: ...

    def texts(self, row: int) -> tuple[str, ...]:
        """The captions of one row, read without decoding its picture where the source can."""

    def label(self, row: int) -> int | None: ...

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """uint8 pictures [n, h, w, 3], n = size but for the last."""


class Pictures(Protocol):
    """Picture files by their paths, for a protocol that brings folders of its own. A file that is
    not there or no picture raises; nothing is skipped."""

    image_size: int

    def __call__(self, paths: Sequence[str | os.PathLike], size: int) -> Iterator[np.ndarray]:
        """uint8 pictures [n, h, w, 3], n = size but for the last: each resized so that its shorter
        side is `image_size` and cut to the centre."""

    def sizes(self, paths: Sequence[str | os.PathLike]) -> list[tuple[int, int]]:
        """Width and height of each file, as it is on disk."""


@runtime_checkable
class Evaluator(Protocol):
    """A frozen dataclass: `examples`, `train_examples` and `pictures` are given, whichever of them
    are among its fields; its other fields are its config keys. One subclass a file; the file's name
    is the config's name. It knows `encode`, never the trainer.

    It is built twice: with None for what is given, to check its section, and when the data opens,
    which is the time to look at folders and annotations.

    metrics: what each number that it returns means, by name. A name may be a pattern of `fnmatch`
    that stands for a family, such as "class/*"; an exact name goes first, then the first pattern.
    task: the protocol's name in CLIP_benchmark; "" where that has none.
    """

    metrics: ClassVar[Mapping[str, Metric]] = {}
    task: ClassVar[str] = ""

    def __call__(self, encode: Encode) -> dict[str, float]: ...


def declared(metrics: Mapping[str, Metric], name: str) -> str | None:
    """The key of `metrics` that stands for `name`: its own, or the first pattern that matches."""
    if name in metrics:
        return name
    return next((key for key in metrics if fnmatch.fnmatchcase(name, key)), None)


def evaluate_all(evaluators: Mapping[str, Evaluator], encode: Encode) -> dict[str, float]:
    """What every evaluator finds, in turn, by `<eval>/<metric>`. What one raises is raised."""
    return {
        f"{name}/{metric}": float(value)
        for name, evaluator in evaluators.items()
        for metric, value in evaluator(encode).items()
    }


def rows_of(
    encode: Callable[..., Encoded], batches: Iterable[Sequence], field: str
) -> Float[np.ndarray, "n c"]:
    """One field of every row. What is not finite is 0: a model that diverged scores as one that
    says the same of everything."""
    parts = [getattr(encode(batch, (field,)), field) for batch in batches]
    return np.nan_to_num(np.concatenate(parts).astype(np.float32), posinf=0, neginf=0)


def unit(rows: Float[np.ndarray, "n c"]) -> Float[np.ndarray, "n c"]:
    """Rows of length 1; a row of zeros stays one."""
    length = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.where(length, length, 1)


def captions_of(
    examples: Examples, where: str, *, most: int | None = None
) -> tuple[list[str], Int[np.ndarray, " t"]]:
    """All captions, of each row the first `most`, and the row that each belongs to. Raises
    `ConfigError` for a row that has none, and for no rows."""
    own = [examples.texts(row)[:most] for row in range(len(examples))]
    if not own:
        raise ConfigError(where, "an empty data set", "at least one example")
    counts = [len(texts) for texts in own]
    if 0 in counts:
        raise ConfigError(
            where,
            f"row {counts.index(0)} without a caption",
            "at least one caption for every row",
            "a set of labels is what `zero_shot` scores",
        )
    return [text for texts in own for text in texts], np.repeat(np.arange(len(own)), counts)


def labels_of(examples: Examples, where: str, fix: str = "") -> np.ndarray:
    """The label of every row. Raises `ConfigError` for a row that has none, and for no rows."""
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
    """The labels of both sets. Raises `ConfigError` for other classes in one than in the other, a
    row without a label, no rows, and a single class to train on."""
    names = train.classes, test.classes
    if all(names) and tuple(names[0]) != tuple(names[1]):
        first = next((pair for pair in zip(*names) if pair[0] != pair[1]), ("", ""))
        raise ConfigError(
            f"{where}.train_examples",
            f"{len(names[0])} classes, where the test set has {len(names[1])}"
            + (f", the first to differ {first[0]!r} and {first[1]!r}" if any(first) else ""),
            "the classes of the test set, in its order",
        )
    seen = labels_of(train, f"{where}.train_examples")
    if len(np.unique(seen)) < 2:
        raise ConfigError(f"{where}.train_examples", "one class", "at least two")
    return seen, labels_of(test, f"{where}.examples")


def accuracies(scores: Float[np.ndarray, "n c"], labels: Int[np.ndarray, " n"]) -> dict[str, float]:
    """`top1`, `top5` with more than five classes, and `mean_per_class`, over the classes that have
    a row; each between 0 and 1. A class that scores the same as the right one is before it."""
    own = scores[np.arange(len(labels)), labels][:, None]
    place = np.sum(~(scores < own), axis=1)
    found = {"top1": float(np.mean(place <= 1))}
    if scores.shape[1] > 5:
        found["top5"] = float(np.mean(place <= 5))
    right = [np.mean(place[labels == label] <= 1) for label in np.unique(labels)]
    return found | {"mean_per_class": float(np.mean(right))}


def read_entries(path: str, where: str, keys: dict[str, type]) -> list[dict[str, Any]]:
    """The objects of a JSON file that holds a list of them, each with at least `keys`. Raises
    `ConfigError` for a file that is not there or is anything else."""
    layout = ", ".join(f'"{key}": {kind.__name__}' for key, kind in keys.items())
    wanted = f"a JSON file: a list of {{{layout}}}"
    try:
        entries = json.loads(pathlib.Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # no JSON and no UTF-8 are ValueErrors
        reason = getattr(error, "strerror", None) or f"no JSON: {error}"
        raise ConfigError(where, f"{path!r} ({reason})", wanted) from None
    if not isinstance(entries, list) or not entries:
        raise ConfigError(where, f"{path!r}, which is no list of anything", wanted)
    for place, entry in enumerate(entries):
        for key, kind in keys.items():
            if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
                value = entry.get(key, "nothing") if isinstance(entry, dict) else entry
                found = f"entry {place} of {path!r} has {value!r} for {key!r}"
                raise ConfigError(where, found, wanted)
    return entries


def need_scikit_learn(where: str) -> None:
    """Raises `ConfigError` where the library that a protocol names is not installed."""
    if importlib.util.find_spec("sklearn") is None:
        raise ConfigError(
            where,
            "no scikit-learn in this environment",
            "the library that the protocol is written in",
            install_hint("eval"),
        )
