"""One page that shows a run: `python -m clipx.report --workdir=DIR` writes DIR/report.html."""

from __future__ import annotations

import base64
import html
import io
import itertools
import json
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from jaxtyping import Float, Int, UInt8

from clipx import cli, metrics
from clipx.cli import RunError
from clipx.config import ConfigError
from clipx.evaluators.base import Encode

FILE = "report.html"
_QUERIES, _FOUND = 8, 5
_MATRIX = 20  # pictures in the matrix: more would be too small to see
_POINTS = 800  # of a curve
_COLOURS = ("#3d7fc1", "#d4802a", "#3c9a62", "#8b65c4", "#c8565b", "#2f9aa0", "#b3902f", "#868c95")
_EXACT = ("learning_rate", "logit_scale")  # no noise to smooth
_INK = "#010203"  # stands for the page's own text colour in a drawing
# Curves of training: title, keys, whether the axis starts at 0.
_CURVES = (
    ("Loss", ("loss",), False),  # and, dashed, the loss of a model that cannot tell rows apart
    ("R@1 inside the batch", ("batch/R@1",), True),
    ("Learning rate", ("learning_rate",), True),
    ("Logit scale", ("logit_scale",), False),
    ("Gradient norm", ("grad_norm",), True),
    ("Images per second", ("images_per_second",), True),
    ("Share of time", ("data_wait_fraction", "mfu"), True),
)


class Samples(NamedTuple):
    """What a model says of held-out pairs. Captions may be several a picture."""

    pictures: UInt8[np.ndarray, "n h w 3"]
    captions: Sequence[str]
    similarity: Float[np.ndarray, "n t"]
    owner: Int[np.ndarray, " t"]  # the picture that each caption belongs to


def write(workdir: str | os.PathLike, *, samples: Samples | None = None) -> pathlib.Path:
    """The path of report.html, written whole or not at all, from the workdir's metrics.jsonl and
    config.json. Raises `RunError` without metrics, without matplotlib, or if it cannot write."""
    folder = pathlib.Path(workdir)
    rows = metrics.read(folder)
    if not rows:
        raise RunError(f"no metrics in {folder / metrics.FILE}: is this the workdir of a run?")
    config_file = folder / "config.json"
    try:
        config = json.loads(config_file.read_text()) if config_file.is_file() else {}
    except ValueError as error:
        raise RunError(f"{config_file} is not JSON: {error}") from None
    text = page(rows, config, samples, folder)
    path, whole = folder / FILE, folder / f".{FILE}.{os.getpid()}"
    try:
        whole.write_text(text, encoding="utf-8")
        whole.replace(path)
    except OSError as error:
        whole.unlink(missing_ok=True)
        raise RunError(f"cannot write {path}: {error.strerror}") from None
    return path


def write_run(workdir: str | os.PathLike, run: Any, encode: Encode) -> pathlib.Path | None:
    """The path of report.html with what `encode` says of the run's held-out samples.

    Every process calls it, as encoding needs them all; process 0 writes, the others return None.
    """
    samples = None
    if (held_out := run.samples()) is not None:
        pictures, captions, owner = held_out
        similarity = encode.similarity(encode.image(pictures), encode.text(captions))
        samples = Samples(pictures, captions, similarity, np.asarray(owner))
    return write(workdir, samples=samples) if jax.process_index() == 0 else None


def page(
    rows: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    samples: Samples | None,
    workdir: pathlib.Path,
) -> str:
    """The page, self-contained. A row with a `loss` is of training, any other an evaluation."""
    training = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "loss" not in row]
    title = _title(config, workdir)
    body = [
        _header(title, rows, training, config, workdir),
        _scores(evaluations, str(config.get("train", {}).get("best", ""))),
        _section("Training", _grid(_training_charts(training))),
        _section("Evaluation over training", _grid(_evaluation_charts(evaluations))),
    ]
    if samples is not None:
        uris = [_picture(p) for p in samples.pictures]
        body += [_matrix(samples, uris), _queries(samples, uris)]
    body.append(_files(config, workdir))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_CSS}</style></head>\n"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _text(value: Any) -> str:
    return html.escape(str(value))


