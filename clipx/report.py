"""One page that shows a run: `python -m clipx.report --workdir=DIR` writes DIR/report.html."""

from __future__ import annotations

import html
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from clipx import cli
from clipx.errors import ConfigError, RunError
from clipx.evaluators.base import Encode
from clipx.reporting import charts, gallery
from clipx.reporting.charts import is_share, short
from clipx.reporting.gallery import Samples, grid, section
from clipx.training import episodes, metrics
from clipx.training.episodes import Episode

FILE = "report.html"
_EPISODES = 9  # on the page: all of a long run's would make it too large


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
    """The page, self-contained."""
    training, evaluations, renewed = (
        [row for row in rows if _kind(row) == kind] for kind in ("training", "eval", "episode")
    )
    title = _title(config, workdir)
    body = [
        _header(title, rows, training, config, workdir),
        _scores(evaluations, str(config.get("train", {}).get("best", ""))),
        section("Training", grid(charts.training(training))),
        section("Evaluation over training", grid(charts.evaluations(evaluations))),
        gallery.episodes(_episodes(workdir), charts.evaluations(renewed)),
    ]
    if samples is not None:
        uris = [episodes.thumbnail(p) for p in samples.pictures]
        body += [gallery.matrix(samples, uris), gallery.queries(samples, uris)]
    body.append(_files(config, workdir))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_CSS}</style></head>\n"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _kind(row: Mapping[str, Any]) -> str:
    """What a row of metrics is of: one with a `loss` is of training."""
    if "loss" in row:
        return "training"
    return "episode" if any(key.startswith("episode/") for key in row) else "eval"


def _episodes(workdir: pathlib.Path) -> list[Episode]:
    """Episodes that there are pictures of: the newest, then others, from all of the run."""
    paths = episodes.files(workdir)
    places = np.linspace(len(paths) - 1, 0, min(_EPISODES, len(paths))).round().astype(int)
    found = []
    for path in (paths[place] for place in places):
        try:
            found.append(episodes.read(path))
        except ValueError as error:
            raise RunError(f"{path}: {error}") from None
    return found


def _text(value: Any) -> str:
    return html.escape(str(value))


def _score(key: str, value: float) -> str:
    """Accuracies and recalls in percent, anything else as it is."""
    return f"{100 * value:.1f} %" if is_share(key) and math.isfinite(value) else short(value)


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
        tiles.append(("last loss", short(training[-1]["loss"])))
        if "loss/chance" in training[-1]:
            tiles.append(("loss of chance", short(training[-1]["loss/chance"])))
        speeds = [row["images_per_second"] for row in training if "images_per_second" in row]
        if speeds:
            tiles.append(("images/s, median", short(float(np.median(speeds)))))
    shown = "".join(f"<div><b>{_text(v)}</b><span>{_text(k)}</span></div>" for k, v in tiles)
    return (
        f'<header><p class="eyebrow">clipx run</p><h1>{_text(title)}</h1>'
        f'<p class="path">{_text(workdir.resolve())}</p><div class="tiles">{shown}</div></header>\n'
    )


def _scores(evaluations: Sequence[Mapping[str, Any]], primary: str) -> str:
    """The best and the last of every evaluation metric."""
    series = charts.series(evaluations)
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
    return section("Best metrics", table, note)


def _files(config: Mapping[str, Any], workdir: pathlib.Path) -> str:
    about = {
        metrics.FILE: "one JSON object a logged step",
        "config.json": "the whole config, defaults included",
        "checkpoints": "the state, to go on from or to evaluate",
        "episodes": "where the rows of an episode lie, and what its prototypes hold",
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
    return section("Files", listed + details, f"In <code>{_text(workdir.resolve())}</code>.")


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
.maps{display:grid;grid-template-columns:repeat(auto-fill,minmax(400px,1fr));gap:14px}
.prototypes{display:grid;gap:14px;margin-top:14px}
.prototypes h3 i{display:inline-block;width:11px;height:11px;margin-right:7px;border-radius:2px}
.prototypes ol{display:grid;grid-template-columns:repeat(8,minmax(84px,1fr));gap:8px;
list-style:none;margin:0;padding:0;overflow-x:auto}
.prototypes img{display:block;width:100%;aspect-ratio:1;object-fit:cover;border-radius:5px}
.prototypes li span{display:-webkit-box;-webkit-line-clamp:4;-webkit-box-orient:vertical;
overflow:hidden;font-size:11px;line-height:1.35;color:var(--soft);margin-top:4px}
section>h3{margin-top:24px}
details{margin-top:14px}summary{cursor:pointer}
pre{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:14px;
font-size:12px;overflow-x:auto}
@media (max-width:520px){.queries,.maps{grid-template-columns:1fr}main{padding:24px 14px}}
"""


def main(overrides: Sequence[tuple[str, str]]) -> None:
    """Restores the run of --workdir, looks at its held-out samples and writes the page."""
    if overrides:
        raise ConfigError(
            f"--config.{overrides[0][0]}", "an override", "--workdir alone: the run has its config"
        )
    from clipx.training import run as runs

    run, state = runs.restore(flags.FLAGS.workdir)
    print(write_run(flags.FLAGS.workdir, run, run.encode(state)))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of the run.")
    cli.run(main, required=("workdir",))
