"""Charts of the report, as inline SVG in the page's colours."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from clipx.errors import RunError
from clipx.evaluators.base import declared
from clipx.training.metric_table import TRAINING, metric
from clipx.types import Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = Sequence[tuple[int, float]]  # (step, value)
Places = Sequence[tuple[float, float]]  # (place on the horizontal axis, value)

COLOURS = ("#3d7fc1", "#d4802a", "#3c9a62", "#8b65c4", "#c8565b", "#2f9aa0", "#b3902f", "#868c95")
DASHED = "dashed"  # in place of a colour: the dashed line of a chart
_MOST = 800  # points drawn per curve, at most
_INK = "#010203"  # a placeholder, replaced by the page's text colour


class Figure(NamedTuple):
    """A drawing with its title and legend."""

    title: str
    svg: str
    legend: Sequence[tuple[str, str]] = ()  # (colour, or DASHED, name)


class Line(NamedTuple):
    """One curve of a chart."""

    name: str
    points: Places
    smooth: bool = True  # whether a running mean is drawn over many points
    dashed: bool = False  # what the other lines are compared with, in the text's colour
    colour: str = ""  # "": the next of `COLOURS`


def training(rows: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """The charts of the training metrics to which `TRAINING` gives a curve, in its order. rows: of
    metrics.jsonl."""
    by_name: dict[str | None, list[tuple[str, Points]]] = {}
    for key, points in series(rows).items():
        by_name.setdefault(declared(TRAINING, key), []).append((key, points))
    charts: dict[str, list[tuple[Metric, Line]]] = {}
    for name, known in TRAINING.items():
        if known.curve is None:
            continue
        for key, points in by_name.get(name, ()):
            title = known.curve.chart.replace("*", key.partition("/")[2])
            label = "chance" if known.curve.level else key
            line = Line(label, points, known.curve.smooth, known.curve.level)
            charts.setdefault(title, []).append((known, line))
    figures = (_of_training(title, drawn) for title, drawn in charts.items())
    return [figure for figure in figures if figure]


def _of_training(title: str, drawn: Sequence[tuple[Metric, Line]]) -> Figure | None:
    """One chart of training metrics; None if it has no lines."""
    lines = [line for _, line in drawn]
    if all(line.dashed for line in lines):
        return None
    if all(known.shown == "percent" for known, _ in drawn):
        title = f"{title}, %"
        lines = [line._replace(points=percent(line.points)) for line in lines]
    from_zero = all(known.curve and known.curve.from_zero for known, _ in drawn)
    return chart(title, lines, from_zero=from_zero)


def percent(points: Places) -> Places:
    """Shares as percentages."""
    return [(step, 100 * value) for step, value in points]


def evaluations(rows: Sequence[Mapping[str, Any]], evals: Mapping[str, Any]) -> list[Figure]:
    """One chart for the percentages of each eval, and one for each of its other metrics. Metrics
    with a single value have no chart. rows: of metrics.jsonl. evals: the config's section."""
    charts: dict[str, list[Line]] = {}
    for key, found in series(rows).items():
        kind, points = metric(key, evals), found
        if len(points) < 2 or kind.detail:
            continue
        name, _, own = key.partition("/")
        title = key
        if kind.shown == "percent":
            title, points = f"{name}, %", percent(points)
        charts.setdefault(title, []).append(Line(own or key, points))
    return [chart(title, lines, from_zero=True) for title, lines in charts.items()]


def series(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Points]:
    """Metric -> its (step, value) pairs, missing values left out. rows: of metrics.jsonl."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for key, value in row.items():
            if key not in ("step", "examples", "epoch") and value is not None:
                curves.setdefault(key, []).append((row["step"], value))
    return curves


def svg(salt: str, size: tuple[float, float], draw: Callable[[Axes], None]) -> str:
    """A drawing as inline SVG. draw: draws on a matplotlib `Axes` of `size` inches.

    salt: determines the ids inside of the SVG. Drawings on one page need different salts. Raises
    `RunError` without matplotlib.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure as Drawing
    except ImportError:
        raise RunError("the report's curves need matplotlib: pip install matplotlib") from None
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "font.size": 9,
        "text.color": _INK,
        "axes.edgecolor": _INK,
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.6,
        "axes.formatter.limits": (-3, 6),
    }
    with matplotlib.rc_context(style):
        figure = Drawing(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", transparent=True, dpi=200)  # of what is rasterized
    text = drawn.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    return text.replace(_INK, "currentColor")


def chart(
    title: str, lines: Sequence[Line], *, from_zero: bool, x: str = "step", salt: str = ""
) -> Figure:
    """One chart. x: what the horizontal axis counts. salt: as for `svg`; default: the title."""
    dashed = [line for line in lines if line.dashed]
    plain = [line for line in lines if not line.dashed]
    drawn = [(line.colour or next_, line) for next_, line in zip(itertools.cycle(COLOURS), plain)]

    def draw(axes: Axes) -> None:
        for colour, line in drawn:
            _draw(axes, line, colour)
        for line in dashed:
            points = [*line.points]
            if len(points) == 1:  # a level, as long as a step
                points.append((points[0][0] + 1, points[0][1]))
            xs, ys = np.array(points, np.float64).T
            style = {"color": _INK, "linewidth": 0.8, "linestyle": (0, (4, 3)), "alpha": 0.6}
            axes.plot(xs, ys, **style)  # pyright: ignore[reportArgumentType]: a dash pattern
        if from_zero:
            axes.set_ylim(bottom=0)
        axes.set_xlabel(x)
        axes.grid(axis="y", color=_INK, alpha=0.12, linewidth=0.6)

    legend = list(dict.fromkeys((colour, line.name) for colour, line in drawn))
    legend += [(DASHED, line.name) for line in dashed]
    return Figure(title, svg(salt or title, (4.6, 2.5), draw), legend if len(lines) > 1 else [])


def _draw(axes: Axes, line: Line, colour: str) -> None:
    """Draws one curve; over noisy values, a running mean of 1/40 of the curve."""
    x, y = np.array(line.points, np.float64).T
    y[~np.isfinite(y)] = np.nan
    thin = np.unique(np.linspace(0, len(x) - 1, min(len(x), _MOST)).astype(int))
    if line.smooth and len(x) > 60:  # the values stay visible behind their running mean
        axes.plot(x[thin], y[thin], color=colour, linewidth=0.7, alpha=0.35)
        width = max(len(x) // 40, 3)
        known = np.isfinite(y)
        kernel = np.ones(width)
        total = np.convolve(np.where(known, y, 0), kernel, "same")
        count = np.convolve(known.astype(float), kernel, "same")
        y = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    marker = "o" if len(x) < 12 else None
    axes.plot(x[thin], y[thin], color=colour, linewidth=1.6, marker=marker, markersize=3)
