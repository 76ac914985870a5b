"""Lengths of training, in steps, examples or epochs."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any, Literal

from clipx.config.ranges import INT
from clipx.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Duration:
    """A length of training in exactly one unit: "steps", "examples" or "epochs"."""

    unit: str
    amount: float
    where: str  # the config key that sets it

    def steps(self, *, batch_size: int, rows: int | None) -> int | None:
        """The length in steps; None if the unit is epochs and `rows` is None.

        An epoch is rows // batch_size steps: rows that do not fill a batch wait for another epoch.
        Raises `ConfigError` for less than one batch, and for more steps than an int32 counts.
        """
        steps = self._steps(batch_size, rows)
        if steps is not None and steps > INT:
            raise ConfigError(self.where, f"{steps:,} steps", f"at most {INT:,} steps")
        return steps

    def spelled(self, steps: int, *, batch_size: int, rows: int | None) -> str:
        """At most `steps` steps, in this length's unit, as a config spells it."""
        if self.unit == "steps":
            return str(steps)
        if self.unit == "examples":
            return str(steps * batch_size)
        assert rows is not None  # a length in epochs was counted in steps
        return f"{math.floor(1e3 * steps / max(rows // batch_size, 1)) / 1e3:g}"

    def _steps(self, batch_size: int, rows: int | None) -> int | None:
        """`steps`, however many there are."""
        if self.unit == "steps":
            return int(self.amount)
        if self.unit == "examples":
            if 0 < self.amount < batch_size:
                raise ConfigError(
                    self.where,
                    f"{self.amount} examples",
                    f"at least one batch of {batch_size} examples, or 0",
                )
            return int(self.amount // batch_size)
        if rows is None:
            return None
        if rows < batch_size:
            raise ConfigError(
                self.where,
                f"{rows} rows of data",
                f"at least one batch of {batch_size} rows",
                "a smaller config.train.batch_size, or more data",
            )
        return int(round(self.amount * (rows // batch_size)))


UNITS = ("steps", "epochs", "examples")
_LENGTHS = ("train.total", "optimizer.warmup")  # the keys of a config without their unit


def others(path: str) -> list[str]:
    """The keys that set the same length as the key `path` of a config in other units; none for a
    key that sets no length."""
    name, _, unit = path.rpartition("_")
    if name not in _LENGTHS or unit not in UNITS:
        return []
    return [f"{name}_{other}" for other in UNITS if other != unit]


@typing.overload
def duration(
    values: Mapping[str, Any], name: str, *, where: str, optional: Literal[False] = False
) -> Duration: ...
@typing.overload
def duration(
    values: Mapping[str, Any], name: str, *, where: str, optional: Literal[True]
) -> Duration | None: ...
def duration(
    values: Mapping[str, Any], name: str, *, where: str, optional: bool = False
) -> Duration | None:
    """The length that one of `<name>_steps`, `<name>_epochs`, `<name>_examples` of `values` sets.

    Raises `ConfigError` unless exactly one is set. With `optional`, returns None if none is set.
    """
    keys = [f"{name}_{unit}" for unit in UNITS]
    amounts = {u: values.get(k) for u, k in zip(UNITS, keys) if values.get(k) is not None}
    if optional and not amounts:
        return None
    if len(amounts) != 1:
        shown = ", ".join(f"{name}_{u}={v}" for u, v in amounts.items()) or "none of them"
        fix = "set the others to None" if amounts else f"set {where}.{keys[0]}"
        raise ConfigError(f"{where}.{name}_*", shown, "exactly one of " + ", ".join(keys), fix)
    ((unit, amount),) = amounts.items()
    assert amount is not None  # those are left out above
    return Duration(unit, amount, f"{where}.{name}_{unit}")
