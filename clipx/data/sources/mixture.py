"""A weighted mixture of sources."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any

import numpy as np

from clipx.config import binding
from clipx.data.base import Account, Example, Guess, Source
from clipx.data.limits import Limits
from clipx.errors import BadSample, ConfigError, DataError, in_section

_MOST_ROWS = 2**31 - 1  # batches store row ids as int32


@dataclasses.dataclass(frozen=True)
class Mixture(Source):
    """Rows of several sources in proportion to their weights; every row at least once per epoch.

    The share of a part among the rows of an epoch is its weight over the sum of the weights.
    Without weights, every row occurs once. Otherwise the part with the most rows per weight has
    each row once, and the rows of the other parts are repeated, with counts that differ by at most
    one within a part. For example, parts of 100 and 1000 rows at equal weights make an epoch of
    2000 rows, in which each row of the first part occurs ten times.

    Repetitions of an example have the same `row` and `key`. If all parts have the same `classes`,
    the mixture has them too; if not, it has no classes and no labels.
    """

    # by name: the section of a source, with its `weight`; either all parts have a weight or none
    parts: dict[str, dict[str, Any]]

    def __post_init__(self) -> None:
        self._labelled: bool
        self._sources: tuple[Source, ...]
        self._names: tuple[str, ...]
        self._offsets: np.ndarray  # the row id of the first row of each part
        self._starts: np.ndarray  # the index of the first row of each part, then the length
        sources, weights = [], []
        for name, (cls, values, weight) in _check(self.parts, "Mixture.parts").items():
            try:
                source = cls(**values)
            except DataError as error:
                message = in_section(str(error), f"data.parts.{name}")
                raise DataError(f"part {name}: {message}") from None
            except ConfigError as error:
                error.where = f"part {name}: {error.where}"
                raise
            if not len(source):
                raise DataError(f"part {name}: no rows")
            sources.append(source)
            weights.append(weight or Fraction(len(source)))
        sizes = np.array([len(source) for source in sources], np.int64)
        rounds = [Fraction(len(s)) / weight for s, weight in zip(sources, weights)]
        rarest = max(range(len(rounds)), key=rounds.__getitem__)
        counts = [math.ceil(rounds[rarest] * weight) for weight in weights]  # rows per epoch
        if sum(counts) > _MOST_ROWS:
            name = list(self.parts)[rarest]
            raise DataError(
                f"part {name}: its {sizes[rarest]:,} rows at weight {float(weights[rarest]):g} of "
                f"{float(sum(weights)):g} make an epoch of {sum(counts):,} rows, expected at most "
                f"{_MOST_ROWS:,}; raise that weight, or lower the others"
            )
        same = len({source.classes for source in sources}) == 1
        for name, value in (  # the dataclass is frozen
            ("classes", sources[0].classes if same else ()),
            ("_labelled", same),
            ("_sources", tuple(sources)),
            ("_names", tuple(self.parts)),
            ("_offsets", np.cumsum([0, *sizes[:-1]])),
            ("_starts", np.cumsum([0, *counts])),
        ):
            object.__setattr__(self, name, value)

    @classmethod
    def check_section(cls, values: Mapping[str, Any], where: str) -> None:
        """Raises `ConfigError` if a part has a wrong source, key or weight. Opens no data."""
        _check(values["parts"], f"{where}.parts")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, row: int) -> Example:
        return self._example(row, operator.getitem)

    def glance(self, row: int) -> Example:
        return self._example(row, lambda source, inner: source.glance(inner))

    def _example(self, row: int, read: Callable[[Source, int], Example]) -> Example:
        """The example of a row, read from its part by a function of the source and its row."""
        if not 0 <= row < len(self):
            raise IndexError(row)
        part = int(np.searchsorted(self._starts, row, side="right")) - 1
        source, name = self._sources[part], self._names[part]
        # spread the extra repetitions evenly: else all of them would go to the part's first rows
        index, count = row - int(self._starts[part]), int(np.diff(self._starts)[part])
        try:
            example = read(source, index * len(source) // count)
        except BadSample as error:
            raise BadSample(f"{name}/{error.key}", error.reason) from None
        return example._replace(
            row=int(self._offsets[part]) + example.row,
            key=f"{name}/{example.key}",
            label=example.label if self._labelled else None,
        )

    def limit(self, limits: Limits) -> None:
        super().limit(limits)
        for source in self._sources:
            source.limit(limits)

    def keys(self) -> Iterator[str]:
        for name, source, count in zip(self._names, self._sources, np.diff(self._starts).tolist()):
            size, begin = len(source), 0
            for row, key in enumerate(source.keys(), 1):
                end = -(-row * count // size)  # the first index of the next row
                for _ in range(begin, end):
                    yield f"{name}/{key}"
                begin = end

    def account(self) -> Account | None:
        """The accounts of all parts that have one, added up. Reasons start with the part's name."""
        accounts = [(n, a) for n, s in zip(self._names, self._sources) if (a := s.account())]
        if not accounts:
            return None
        units = {account.unit for _, account in accounts}
        return Account(
            unit=units.pop() if len(units) == 1 else "items",
            found=sum(account.found for _, account in accounts),
            used=sum(account.used for _, account in accounts),
            skipped=tuple(
                skipped._replace(reason=f"part {name}: {skipped.reason}")
                for name, account in accounts
                for skipped in account.skipped
            ),
        )

    def guesses(self) -> tuple[Guess, ...]:
        return tuple(
            guess._replace(field=f"parts.{name}.{guess.field}")
            for name, source in zip(self._names, self._sources)
            for guess in source.guesses()
        )


def _check(
    parts: Mapping[str, Mapping[str, Any]], where: str
) -> dict[str, tuple[type, dict[str, Any], Fraction | None]]:
    """Returns (source class, values of its keys, weight) for each part."""
    if not parts:
        raise ConfigError(where, "nothing", "at least one part: a name, and a section with source")
    checked = {}
    for name, section in parts.items():
        here = f"{where}.{name}"
        if "/" in name or not name:
            expected = "a name without a slash, because the keys of rows are <part>/<key>"
            raise ConfigError(here, repr(name), expected)
        section = dict(section)
        source, weight = section.pop("source", ""), section.pop("weight", None)
        try:
            cls = binding.find("data.sources", source, Source)
        except ConfigError as error:
            error.where = f"{here}.source"
            raise
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if weight is None:
            weighted = [other for other, s in parts.items() if s.get("weight") is not None]
            if weighted:
                raise ConfigError(
                    f"{here}.weight",
                    f"no weight, but one in {', '.join(weighted)}",
                    "a weight in every part, or in none",
                )
        elif not number or not math.isfinite(weight) or weight <= 0:
            raise ConfigError(f"{here}.weight", repr(weight), "a number above 0")
        values = binding.check(cls, section, where=here, beside=("source", "weight"))
        if hasattr(cls, "check_section"):
            cls.check_section(values, here)
        # from the decimal digits, so that 0.7 and 0.3 are exactly 7 : 3
        checked[name] = cls, values, None if weight is None else Fraction(repr(weight))
    return checked
