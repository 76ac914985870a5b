"""Evaluations and programs with a bar, or a line each ten seconds, of how far they are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

import jax

from clipx.data import threads
from clipx.evaluators.base import Evaluator, evaluate_all
from clipx.training.encode import Encode


def evaluated(evaluators: Mapping[str, Evaluator], encode: Encode) -> dict[str, float]:
    """`evaluate_all`, of which it is shown how many rows of each eval are encoded."""
    results: dict[str, float] = {}
    for name, evaluator in evaluators.items():
        rows = sum(n for what, n in evaluator.sizes().items() if what != "classes")
        options = {"total": rows or None, "silent": jax.process_index() != 0}
        with threads.shown(f"evaluating {name}", _since(encode), **options):
            results |= evaluate_all({name: evaluator}, encode)
    return results


def _since(encode: Encode) -> Callable[[], int]:
    """The number of rows that are encoded from now on."""
    before = encode.done
    return lambda: encode.done - before


def working(what: str) -> contextlib.AbstractContextManager[None]:
    """Context of something that tells nothing of itself: shows the time that it has taken."""
    return threads.shown(what, silent=jax.process_index() != 0)
