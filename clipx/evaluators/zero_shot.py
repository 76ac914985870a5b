"""Zero-shot classification: a class is the text of its name (Radford et al. 2021, §3.1)."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import numpy as np
from jaxtyping import Float, Int

from clipx.config.ranges import Count
from clipx.errors import ConfigError
from clipx.evaluators.base import (
    ACCURACIES,
    Encode,
    Evaluator,
    Examples,
    chance_of,
    labels_of,
    unit,
)
from clipx.evaluators.class_names import by_label, check_names, refuse_ids
from clipx.evaluators.prompts import SETS, braces, check, names, published
from clipx.types import Encoded, Metric

TEMPLATES = ("a photo of a {}.",)
_UNKNOWN = (
    "ids outside ImageNet's 1,000 classes need WordNet 3.0 (apt install wordnet-base), or set the "
    "names: classes=FILE with one name a line, or data.names=FILE with {folder: name}"
)


@dataclasses.dataclass(frozen=True)
class ZeroShot(Evaluator):
    """Accuracies between 0 and 1: `top1`, `top5` (with more than five classes), `mean_per_class`.

    classes: the class names, in the order of the labels; () uses the data set's own. The data set's
    names in another order are put in its order. A string is a file, or "openai_imagenet".
    templates: sentences with {} where the class name goes, or {c}, as CLIP_benchmark writes. A
    string is a file, or "openai_imagenet" (80) or "simple" (7). These named lists are read from an
    installed open_clip.
    A file has one entry a line, or is a JSON list. `FILE.json#cifar10` is the list of that key, in
    a file of many lists such as CLIP_benchmark's.
    preset: one of CLIP's and ProtoCLIP's ten data sets. Names and templates must then be OpenAI's,
    which is checked by count and hash. Those that `classes` and `templates` leave at their defaults
    are read from an installed open_clip for "imagenet", and for other presets from `lists`; without
    `lists`, the data set's own names may pass the check. Whether the labels follow the order of the
    names cannot be checked.
    lists: a copy of github.com/openai/CLIP/blob/main/data/prompts.md. It lacks the names of
    "birdsnap", which are the 491 that ProtoCLIP selects.
    per_class: also report `class/<name>` for every class that has a picture.

    Ties are broken at random, and accuracies are expectations over the ties. So a model that
    encodes everything alike gets exactly chance, and two classes of one name (OpenAI's ImageNet
    list has two such pairs) get half each. `mean_per_class` is over the classes that have a
    picture.

    Several templates form one classifier. If the method compares unit embeddings alone, a class is
    the mean of its templates' unit embeddings, normalised again. For any other similarity (FILIP's
    over tokens, a critic's) the templates' scores are averaged, because rows of tokens have no mean
    (Yao et al. 2022, §3.3).
    """

    metrics = ACCURACIES | {"class/*": Metric("more", "percent", detail=True)}
    task = "zeroshot_classification"
    needs = "labels"

    examples: Examples
    classes: tuple[str, ...] | str = ()
    templates: tuple[str, ...] | str = TEMPLATES
    batch_size: Count = 256
    per_class: bool = False
    preset: Literal[*SETS] | None = None  # pyright: ignore[reportInvalidTypeForm]
    lists: str = ""

    def __post_init__(self):
        if self.lists and self.preset in (None, "imagenet"):
            raise ConfigError(
                "zero_shot.lists", repr(self.lists), "a preset that reads lists, or no lists"
            )
        check_templates(self._templates, "zero_shot.templates")
        if self.examples is None:
            self._classes()
        else:
            self._class_names()

    def __call__(self, encode: Encode) -> dict[str, float]:
        classes = self._class_names()
        labels = self._labels(len(classes))
        members = ensemble(encode.text, classes, self._templates, self.batch_size)
        hits, start = [], 0
        for pictures in self.examples.batches(self.batch_size):
            batch_labels = labels[start : (start := start + len(pictures))]
            images = encode.image(pictures)
            scores = np.asarray(sum(encode.similarity(images, m) for m in members) / len(members))
            hits.append([_right(scores, batch_labels, k) for k in (1, 5)])
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

    def notes(self) -> list[str]:
        classes, templates = self._class_names(), self._templates
        places = dict.fromkeys((0, len(classes) // 2, len(classes) - 1))
        prompts = [
            templates[i % len(templates)].replace("{}", classes[c]) for i, c in enumerate(places)
        ]
        return [
            f"prompts of {len(classes):,} classes x {len(templates)} template(s), such as "
            + ", ".join(map(repr, prompts))
        ]

    def sizes(self) -> dict[str, int]:
        return {**super().sizes(), "classes": len(self._class_names())}

    def chance(self) -> dict[str, float]:
        return chance_of(len(self._class_names()))

    @functools.cached_property  # of the file that the config names, or of an installed open_clip
    def _templates(self) -> tuple[str, ...]:
        templates = ()
        if self.preset and self.templates == TEMPLATES:
            templates = published(self.preset, "templates", self.lists, "zero_shot")
        templates = templates or names(self.templates, "templates", "zero_shot")
        if not templates:
            raise ConfigError("zero_shot.templates", "none", "at least one, such as '{}'")
        if self.preset:
            check(self.preset, "templates", templates, "zero_shot")
        return templates

    def _classes(self) -> tuple[str, ...]:
        """The class names; () if none are known, as before the data set is open."""
        classes = self._given
        if self.examples is not None:
            classes = classes or tuple(self.examples.classes)
        if self.preset and classes:
            check(self.preset, "classes", classes, "zero_shot")
        return classes

    @functools.cached_property
    def _given(self) -> tuple[str, ...]:
        """The class names of the config; () if it has none."""
        classes = names(self.classes, "classes", "zero_shot")
        if self.preset and not classes:
            classes = published(self.preset, "classes", self.lists, "zero_shot")
        check_names(classes, "zero_shot.classes")
        if classes:
            _check_count(len(classes))
        fix = "leave classes out: folders and labels named by these ids get ImageNet's names"
        refuse_ids(classes, "zero_shot.classes", fix)
        return classes

    def _class_names(self) -> tuple[str, ...]:
        """`_classes`, in the order of the labels. Raises `ConfigError` if there are none, and for
        names that the data set cannot have."""
        classes, own = self._classes(), tuple(self.examples.classes)
        if not classes:
            raise ConfigError(
                "zero_shot.classes",
                "none, and the data set names none either",
                "one name for each label",
                "set classes to the names, or to a text file with one name a line",
            )
        if not self._given:
            check_names(classes, "zero_shot.classes")
            refuse_ids(classes, "zero_shot.classes", _UNKNOWN)
        return by_label(classes, own, "zero_shot.classes") if own else classes

    def _labels(self, n_classes: int) -> Int[np.ndarray, " n"]:
        labels = labels_of(
            self.examples, "zero_shot.examples", "for a set of captions use the eval `retrieval`"
        )
        _check_count(n_classes)
        for row, label in enumerate(labels):
            if not 0 <= label < n_classes:
                raise ConfigError(
                    "zero_shot.classes",
                    f"{n_classes} names, and row {row} with label {label}",
                    f"a label from 0 to {n_classes - 1}",
                )
        return labels


def _check_count(classes: int) -> None:
    """Raises `ConfigError` for a single class."""
    if classes < 2:
        expected = "at least two: every picture is of the only class"
        raise ConfigError("zero_shot.classes", "one class", expected)


def check_templates(templates: Sequence[str], where: str) -> None:
    """Raises `ConfigError` at `where` for a template without {} or {c}, and for one with other
    braces, which would go to the model as they are."""
    for template in templates:
        plain = braces(template)
        if "{}" in plain and not re.search(r"\{[^{}]+\}", plain):
            continue
        fixed = re.sub(r"\{[^{}]*\}", "{}", plain)
        if "{}" not in fixed:
            fixed = re.sub(r"%s|<[^<>]*>", "{}", fixed)
        if "{}" not in fixed:
            fixed = fixed.rstrip(". ") + " {}."
        raise ConfigError(
            where,
            repr(template),
            "a sentence with {} where the class name goes",
            f"for example {fixed!r}",
        )


def ensemble(
    encode: Callable[[Sequence[str]], Encoded],
    classes: Sequence[str],
    templates: Sequence[str],
    size: int,
) -> list[Encoded]:
    """The encoded classes, one `Encoded` per member of the ensemble, whose scores are averaged. One
    member if the method compares unit embeddings alone, else one per template."""
    members = []
    for template in templates:
        prompts = [braces(template).replace("{}", name) for name in classes]
        encoded = [encode(prompts[i : i + size]) for i in range(0, len(prompts), size)]
        members.append(jax.tree.map(lambda *rows: np.concatenate(rows), *encoded))
    if any(m.unit is None or len(jax.tree.leaves(m)) > 1 for m in members):
        return members
    rows = [unit(np.asarray(m.unit)) for m in members]
    mean = unit(np.asarray(sum(rows)))
    return [Encoded(unit=mean)]  # pyright: ignore[reportArgumentType]


def _right(
    scores: Float[np.ndarray, "n c"], labels: Int[np.ndarray, " n"], k: int
) -> Float[np.ndarray, " n"]:
    """The probability that the right class is among the first k, with ties in random order. NaN
    compares as a tie."""
    right = scores[np.arange(len(labels)), labels][:, None]
    above = np.sum(scores > right, axis=1)
    equal = np.sum(~(right > scores), axis=1) - above  # includes the right class
    return np.clip((k - above) / equal, 0, 1)
