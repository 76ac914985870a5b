"""What a comparison measured, as rows, and the sizes at which `clipx.bench --against` measures."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any, NamedTuple, Self

OURS = "clipx"

Overrides = tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table: what each side took, in every turn.

    unit: seconds and memory, of which less is better, or a rate, of which more is ("images/s").
    """

    section: str
    name: str
    unit: str
    sides: dict[str, list[float]]
    missing: dict[str, str] = dataclasses.field(default_factory=dict)  # why a side has no numbers
    versions: dict[str, str] = dataclasses.field(default_factory=dict)  # of the sides' libraries

    def median(self, side: str) -> float:
        return statistics.median(self.sides[side])

    def ratios(self, peer: str) -> list[float]:
        """clipx's numbers over the peer's, turn by turn."""
        return [a / b for a, b in zip(self.sides[OURS], self.sides[peer]) if b]

    def ratio(self, peer: str) -> float | None:
        """The median of `ratios`; None without numbers of the peer."""
        ratios = self.ratios(peer) if peer in self.sides else []
        return statistics.median(ratios) if ratios else None

    @classmethod
    def of(cls, values: dict[str, Any]) -> Self:
        """The row that `dataclasses.asdict` made `values` of."""
        return cls(**values)


class Step(NamedTuple):
    """A training step to time."""

    name: str
    config: str
    overrides: Overrides
    turns: int = 1
    each: int = 1  # steps of a turn


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    steps: tuple[Step, ...]
    losses: tuple[tuple[int, int, int], ...]  # rows, turns, losses of a turn
    loss_width: int
    kmeans: tuple[tuple[int, int, int, int, int], ...]  # rows, width, k, iterations, turns
    feed: tuple[int, int, int]  # rounds, examples of a round, pictures
    start: Step
    starts: int  # starts of each kind
    growth: Step
    batches: tuple[int, ...]
    processes: tuple[int, ...]


def batch(rows: int) -> Overrides:
    """The override that sets the batch size."""
    return (("train.batch_size", str(rows)),)


# ViT-B/32 and RN50 as published, in a batch and a precision that suit a CPU
_FLOAT32 = (("image.dtype", "float32"), ("text.dtype", "float32"))
# pictures that need no download, for the commands that train
SHAPES = (
    ("data", "{'source': 'shapes', 'image_size': 64}"),
    *(("tokenizer.vocab_size", "256"), ("tokenizer.sample", "4000")),
)
FULL = Sizes(
    steps=(
        Step("`small`, batch 128", "clip:small", (), 9, 8),
        Step("`medium`, batch 128", "clip:medium", (), 5, 3),
        Step("ViT-B/32, batch 16", "clip", (*batch(16), *_FLOAT32), 5, 1),
        Step("RN50, batch 8", "clip:rn50", (*batch(8), *_FLOAT32), 5, 1),
    ),
    losses=((1024, 7, 20), (4096, 5, 2), (16384, 3, 1)),
    loss_width=512,
    kmeans=((100_000, 128, 2000, 10, 3), (100_000, 512, 2000, 10, 2)),
    feed=(5, 1280, 256),
    start=Step("`small`", "clip:small", SHAPES),
    starts=3,
    growth=Step("`small`", "clip:small", (), 3, 4),
    batches=(32, 64, 128, 256),
    processes=(1, 2),
)
_TINY = (
    *(("image.image_size", "32"), ("image.width", "16"), ("image.depth", "1")),
    *(("text.width", "16"), ("text.depth", "1"), ("text.heads", "2"), ("image.heads", "2")),
    *(("image.embed_dim", "8"), ("text.embed_dim", "8"), *batch(8)),
)
TINY = Sizes(
    steps=(Step("tiny, batch 8", "clip:small", (*_TINY, ("tokenizer.vocab_size", "128")), 2),),
    losses=((64, 2, 1),),
    loss_width=8,
    kmeans=((500, 8, 10, 2, 2),),
    feed=(1, 64, 64),
    start=Step("tiny", "clip:small", (*SHAPES, *_TINY)),
    starts=1,
    growth=Step("tiny", "clip:small", (*_TINY, ("tokenizer.vocab_size", "128"))),
    batches=(16,),  # its half, for the processes, is split over as many devices as tests have
    processes=(1, 2),
)
SIZES = {"full": FULL, "tiny": TINY}
