"""Pairs of the evals that a report shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from clipx.data.base import Source
from clipx.data.evaluation import EvaluationSet
from clipx.training.schema import EvalSpec

_LOOK = 32  # rows of an eval of which one must have a caption


class Pairs(NamedTuple):
    """All pictures of an eval, and their captions."""

    examples: EvaluationSet
    captions: Sequence[str]
    owner: Int[np.ndarray, " t"]  # the picture that each caption belongs to


def held_out_pairs(
    evals: Sequence[EvalSpec], image_size: int, held_out: Callable[[], Source]
) -> Pairs | None:
    """The pairs of the first eval that has examples with captions; None if none has. held_out: as
    for `EvalSpec.examples`."""
    for spec in evals:
        examples = spec.examples(image_size, held_out)
        if examples is None or not any(map(examples.texts, range(min(_LOOK, len(examples))))):
            continue
        captions = [(text, i) for i in range(len(examples)) for text in examples.texts(i)]
        return Pairs(examples, [text for text, _ in captions], np.array([i for _, i in captions]))
    return None
