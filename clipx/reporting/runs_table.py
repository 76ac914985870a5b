"""results.csv: a line for every run below a folder, made anew from the runs' own files. Runs whose
folder is gone keep their line."""

from __future__ import annotations

import csv
import io
import json
import os
import pathlib
import statistics
from collections.abc import Mapping
from typing import Any

from clipx.errors import damaged_file
from clipx.reporting import comparison, page
from clipx.reporting.comparison import Result
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
    rows = {made["folder"]: made for made in (row(folder, root) for folder in runs(root))}
    rows = {line["folder"]: line for line in kept(root)} | rows
    heads = list(dict.fromkeys(key for one in rows.values() for key in one))
    text = io.StringIO()
    table = csv.DictWriter(text, heads, lineterminator="\n")
    table.writeheader()
    table.writerows(rows[name] for name in sorted(rows))
    file = root / FILE
    write_page(file, text.getvalue())
    return file


def kept(root: pathlib.Path) -> list[dict[str, str]]:
    """The lines of `root`'s results.csv whose runs have no folder there: they were deleted, or
    trained elsewhere. Raises `ConfigError` for a file that is none."""
    path = root / FILE
    try:
        with open(path, newline="", encoding="utf-8") as file:
            table = csv.DictReader(file)
            lines = list(table)
        if missing := {"variant", "seed", "kind", "folder"} - {*(table.fieldnames or ())}:
            raise ValueError(f"no column {min(missing)}")
        if any(None in line or None in line.values() for line in lines):
            raise ValueError("a line has more or fewer cells than the first")
    except FileNotFoundError:
        return []
    except (OSError, ValueError, csv.Error) as error:
        raise damaged_file(path, error) from None
    return [line for line in lines if not (root / line["folder"] / "config.json").exists()]


def result(line: Mapping[str, str], evals: Mapping[str, Any]) -> Result:
    """The result of a run, from its line. evals: of its config."""
    starts = tuple(f"{name}/" for name in evals)
    scores = {key: float(x) for key, x in line.items() if x and key.startswith(starts)}
    return Result(int(line["seed"]), scores, evals, int(line.get("pairs_seen") or 0))


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
    values |= {key: known.get(key, "") for key in ("config", "commit")}
    values["changes"] = json.dumps(known.get("changes") or {}, sort_keys=True)
    evals = config.get("evals") or {}
    scores = comparison.results(lines, evals)
    values["score"] = scores.get(known.get("metric", ""), "")
    values["failed"] = known.get("failed", "")
    return values | {key: x for key, x in scores.items() if not metric(key, evals).detail}
