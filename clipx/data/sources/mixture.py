"""A weighted mixture of sources."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

import numpy as np

from clipx.config import binding
from clipx.data.base import Example, Source
from clipx.errors import BadSample, ConfigError, DataError

_MOST_ROWS = 2**31 - 1  # a batch holds rows as int32


@dataclasses.dataclass(frozen=True)
class Mixture(Source):
    """Rows of several sources, as often as their weights say, each at least once an epoch.

    A part's share of the rows drawn is its weight over the sum of weights; without any weight, each
    row of each part is drawn once. The mixture is as long
    as that needs: the part that is rarest for its size has each row once, and every other part has
    its rows repeated, equally often but for one. So with parts of 100 and 1000 rows at equal
    weights there are 2000 places, in which each row of the first part stands ten times. `row` and
    `key` say the example, and are the same wherever it is repeated. `classes` are those of the
    parts if they have the same; if not, there are none, and no labels.
    """

    parts: dict[str, dict[str, Any]]  # by name: a source, its keys, and a weight or none anywhere

    def __post_init__(self):
        sources, weights = [], []
        for name, (cls, values, weight) in _check(self.parts, "Mixture.parts").items():
            try:
                source = cls(**values)
            except DataError as error:
                # advice on what to set is for a part's own keys
                told = str(error).replace("--config.data.", f"--config.data.parts.{name}.")
                raise DataError(f"part {name}: {told}") from None
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
        places = [math.ceil(rounds[rarest] * weight) for weight in weights]
        if sum(places) > _MOST_ROWS:
            name = list(self.parts)[rarest]
            raise DataError(
                f"part {name}: its {sizes[rarest]:,} rows at weight {float(weights[rarest]):g} of "
                f"{float(sum(weights)):g} make an epoch of {sum(places):,} rows, expected at most "
                f"{_MOST_ROWS:,}; raise that weight, or lower the others"
            )
        same = len({source.classes for source in sources}) == 1
        for name, value in (
            ("classes", sources[0].classes if same else ()),
            ("_labelled", same),
            ("_sources", tuple(sources)),
            ("_names", tuple(self.parts)),
            ("_offsets", np.cumsum([0, *sizes[:-1]])),  # the first row of each part
            ("_starts", np.cumsum([0, *places])),  # its first place, and the end
        ):
            object.__setattr__(self, name, value)

    @classmethod
    def check_section(cls, values: Mapping[str, Any], where: str) -> None:
        """Raises `ConfigError` for a part whose source, keys or weight are wrong; opens nothing."""
        _check(values["parts"], f"{where}.parts")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, row: int) -> Example:
        if not 0 <= row < len(self):
            raise IndexError(row)
        part = int(np.searchsorted(self._starts, row, side="right")) - 1
        source, name = self._sources[part], self._names[part]
        # spread evenly: a remainder that goes to the first rows would favour one end of the part
        place, places = row - int(self._starts[part]), int(np.diff(self._starts)[part])
        try:
            example = source[place * len(source) // places]
        except BadSample as error:
            raise BadSample(f"{name}/{error.key}", error.reason) from None
        return example._replace(
            row=int(self._offsets[part]) + example.row,
            key=f"{name}/{example.key}",
            label=example.label if self._labelled else None,
        )

    def keys(self) -> Iterator[str]:
        for name, source, places in zip(self._names, self._sources, np.diff(self._starts).tolist()):
            size, begin = len(source), 0
            for row, key in enumerate(source.keys(), 1):
                end = -(-row * places // size)  # the first place of the next row
                for _ in range(begin, end):
                    yield f"{name}/{key}"
                begin = end


def _check(
    parts: Mapping[str, Mapping[str, Any]], where: str
) -> dict[str, tuple[type, dict[str, Any], Fraction | None]]:
    """Of each part its source's class, the values of its keys and its weight."""
    if not parts:
        raise ConfigError(where, "nothing", "at least one part: a name, and a section with source")
    found = {}
    for name, section in parts.items():
        own = f"{where}.{name}"
        if "/" in name or not name:
            raise ConfigError(own, repr(name), "a name without a slash: keys are <part>/<key>")
        section = dict(section)
        source, weight = section.pop("source", ""), section.pop("weight", None)
        try:
            cls = binding.find("data.sources", source, Source)
        except ConfigError as error:
            error.where = f"{own}.source"
            raise
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if weight is None:
            weighted = [other for other, s in parts.items() if s.get("weight") is not None]
            if weighted:
                others = ", ".join(weighted)
                raise ConfigError(f"{own}.weight", f"none, beside that of {others}", "all or none")
        elif not number or not math.isfinite(weight) or weight <= 0:
            raise ConfigError(f"{own}.weight", repr(weight), "a number above 0")
        values = binding.check(cls, section, where=own, beside=("source", "weight"))
        if hasattr(cls, "check_section"):
            cls.check_section(values, own)
        # of the number as it is written, so that 0.7 and 0.3 are seven to three
        found[name] = cls, values, None if weight is None else Fraction(repr(weight))
    return found
