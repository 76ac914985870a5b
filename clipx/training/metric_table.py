"""What the metrics of a run mean. Training metrics are in the table here; evaluators declare their
own. Whatever shows or compares metrics calls `metric`."""

from __future__ import annotations

import contextlib
import functools
import math
import pkgutil
from collections.abc import Mapping, Sequence
from typing import Any

from clipx import evaluators
from clipx.config.binding import find
from clipx.errors import ConfigError
from clipx.evaluators.base import Evaluator, declared
from clipx.types import Curve, Metric

_LABELLINGS = ("image", "text", "external")
_LOSS = Curve("Loss", from_zero=False)
_PICKS = Curve("Rows that pick their own prototype")
_INERTIA = Curve("Inertia of a row", smooth=False)
_EMPTY = Curve("Empty clusters", smooth=False)

# In the order of the charts and of the console line. A name may be a pattern, as in `declared`.
TRAINING: Mapping[str, Metric] = {
    "loss": Metric("less", headline=True, curve=_LOSS),
    # the loss of a model whose outputs are the same for all rows
    "chance_loss": Metric(headline=True, curve=_LOSS._replace(level=True)),
    "batch/R@1": Metric("more", "percent", headline=True, curve=Curve("R@1 inside the batch")),
    "learning_rate": Metric(headline=True, curve=Curve("Learning rate", smooth=False)),
    "logit_scale": Metric(curve=Curve("Logit scale", from_zero=False, smooth=False)),
    "grad_norm": Metric(curve=Curve("Gradient norm")),
    "images_per_second": Metric("more", headline=True, curve=Curve("Images per second")),
    "data_wait_fraction": Metric("less", "percent", curve=Curve("Share of time")),
    "mfu": Metric("more", "percent", curve=Curve("Share of time")),
    # of unit embeddings: the mean squared distance from their mean; 0 once a tower has collapsed
    "batch/*_variance": Metric(curve=Curve("Variance of the embeddings")),
    "batch/modality_gap": Metric(curve=Curve("Modality gap")),
    **{
        f"batch/{rows}_from_{labels}": Metric("more", "percent", curve=_PICKS)
        for labels in _LABELLINGS
        for rows in ("image", "text")
        if rows != labels
    },
    **{f"clusters/{name}_inertia": Metric("less", curve=_INERTIA) for name in _LABELLINGS},
    **{f"clusters/{name}_empty": Metric("less", curve=_EMPTY) for name in _LABELLINGS},
    "clusters/equal_labels": Metric(
        shown="percent", curve=Curve("Rows whose labels are the same number", smooth=False)
    ),
    # the terms of a loss: each has a chart of its own, with its chance
    "loss/*": Metric("less", curve=Curve("Loss: *", from_zero=False)),
    "chance_loss/*": Metric(curve=Curve("Loss: *", from_zero=False, level=True)),
    "warnings": Metric("less"),  # that hold: see `training.watch`
    "batch/accuracy": Metric("more", "percent"),
    "batch/*R@1": Metric("more", "percent"),
    "batch/duplicate_captions": Metric(shown="percent"),
    "data/bad_fraction": Metric("less", "percent"),
    "episode/seconds": Metric("less"),
    "episode/share_of_time": Metric("less", "percent"),
}
# names that older clipx, and objectives written for it, give metrics
RENAMED = {"loss/chance": "chance_loss"}
HEADLINES = tuple(name for name, metric in TRAINING.items() if metric.headline)


def metric(key: str, evals: Mapping[str, Any]) -> Metric:
    """The declaration of a metric, by its key in metrics.jsonl.

    evals: the config's section, which names the evaluator of `<eval>/<metric>`. If that evaluator
    is unknown or declares no such metric, any evaluator that declares the metric is taken, because
    an old run's config may have lost the eval. A name that nobody declares gives `Metric()`.
    """
    eval_name, slash, name = key.partition("/")
    eval_name = eval_name.removesuffix("@average")  # of the averaged parameters
    evaluator = (evals.get(eval_name) or {}).get("evaluator") or eval_name
    if slash and (known := _of_evaluator(evaluator, name)):
        return known
    if pattern := declared(TRAINING, key):
        return TRAINING[pattern]
    names = sorted(module.name for module in pkgutil.iter_modules(evaluators.__path__))
    of_any = (_of_evaluator(evaluator, name) for evaluator in names)
    return next((known for known in of_any if known), Metric())


def best(metric: Metric, points: Sequence[tuple[int, float]]) -> tuple[int, float]:
    """The best of some points (step, value), the first one of equal values.

    A metric without a direction counts more as better. NaN and infinities count only if no value is
    finite.
    """
    finite = [point for point in points if math.isfinite(point[1])] or points
    return (min if metric.better == "less" else max)(finite, key=lambda point: point[1])


def short(value: float) -> str:
    """A number with about four digits."""
    return f"{value:,.0f}" if 1000 <= abs(value) < math.inf else f"{value:.4g}"


def spelled(metric: Metric, value: float) -> str:
    """A value of a metric as tables show it."""
    if metric.shown == "percent" and math.isfinite(value):
        return f"{100 * value:.1f} %"
    return short(value)


@functools.cache
def _of_evaluator(evaluator: str, name: str) -> Metric | None:
    """An evaluator's declaration of a metric. None if it declares no such metric, there is no such
    evaluator, or one of its libraries is missing."""

    with contextlib.suppress(ConfigError, ImportError):
        metrics = find("evaluators", evaluator, Evaluator).metrics
        if known := declared(metrics, name):
            return metrics[known]
    return None
