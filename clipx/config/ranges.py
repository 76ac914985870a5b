"""The range of every number that a config may set, declared in the type of its field.

`batch_size: Count` is an `int` to a type checker. `bind` reads the range from the declaration and
refuses every other number, NaN and infinity among them. The docs' key reference prints it.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

INT = 2**31 - 1  # the most that an int32 holds: steps, rows and sizes are stored as one
LONG = 2**63 - 1
HUGE, TINY = 1_000_000, 1e-30  # float32 holds the squares of HUGE, and the inverse of TINY
_CEILINGS = (INT, LONG, HUGE)  # not worth a word, unless a value is above


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers from `least` to `most`, and those in `also`."""

    least: float
    most: float
    above: bool = False  # without `least` itself
    below: bool = False  # without `most` itself
    also: tuple[float, ...] = ()

    def __contains__(self, number: float) -> bool:
        if number in self.also:
            return True
        low = number > self.least if self.above else number >= self.least
        return low and (number < self.most if self.below else number <= self.most)

    def __str__(self) -> str:
        if self.most in _CEILINGS:
            return "a number" if self.least == -self.most else self._low()
        if self.above or self.below or self.least == TINY:
            return f"{self._low()} and {self._high()}"
        return f"{self._also()}from {self.least:,} to {self.most:,}"

    def _also(self) -> str:
        return "".join(f"{number:,}, or " for number in self.also)

    def _low(self) -> str:
        if self.above or self.least == TINY:
            return f"{self._also()}more than {0 if self.least == TINY else self.least:,}"
        return f"{self._also()}at least {self.least:,}"

    def _high(self) -> str:
        return f"{'less than' if self.below else 'at most'} {self.most:,}"

    def refuses(self, number: float) -> str:
        """What was expected in place of `number`; "" for a number of the range."""
        if number in self:
            return ""
        if self.least == TINY and 0 < number < TINY:
            return f"at least {TINY}"
        if self.most < 1000 or number != number:
            return str(self)
        return self._high() if number > self.most else self._low()


@dataclasses.dataclass(frozen=True)
class Ordered:
    """A pair whose first number is at most its second."""

    def __str__(self) -> str:
        return "the smaller number first"

    def refuses(self, pair: tuple[float, float]) -> str:
        """What was expected in place of `pair`; "" for an ordered one."""
        return "" if pair[0] <= pair[1] else str(self)


Rule = Range | Ordered


def rules(annotated: Any) -> tuple[Rule, ...]:
    """The rules of an `Annotated` type, without what other libraries annotate."""
    return tuple(rule for rule in annotated.__metadata__ if isinstance(rule, (Range, Ordered)))


# whole numbers
Count = Annotated[int, Range(1, INT)]
CountOrZero = Annotated[int, Range(0, INT)]
LongCount = Annotated[int, Range(0, LONG)]  # of examples
Seed = Annotated[int, Range(0, 2**32 - 1)]  # JAX's keys keep 32 bits
BatchSize = Annotated[int, Range(1, 2**24)]
Pixels = Annotated[int, Range(1, 2**14)]  # of a picture's side
Width = Annotated[int, Range(1, 2**16)]  # channels of a layer
WidthOrZero = Annotated[int, Range(0, 2**16)]
Depth = Annotated[int, Range(1, 1000)]  # layers, or blocks
Tokens = Annotated[int, Range(3, 2**16)]  # of a text: a mark at either end
# other numbers
Number = Annotated[float, Range(-HUGE, HUGE)]
Positive = Annotated[float, Range(TINY, HUGE)]
NonNegative = Annotated[float, Range(0, HUGE)]
Fraction = Annotated[float, Range(0, 1)]  # also a probability
Share = Annotated[float, Range(0, 1, above=True)]  # some of a whole
Rate = Annotated[float, Range(0, 1, below=True)]  # of dropout, of an average
LearningRate = Annotated[float, Range(0, 1000)]
Temperature = Annotated[float, Range(1e-4, 1000)]  # that a softmax divides by
MaskRate = Annotated[float, Range(0, 1, above=True, below=True)]  # some of a whole, not all
Epsilon = Annotated[float, Range(TINY, 1)]  # of a norm
Ratio = Annotated[float, Range(TINY, 100)]  # of two widths
LogScale = Annotated[float, Range(-20, 20)]  # a logarithm
# pairs and triples
Crop = Annotated[tuple[Share, Share], Ordered()]  # least and most share of a picture's area
Rgb = tuple[Fraction, Fraction, Fraction]  # of pixels from 0 to 1
Deviation = Annotated[float, Range(0.001, 1)]
RgbDeviation = tuple[Deviation, Deviation, Deviation]