def _short(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _score(key: str, value: float) -> str:
    """Accuracies and recalls in percent, anything else as it is."""
    return f"{100 * value:.1f} %" if _is_share(key) and math.isfinite(value) else _short(value)


def _is_share(key: str) -> bool:
    name = key.split("/", 1)[-1]
    return bool(re.search(r"R@\d+$|^top\d+$|^mean_recall$|^mean_per_class$|accuracy|^class/", name))


def _section(title: str, content: str, note: str = "") -> str:
    if not content:
        return ""
    note = f'<p class="note">{note}</p>' if note else ""
    return f"<section><h2>{_text(title)}</h2>{note}{content}</section>\n"


def _title(config: Mapping[str, Any], workdir: pathlib.Path) -> str:
    method = config.get("objective", {}).get("name")
    image = config.get("image", {})
    data = config.get("data", {}).get("source")
    parts = [method, image.get("variant") or image.get("name"), data]
    return " · ".join(str(p) for p in parts if p) or workdir.resolve().name


def _header(title, rows, training, config, workdir) -> str:
    last = rows[-1]
    tiles = [("steps", f"{last['step']:,}")]
    if "epoch" in last:
        tiles.append(("epochs", f"{last['epoch']:.4g}"))
    if "examples" in last:
        tiles.append(("examples", f"{last['examples']:,}"))
    if size := config.get("train", {}).get("batch_size"):
        tiles.append(("batch", f"{size:,}"))
    if training:
        tiles.append(("last loss", _short(training[-1]["loss"])))
        if "loss/chance" in training[-1]:
            tiles.append(("loss of chance", _short(training[-1]["loss/chance"])))
        speeds = [row["images_per_second"] for row in training if "images_per_second" in row]
        if speeds:
            tiles.append(("images/s, median", _short(float(np.median(speeds)))))
    shown = "".join(f"<div><b>{_text(v)}</b><span>{_text(k)}</span></div>" for k, v in tiles)
    return (
        f'<header><p class="eyebrow">clipx run</p><h1>{_text(title)}</h1>'
        f'<p class="path">{_text(workdir.resolve())}</p><div class="tiles">{shown}</div></header>\n'
    )


def _scores(evaluations: Sequence[Mapping[str, Any]], primary: str) -> str:
    """The best and the last of every evaluation metric."""
    series = _series(evaluations)
    lines = []
    for key, points in series.items():
        if "/class/" in key:
            continue
        finite = [p for p in points if math.isfinite(p[1])] or points
        lower = key.endswith("rank")
        step, best = (min if lower else max)(finite, key=lambda p: p[1])
        mark = ' class="primary"' if key == primary else ""
        lines.append(
            f"<tr{mark}><th scope=row>{_text(key)}</th><td>{_score(key, best)}</td>"
            f"<td>{step:,}</td><td>{_score(key, points[-1][1])}</td></tr>"
        )
    if not lines:
        return ""
    head = "<tr><th>metric</th><th>best</th><th>at step</th><th>last</th></tr>"
    note = f"The best checkpoint is kept by <b>{_text(primary)}</b>." if primary in series else ""
    table = f'<div class="scroll"><table class="scores">{head}{"".join(lines)}</table></div>'
    return _section("Best metrics", table, note)


def _series(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    series: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for key, value in row.items():
            if key not in ("step", "examples", "epoch") and value is not None:
                series.setdefault(key, []).append((row["step"], value))
    return series


def _grid(charts: Sequence[str]) -> str:
    return f'<div class="grid">{"".join(charts)}</div>' if charts else ""


def _training_charts(training: Sequence[Mapping[str, Any]]) -> list[str]:
    series = _series(training)
    charts = []
    parts = tuple(key for key in series if key.startswith("loss/") and key != "loss/chance")
    for title, keys, from_zero in (*_CURVES, ("Parts of the loss", parts, False)):
        curves = {key: series[key] for key in keys if key in series}
        if curves:
            chance = series.get("loss/chance") if keys == ("loss",) else None
            charts.append(
                _chart(title, curves, from_zero=from_zero, level=chance[-1][1] if chance else None)
            )
    return charts


def _evaluation_charts(evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    """One chart for each evaluation's shares, one for each of its other metrics."""
    charts: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for key, points in _series(evaluations).items():
        if len(points) < 2 or "/class/" in key:  # a point is no curve; the table has it
            continue
        name, _, metric = key.partition("/")
        title = name if _is_share(key) else key
        scale = 100 if _is_share(key) else 1
        curve = [(step, scale * value) for step, value in points]
        charts.setdefault(f"{title}, %" if scale == 100 else title, {})[metric or key] = curve
    return [_chart(title, curves, from_zero=True) for title, curves in charts.items()]


def _chart(
    title: str,
    curves: Mapping[str, Sequence[tuple[int, float]]],
    *,
    from_zero: bool,
    level: float | None = None,
) -> str:
    """An inline SVG in the page's own colours."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise RunError("the report's curves need matplotlib: pip install matplotlib") from None
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": title,  # ids of their own, the same every time
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
        figure = Figure(figsize=(4.6, 2.5), layout="constrained")
        axes = figure.add_subplot()
        for colour, (key, points) in zip(itertools.cycle(_COLOURS), curves.items()):
            _draw(axes, points, colour, smooth=key not in _EXACT)
        if level is not None:
            axes.axhline(level, color=_INK, linewidth=0.8, linestyle=(0, (4, 3)), alpha=0.6)
        if from_zero:
            axes.set_ylim(bottom=0)
        axes.set_xlabel("step")
        axes.grid(axis="y", color=_INK, alpha=0.12, linewidth=0.6)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", transparent=True)
    svg = drawn.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = svg.replace(_INK, "currentColor")
    legend = "".join(
        f'<span><i style="background:{colour}"></i>{_text(key)}</span>'
        for colour, key in zip(itertools.cycle(_COLOURS), curves)
    )
    legend = f'<div class="legend">{legend}</div>' if len(curves) > 1 else ""
    return f"<figure><figcaption>{_text(title)}</figcaption>{svg}{legend}</figure>"


def _draw(axes, points: Sequence[tuple[int, float]], colour: str, smooth: bool) -> None:
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


def _picture(pixels: UInt8[np.ndarray, "h w 3"]) -> str:
    """A data URI of at most 128 pixels a side."""
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((128, 128))
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(encoded.getvalue()).decode()


def _first_captions(samples: Samples, distinct: bool = False) -> list[int]:
    """The first caption of each picture, in the order of the pictures."""
    first: dict[int, int] = {}
    for caption, picture in enumerate(samples.owner):
        first.setdefault(int(picture), caption)
    chosen = [first[picture] for picture in sorted(first)]
    if distinct:
        chosen = list({samples.captions[c]: c for c in reversed(chosen)}.values())[::-1]
    return chosen


def _matrix(samples: Samples, uris: Sequence[str]) -> str:
    captions = _first_captions(samples)[:_MATRIX]
    pictures = samples.owner[captions]
    scores = np.asarray(samples.similarity, np.float64)[np.ix_(pictures, captions)].T
    finite = scores[np.isfinite(scores)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    shade = np.nan_to_num((scores - low) / max(high - low, 1e-12))
    right = sum(int(np.argmax(row) == i) for i, row in enumerate(shade))
    head = "".join(f'<th><img src="{uris[p]}" alt="picture {p}"></th>' for p in pictures)
    lines = []
    for i, caption in enumerate(captions):
        text = _text(samples.captions[caption])
        cells = "".join(
            f'<td{" class=own" if i == j else ""} style="--s:{shade[i, j]:.3f}" '
            f'title="{text} | picture {pictures[j]}: {scores[i, j]:.4g}"></td>'
            for j in range(len(captions))
        )
        lines.append(f'<tr><th scope=row title="{text}"><span>{text}</span></th>{cells}</tr>')
    note = (
        f"A caption a row, a picture a column; the pairs that belong together are outlined. "
        f"{right} of {len(captions)} captions score their own picture highest here. "
        f'<span class="scale">{_short(low)}<i></i>{_short(high)}</span>'
    )
    table = f'<table class="matrix"><tr><td></td>{head}</tr>{"".join(lines)}</table>'
    return _section("Similarity of a held-out batch", f'<div class="scroll">{table}</div>', note)


def _queries(samples: Samples, uris: Sequence[str]) -> str:
    distinct = _first_captions(samples, distinct=True)
    places = np.linspace(0, len(distinct) - 1, min(_QUERIES, len(distinct))).round().astype(int)
    cards = []
    for caption in (distinct[place] for place in places):
        text = samples.captions[caption]
        # Another picture with the very same caption is as right as the caption's own.
        same = [i for i, other in enumerate(samples.captions) if other == text]
        right = {int(samples.owner[i]) for i in same}
        score = np.nan_to_num(samples.similarity[:, caption].astype(np.float64), nan=-np.inf)
        order = np.argsort(-score, kind="stable")
        found = "".join(
            f'<li class="{"right" if int(p) in right else ""}"><img src="{uris[p]}" '
            f'alt="picture {p}"><span>{"✓ " if int(p) in right else ""}{_short(score[p])}</span>'
            "</li>"
            for p in order[:_FOUND]
        )
        rank = 1 + next(i for i, p in enumerate(order) if int(p) in right)
        cards.append(
            f"<article><h3>“{_text(text)}”</h3><ol>{found}</ol>"
            f'<p class="note">right picture at rank {rank} of {len(order)}</p></article>'
        )
    note = f"The {_FOUND} pictures, of {len(uris)}, that score highest; the right one is outlined."
    return _section("Queries", f'<div class="queries">{"".join(cards)}</div>', note)


def _files(config: Mapping[str, Any], workdir: pathlib.Path) -> str:
    about = {
        metrics.FILE: "one JSON object a logged step",
        "config.json": "the whole config, defaults included",
        "checkpoints": "the state, to go on from or to evaluate",
        "tensorboard": "the same numbers for TensorBoard",
    }
    lines = "".join(
        f"<tr><th scope=row><code>{name}</code></th><td>{text}</td></tr>"
        for name, text in about.items()
        if (workdir / name).exists()
    )
    listed = f'<table class="files">{lines}</table>' if lines else ""
    spelled = _text(json.dumps(config, indent=2, ensure_ascii=False))
    details = f"<details><summary>Config</summary><pre>{spelled}</pre></details>" if config else ""
    return _section("Files", listed + details, f"In <code>{_text(workdir.resolve())}</code>.")


_CSS = """
:root{color-scheme:light dark;--bg:#fafaf8;--card:#fff;--ink:#1d1f22;--soft:#666b72;--line:#e3e3de;
--accent:61 127 193;--right:#2f8f56}
@media (prefers-color-scheme:dark){:root{--bg:#15171a;--card:#1d2024;--ink:#e6e7e9;--soft:#9aa0a8;
--line:#2f343a;--accent:96 160 222;--right:#57bd80}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1120px;margin:0 auto;padding:40px 24px 64px}
h1{font-size:30px;line-height:1.2;margin:2px 0 4px;letter-spacing:-.01em}
h2{font-size:19px;margin:44px 0 10px}
h3{font-size:14px;font-weight:600;margin:0 0 10px;line-height:1.35}
.eyebrow{margin:0;color:var(--soft);font-size:13px}
.path,.note{color:var(--soft);font-size:13px;margin:0 0 12px;overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(120px,1fr));gap:1px;
margin-top:20px;background:var(--card);border:1px solid var(--line);border-radius:8px;
overflow:hidden}
.tiles div{box-shadow:0 0 0 1px var(--line);padding:12px 14px}
.tiles b{display:block;font-size:20px;font-weight:600;font-variant-numeric:tabular-nums}
.tiles span{color:var(--soft);font-size:12px}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(320px,1fr));gap:14px}
figure,article{margin:0;background:var(--card);border:1px solid var(--line);border-radius:8px;
padding:12px 14px}
figcaption{font-size:13px;font-weight:600;margin-bottom:6px}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;margin-top:6px;font-size:12px;color:var(--soft)}
.legend i{display:inline-block;width:10px;height:10px;margin-right:5px;border-radius:2px}
figure svg{display:block;width:100%;height:auto}
figure svg text{font-family:inherit!important}
.scroll{overflow-x:auto}
table{border-collapse:collapse}
.scores,.files{background:var(--card);font-size:14px}
.scores th,.scores td,.files th,.files td{padding:5px 16px 5px 10px;text-align:left;
font-weight:400;border-bottom:1px solid var(--line)}
.scores tr:first-child th{color:var(--soft);font-size:12px}
.scores td,.scores tr:first-child th:not(:first-child){text-align:right;
white-space:nowrap;font-variant-numeric:tabular-nums}
.scores .primary th,.scores .primary td{font-weight:650}
.matrix{table-layout:fixed;width:100%;min-width:760px;border-spacing:0}
.matrix tr>:first-child{width:28%;text-align:left;font-weight:400;font-size:12px}
.matrix th span{display:block;overflow:hidden;text-overflow:ellipsis;white-space:nowrap;
padding-right:10px}
.matrix th{padding:0}
.matrix img{display:block;width:100%;aspect-ratio:1;object-fit:cover;padding:1px}
.matrix td[style]{padding:0;height:30px;border:1px solid var(--bg);
background:rgb(var(--accent)/calc(.04 + .96*var(--s)))}
.matrix td.own{outline:2px solid var(--ink);outline-offset:-2px}
.scale{white-space:nowrap;font-variant-numeric:tabular-nums}
.scale i{display:inline-block;width:90px;height:9px;margin:0 6px;border-radius:2px;
background:linear-gradient(90deg,rgb(var(--accent)/.04),rgb(var(--accent)))}
.queries{display:grid;grid-template-columns:repeat(auto-fill,minmax(440px,1fr));gap:14px}
.queries ol{display:grid;grid-template-columns:repeat(5,1fr);gap:8px;list-style:none;margin:0;
padding:0}
.queries img{display:block;width:100%;aspect-ratio:1;object-fit:cover;border-radius:5px}
.queries li span{display:block;font-size:11px;color:var(--soft);text-align:center;margin-top:4px;
font-variant-numeric:tabular-nums}
.queries .right img{outline:3px solid var(--right);outline-offset:1px}
.queries .right span{color:var(--right);font-weight:600}
.queries .note{margin:8px 0 0;font-size:12px}
details{margin-top:14px}summary{cursor:pointer}
pre{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:14px;
font-size:12px;overflow-x:auto}
@media (max-width:520px){.queries{grid-template-columns:1fr}main{padding:24px 14px}}
"""


def main(overrides: Sequence[tuple[str, str]]) -> None:
    """Restores the run of --workdir, looks at its held-out samples and writes the page."""
    if overrides:
        raise ConfigError(
            f"--config.{overrides[0][0]}", "an override", "--workdir alone: the run has its config"
        )
    from clipx import run as runs

    run, state = runs.restore(flags.FLAGS.workdir)
    print(write_run(flags.FLAGS.workdir, run, run.encode(state)))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of the run.")
    cli.run(main, required=("workdir",))
