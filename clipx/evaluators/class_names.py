"""Checks of class names: what cannot be one, and the order in which labels count them."""

from __future__ import annotations

import collections
import re
from collections.abc import Sequence

from clipx.errors import ConfigError

# Two classes of ImageNet have each of these names in OpenAI's list.
_TWICE = ("missile", "sunglasses")
_DIGITS = 10  # as many classes may be the digits
_ID = re.compile(r"\bn\d{8}\b")
_QUOTED = re.compile(r"""(["']).*\1\s*(,|:.*)?|\{.*|\[.*""")


def check_names(classes: Sequence[str], where: str) -> None:
    """Raises `ConfigError` for an entry that is no class name, and for a name of two classes."""
    for number, name in enumerate(classes):
        if not name.strip() or _QUOTED.fullmatch(name):
            raise ConfigError(
                where,
                f"entry {number} is {name!r}",
                "a plain name for each class, one a line, or a JSON list",
            )
    counts = collections.Counter(name.strip() for name in classes)
    for name, count in counts.items():
        if count > 1 and name not in _TWICE:
            both = [number for number, other in enumerate(classes) if other.strip() == name]
            raise ConfigError(
                where,
                f"{name!r} as entry {both[0]} and as entry {both[1]}",
                "a name of its own for each class: equal prompts cannot be told apart",
                "say in a word what tells them apart, such as 'crane bird' and 'crane machine'",
            )


def refuse_ids(classes: Sequence[str], where: str, fix: str) -> None:
    """Raises `ConfigError` for a name with a WordNet id, and for names that are all numbers, unless
    they can be digits."""
    ids = [name for name in classes if _ID.search(name)]
    numbers = len(classes) > _DIGITS and all(name.isdecimal() for name in classes)
    if ids or numbers:
        kind = "with a WordNet id" if ids else "that are numbers"
        raise ConfigError(
            where,
            f"{len(ids or classes)} of {len(classes)} class names {kind}, such as "
            f"{(ids or list(classes))[-1]!r}",
            "words, as captions have them",
            fix,
        )


def by_label(given: Sequence[str], own: Sequence[str], where: str) -> tuple[str, ...]:
    """The names `given`, in the order of the labels.

    own: the data set's own names, in the order of the labels. If `given` are the same names in
    another order, the result has the order of `own`; so it has if `own` are all numbers from 0 or
    1 on, which sort as 0, 1, 10, 11, 2. Names that differ in words, such as "tabby" for "tabby
    cat", count in the order given. Raises `ConfigError` for another number of names, and if some
    are own names of other labels, so that only some words differ and the order too.
    """
    if len(given) != len(own):
        raise ConfigError(
            where,
            f"{len(given)} names",
            f"{len(own)}, as many as the data set has classes: {_some(own)}",
            "leave it out to use the data set's own names",
        )
    if (numbers := _numbers(own)) is not None:
        return tuple(given[number] for number in numbers)
    keys, wanted = list(map(_plain, given)), list(map(_plain, own))
    labels = {key: label for label, key in enumerate(wanted)}
    moved = [
        i for i, (key, own_key) in enumerate(zip(keys, wanted)) if key != own_key and key in labels
    ]
    if not moved:
        return tuple(given)
    if sorted(keys) == sorted(wanted) and len(labels) == len(wanted):
        return tuple(name for _, name in sorted(zip(map(labels.__getitem__, keys), given)))
    first = moved[0]
    raise ConfigError(
        where,
        f"{given[first]!r} for label {first}, which the data set names {own[first]!r}; its label "
        f"{labels[keys[first]]} is named so",
        "names in the order of the labels",
        "leave it out to use the data set's own names, or put its names in their order",
    )


def _numbers(own: Sequence[str]) -> list[int] | None:
    """The index that each name is, if the names are the numbers from 0 or from 1 on."""
    if not all(name.isdecimal() and name.isascii() for name in own):
        return None
    numbers = [int(name) for name in own]
    first = min(numbers)
    whole = first in (0, 1) and sorted(numbers) == list(range(first, first + len(numbers)))
    return [number - first for number in numbers] if whole else None


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").replace("/", " ").lower().split())


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + ", ..." * (len(names) > 5)
