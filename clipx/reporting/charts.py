"""Drawings of the report, as inline SVG in the page's own colours: curves of a run, and maps."""

from __future__ import annotations

import html
import io
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from clipx.errors import RunError
from clipx.training.episodes import Episode

Curve = Sequence[tuple[int, float]]  # (step, value)

_POINTS = 800  # of a curve
_COLOURS = ("#3d7fc1", "#d4802a", "#3c9a62", "#8b65c4", "#c8565b", "#2f9aa0", "#b3902f", "#868c95")
CLUSTERS = (*_COLOURS[:-1], "#d56fb2", "#83a02f", "#93684a")  # of a map, the largest first
_REST = _COLOURS[-1]  # all smaller clusters
_MARKS = {"image": ("o", 9), "text": ("^", 13)}  # of the points of a modality, and their area
_EXACT = ("learning_rate", "logit_scale", "clusters/")  # how keys begin without noise to smooth
_INK = "#010203"  # stands for the page's own text colour in a drawing
_LABELLINGS = ("image", "text", "external")
# Curves of training: title, keys, whether the axis starts at 0.
_CURVES = (
    ("Loss", ("loss",), False),  # and, dashed, the loss of a model that cannot tell rows apart
    ("R@1 inside the batch", ("batch/R@1",), True),
    ("Learning rate", ("learning_rate",), True),
    ("Logit scale", ("logit_scale",), False),
    ("Gradient norm", ("grad_norm",), True),
    ("Images per second", ("images_per_second",), True),
    ("Share of time", ("data_wait_fraction", "mfu"), True),
    ("Modality gap", ("batch/modality_gap",), True),
    (
        "Rows that pick their own prototype",
        tuple(f"batch/{a}_from_{b}" for b in _LABELLINGS for a in ("image", "text") if a != b),
        True,
    ),
    ("Inertia of a row", tuple(f"clusters/{name}_inertia" for name in _LABELLINGS), True),
    ("Empty clusters", tuple(f"clusters/{name}_empty" for name in _LABELLINGS), True),
    ("Rows whose labels are the same number", ("clusters/equal_labels",), True),
)


