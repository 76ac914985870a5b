"""Zero-shot classification: a class is its name in a few sentences (Radford et al. 2021, §3.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import numpy as np
from jaxtyping import Float, Int

from clipx.errors import ConfigError
from clipx.evaluators.base import ACCURACIES, Encode, Evaluator, Examples, labels_of, unit
from clipx.evaluators.prompts import SETS, check, names, published
from clipx.types import Encoded, Metric

TEMPLATES = ("a photo of a {}.",)


@dataclasses.dataclass(frozen=True)
class ZeroShot(Evaluator):
    """Accuracies between 0 and 1: `top1`, `top5` (with more than five classes), `mean_per_class`.

    classes: the names, in the order of the labels; () takes the set's own. A string is a text file
    with one name a line, or "openai_imagenet".
    templates: sentences with {} where the name goes; a string is a text file with one a line, or
    "openai_imagenet" (80) or "simple" (7). The named lists are read from an installed open_clip.
    preset: one of CLIP's and ProtoCLIP's ten sets, whose names and templates must then be OpenAI's:
    counts and hashes are checked. What `classes` and `templates` leave at their defaults is read
    from an installed open_clip for "imagenet", and for the others from `lists`, a copy of
    github.com/openai/CLIP/blob/main/data/prompts.md; without it the set's own names may do. That
    labels count in the order of the names cannot be checked. The names of "birdsnap" are those 491
    that ProtoCLIP selects, which are not in that file.
    per_class: also one `class/<name>` for every class that has a picture.

    Equal scores stand in random order, and the accuracies are the expectation over it: a model that
    says the same of everything gets exactly chance, and of two classes with one name (OpenAI's
    ImageNet list has two such pairs) each gets half. `mean_per_class` is over the classes that have
    a picture.

    Several templates are one classifier: where the method compares unit rows alone, the mean of a
    class's unit rows, normalised again; for any other similarity (FILIP's over tokens, a critic's)
    the mean of the templates' scores, as rows of tokens have no mean (Yao et al. 2022, §3.3).
    """

    metrics = ACCURACIES | {"class/*": Metric("more", "percent", detail=True)}
    task = "zeroshot_classification"

    examples: Examples
    classes: tuple[str, ...] | str = ()
    templates: tuple[str, ...] | str = TEMPLATES
    batch_size: int = 256
    per_class: bool = False
    preset: Literal[*SETS] | None = None
    lists: str = ""

    def __post_init__(self):
        if self.batch_size < 1:
            raise ConfigError("zero_shot.batch_size", str(self.batch_size), "at least 1")
        if self.lists and self.preset in (None, "imagenet"):
            raise ConfigError(
                "zero_shot.lists", repr(self.lists), "a preset that is in that file, or no lists"
            )
        check_templates(self._templates(), "zero_shot.templates")
        self._classes()

    def __call__(self, encode: Encode) -> dict[str, float]:
        classes = self._class_names()
        labels = self._labels(len(classes))
        members = ensemble(encode.text, classes, self._templates(), self.batch_size)
        hits, start = [], 0
        for pictures in self.examples.batches(self.batch_size):
            own = labels[start : (start := start + len(pictures))]
            images = encode.image(pictures)
            scores = sum(encode.similarity(images, m) for m in members) / len(members)
            hits.append([_right(scores, own, k) for k in (1, 5)])
        top1, top5 = np.concatenate(hits, axis=1)
        count = np.bincount(labels, minlength=len(classes))
        right = np.bincount(labels, weights=top1, minlength=len(classes))
        seen = np.flatnonzero(count)
        accuracy = right[seen] / count[seen]
        result = {"top1": float(top1.mean()), "mean_per_class": float(accuracy.mean())}
        if len(classes) > 5:
            result["top5"] = float(top5.mean())
        if self.per_class:
            result |= {f"class/{classes[c]}": float(a) for c, a in zip(seen, accuracy)}
        return result

    def _templates(self) -> tuple[str, ...]:
        found = ()
        if self.preset and self.templates == TEMPLATES:
            found = published(self.preset, "templates", self.lists, "zero_shot")
        found = found or names(self.templates, "templates", "zero_shot")
        if not found:
            raise ConfigError("zero_shot.templates", "none", "at least one, such as '{}'")
        if self.preset:
            check(self.preset, "templates", found, "zero_shot")
        return found

    def _classes(self) -> tuple[str, ...]:
        """The names, (): none. Before the set is open, its own are not known."""
        found = names(self.classes, "classes", "zero_shot")
        if self.preset and not found:
            found = published(self.preset, "classes", self.lists, "zero_shot")
        if self.examples is not None:
            found = found or tuple(self.examples.classes)
        if self.preset and found:
            check(self.preset, "classes", found, "zero_shot")
        return found

    def _class_names(self) -> tuple[str, ...]:
        classes, own = self._classes(), tuple(self.examples.classes)
        if not classes:
            raise ConfigError(
                "zero_shot.classes",
                "none, and the data set names none either",
                "one name for each label",
                "set classes to the names, or to a text file with one a line",
            )
        if own and len(own) != len(classes):
            raise ConfigError(
                "zero_shot.classes",
                f"{len(classes)} names",
                f"{len(own)}, as many as the data set has classes",
            )
        return classes

    def _labels(self, n_classes: int) -> Int[np.ndarray, " n"]:
        labels = labels_of(
            self.examples, "zero_shot.examples", "a set of captions is what `retrieval` scores"
        )
        for row, label in enumerate(labels):
            if not 0 <= label < n_classes:
                raise ConfigError(
                    "zero_shot.classes",
                    f"{n_classes} names, and row {row} with label {label}",
                    f"a label from 0 to {n_classes - 1}",
                )
        return labels


def check_templates(templates: Sequence[str], where: str) -> None:
    """Raises `ConfigError` at `where` for a template without {}."""
    for template in templates:
        if "{}" not in template:
            raise ConfigError(
                where,
                repr(template),
                "a sentence with {} where the class name goes",
                f"for example {template.rstrip('. ') + ' {}.'!r}",
            )


def ensemble(
    encode: Callable[[Sequence[str]], Encoded],
    classes: Sequence[str],
    templates: Sequence[str],
    size: int,
) -> list[Encoded]:
    """The classes as texts, `size` at a time: one `Encoded` for each member of the ensemble, whose
    scores the caller averages. The rows of an `Encoded` are the classes in their order."""
    members = []
    for template in templates:
        prompts = [template.replace("{}", name) for name in classes]
        parts = [encode(prompts[i : i + size]) for i in range(0, len(prompts), size)]
        members.append(jax.tree.map(lambda *rows: np.concatenate(rows), *parts))
    if any(m.unit is None or len(jax.tree.leaves(m)) > 1 for m in members):
        return members
    mean = unit(sum(unit(m.unit) for m in members))
    return [Encoded(unit=mean)]


def _right(
    scores: Float[np.ndarray, "n c"], labels: Int[np.ndarray, " n"], k: int
) -> Float[np.ndarray, " n"]:
    """The probability that the right class is among the first k, equal scores in random order.
    A NaN compares as equal."""
    own = scores[np.arange(len(labels)), labels][:, None]
    above = np.sum(scores > own, axis=1)
    equal = np.sum(~(own > scores), axis=1) - above  # the right class among them
    return np.clip((k - above) / equal, 0, 1)
