"""results.csv: a line for every run below a folder, made anew from the runs' own files."""

from __future__ import annotations

import csv
import io
import json
import os
import pathlib
import statistics
from typing import Any

from clipx.reporting import comparison, page
from clipx.reporting.templates import write_page
from clipx.training import compared, metrics
from clipx.training.metric_table import metric
from clipx.training.workdir import read_json

FILE = "results.csv"
_CLOSED = ("checkpoints", "episodes", "features", "tensorboard", "wandb")  # no runs are in these
_SCORES = ("memory_gib", "predicted/memory_gib", "flops_per_pair")


def write(root: pathlib.Path) -> pathlib.Path:
    """Writes results.csv of all runs below `root`, in one piece, and returns its path. Raises
    `RunError` if it cannot be written."""
    rows = [row(folder, root) for folder in runs(root)]
    heads = list(dict.fromkeys(key for one in rows for key in one))
    text = io.StringIO()
    table = csv.DictWriter(text, heads, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    file = root / FILE
    write_page(file, text.getvalue())
    return file


def runs(root: pathlib.Path) -> list[pathlib.Path]:
    """The folders below `root` that hold a run which has begun, in order of their names."""
    found = []
    for folder, below, names in os.walk(root):
        below[:] = [n for n in below if n not in _CLOSED and not n.startswith((".", "evaluation_"))]
        if "config.json" in names and {metrics.FILE, compared.FILE} & {*names}:
            found.append(pathlib.Path(folder))
    return sorted(found)


def row(folder: pathlib.Path, root: pathlib.Path) -> dict[str, Any]:
    """The line of a run. A value that is not known, such as the memory that a CPU does not report,
    is left out. Raises `ConfigError` for a damaged file of the run."""
    config = read_json(folder / "config.json")
    known = compared.read(folder)
    lines = comparison.with_seconds(metrics.read(folder))
    last = lines[-1] if lines else {"step": 0, "seconds": 0.0}
    speeds = [line["images_per_second"] for line in lines if "images_per_second" in line]
    place = folder.relative_to(root).as_posix()
    values: dict[str, Any] = {
        "variant": known.get("variant") or place.partition("/")[0],
        "seed": config.get("seed", 0),
        "kind": known.get("kind") or "final",
        "folder": place,
        "finished": "yes" if (folder / page.FILE).exists() else "no",
        "budget": known.get("budget") or "pairs",
        "steps": last["step"],
        "pairs_seen": last.get("examples", 0),
        "seconds": round(last["seconds"], 3),
        "wall_seconds": known.get("seconds", ""),
        "images_per_second": round(statistics.median(speeds), 1) if speeds else "",
    }
    for name in _SCORES:
        found = [line[name] for line in lines if name in line]
        values[name] = max(found) if found else ""
    values["changes"] = json.dumps(known.get("changes") or {}, sort_keys=True)
    evals = config.get("evals") or {}
    scores = comparison.results(lines, evals)
    values["score"] = scores.get(known.get("metric", ""), "")
    values["failed"] = known.get("failed", "")
    return values | {key: x for key, x in scores.items() if not metric(key, evals).detail}