def training(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The curves of a run's steps."""
    known = series(rows)
    charts = []
    parts = tuple(key for key in known if key.startswith("loss/") and key != "loss/chance")
    for title, keys, from_zero in (*_CURVES, ("Parts of the loss", parts, False)):
        curves = {key: known[key] for key in keys if key in known}
        if curves:
            chance = known.get("loss/chance") if keys == ("loss",) else None
            charts.append(
                _chart(title, curves, from_zero=from_zero, level=chance[-1][1] if chance else None)
            )
    return charts


def evaluations(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One chart for each evaluation's shares, one for each of its other metrics."""
    charts: dict[str, dict[str, Curve]] = {}
    for key, points in series(rows).items():
        if len(points) < 2 or "/class/" in key:  # a point is no curve; the table has it
            continue
        name, _, metric = key.partition("/")
        title = name if is_share(key) else key
        scale = 100 if is_share(key) else 1
        curve = [(step, scale * value) for step, value in points]
        charts.setdefault(f"{title}, %" if scale == 100 else title, {})[metric or key] = curve
    return [_chart(title, curves, from_zero=True) for title, curves in charts.items()]


def series(rows: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    """The curve of every metric."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for key, value in row.items():
            if key not in ("step", "examples", "epoch") and value is not None:
                found.setdefault(key, []).append((row["step"], value))
    return found


def is_share(key: str) -> bool:
    """Whether a metric is shown in percent."""
    name = key.split("/", 1)[-1]
    return bool(re.search(r"R@\d+$|^top\d+$|^mean_recall$|^mean_per_class$|accuracy|^class/", name))


def short(value: float) -> str:
    """A number in a few digits."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def clusters(episode: Episode, labelling: str) -> str:
    """The map of an episode's rows, pictures and captions, in the colours of the clusters that
    `labelling` has them in."""
    known, colours = episode.clusters[labelling], np.array(episode.colours[labelling])
    parts = [(-1, {"color": _REST, "alpha": 0.35})]
    parts += [(i, {"color": CLUSTERS[i]}) for i in range(len(known))]

    def draw(axes) -> None:
        for place, look in parts:
            for modality, points in episode.points.items():
                marker, area = _MARKS.get(modality, ("s", 9))
                x, y = np.array(points)[colours == place].reshape(-1, 2).T
                size = area if place < 0 else 2 * area
                axes.scatter(x, y, size, marker=marker, linewidths=0, zorder=-1, **look)
        axes.set_rasterization_zorder(0)  # thousands of points become one picture
        axes.set_aspect("equal", adjustable="datalim")
        axes.tick_params(left=False, bottom=False, labelleft=False, labelbottom=False)
        first, second = episode.variance
        axes.set_xlabel(f"first axis, {first:.0%} of the variance inside a modality")
        axes.set_ylabel(f"second, {second:.0%}")

    title = f"Clusters of {plural(labelling)}"
    legend = [(CLUSTERS[i], f"{c.cluster} ({c.rows:,})") for i, c in enumerate(known)]
    svg = _svg(f"{title} {episode.episode}", (5.4, 4.2), draw)
    return _figure(title, svg, [*legend, (_REST, "all others")])


def plural(name: str) -> str:
    """What the rows of a modality or labelling are called."""
    return {"image": "pictures", "text": "captions", "external": "the teacher's rows"}.get(
        name, name
    )


def _chart(
    title: str, curves: Mapping[str, Curve], *, from_zero: bool, level: float | None = None
) -> str:
    def draw(axes) -> None:
        for colour, (key, points) in zip(itertools.cycle(_COLOURS), curves.items()):
            _draw(axes, points, colour, smooth=not key.startswith(_EXACT))
        if level is not None:
            axes.axhline(level, color=_INK, linewidth=0.8, linestyle=(0, (4, 3)), alpha=0.6)
        if from_zero:
            axes.set_ylim(bottom=0)
        axes.set_xlabel("step")
        axes.grid(axis="y", color=_INK, alpha=0.12, linewidth=0.6)

    legend = list(zip(itertools.cycle(_COLOURS), curves)) if len(curves) > 1 else []
    return _figure(title, _svg(title, (4.6, 2.5), draw), legend)


def _figure(title: str, svg: str, legend: Sequence[tuple[str, str]]) -> str:
    """A drawing with its title and what its colours stand for."""
    marks = "".join(
        f'<span><i style="background:{colour}"></i>{html.escape(name)}</span>'
        for colour, name in legend
    )
    marks = f'<div class="legend">{marks}</div>' if legend else ""
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{svg}{marks}</figure>"


def _svg(salt: str, size: tuple[float, float], draw: Callable[[Any], None]) -> str:
    """An inline SVG of `size` inches. Its ids are its own where its `salt` is, and always the
    same."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise RunError("the report's curves need matplotlib: pip install matplotlib") from None
    style = {
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
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", transparent=True, dpi=200)  # of what is rasterized
    svg = drawn.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    return svg.replace(_INK, "currentColor")


def _draw(axes, points: Curve, colour: str, smooth: bool) -> None:
    x, y = np.array(points, np.float64).T
    y[~np.isfinite(y)] = np.nan
    thin = np.unique(np.linspace(0, len(x) - 1, min(len(x), _POINTS)).astype(int))
    if smooth and len(x) > 60:  # the noise stays visible behind its running mean
        axes.plot(x[thin], y[thin], color=colour, linewidth=0.7, alpha=0.35)
        width = max(len(x) // 40, 3)
        known = np.isfinite(y)
        kernel = np.ones(width)
        total = np.convolve(np.where(known, y, 0), kernel, "same")
        count = np.convolve(known.astype(float), kernel, "same")
        y = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    marker = "o" if len(x) < 12 else None
    axes.plot(x[thin], y[thin], color=colour, linewidth=1.6, marker=marker, markersize=3)
