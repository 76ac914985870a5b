"""What `clipx.bench --against` measured: as a table, as JSON, and as a line of the history."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import pathlib
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from clipx.errors import RunError
from clipx.planning.rows import OURS, Row

_BEGIN, _END = "<!-- bench: begin -->\n", "<!-- bench: end -->\n"
_TITLES = {
    "step": "Training step",
    "loss": "InfoNCE and its gradients, alone",
    "kmeans": "k-means",
    "feed": "Loading",
    "start": "Start",
    "growth": "Growth",
}


def machine() -> str:
    """The processor, its cores that this process may use, and the versions of Python and JAX."""
    model = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists() and (match := re.search(r"model name\s*: (.+)", info.read_text())):
        model = re.sub(r"\((R|TM)\)| CPU", "", match[1]).strip()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    python = platform.python_version()
    return f"{cores} cores of {model}, Python {python}, JAX {jax.__version__}"


def commit(folder: pathlib.Path) -> str:
    """The checkout's commit, with + if its clipx/ differs from it; `no checkout` elsewhere."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "clipx")
        return git("rev-parse", "--short", "HEAD") + "+" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return "no checkout"


def report(sections: Mapping[str, Sequence[Row]], folder: pathlib.Path) -> dict[str, Any]:
    """The rows of each section with where and when they were measured, for JSON."""
    facts = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(folder),
        "machine": machine(),
    }
    return {
        name: {**facts, "rows": [dataclasses.asdict(row) for row in rows]}
        for name, rows in sections.items()
    }


def read(path: pathlib.Path) -> dict[str, Any]:
    """A report from its file; {} if there is none. Raises `RunError` for a file that is none."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise RunError(f"{path} is no report of clipx.bench ({error}); remove it") from None


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _cell(row: Row, side: str) -> str:
    """`0.145 s (0.141 to 0.152)`: the median and the range."""
    if side not in row.sides:
        return "–"
    numbers = row.sides[side]
    unit = f" {row.unit}" if row.unit else ""
    spread = f" ({_number(min(numbers))} to {_number(max(numbers))})" if len(numbers) > 1 else ""
    return f"{_number(row.median(side))}{unit}{spread}"


def _ratio(row: Row, peer: str) -> str:
    ratio = row.ratio(peer)
    return "–" if ratio is None else f"{ratio:.2f}"


def table(report: Mapping[str, Any]) -> list[str]:
    """The report as lines of Markdown, a table for each section."""
    lines: list[str] = []
    for name in sorted(report, key=[*_TITLES, *report].index):
        title = _TITLES.get(name, name)
        rows = [Row.of(values) for values in report[name]["rows"]]
        sides = list(dict.fromkeys(side for row in rows for side in (*row.sides, *row.missing)))
        peers = [side for side in sides if side != OURS]
        heads = [OURS, *(head for peer in peers for head in (peer, "ratio"))]
        lines += [f"\n**{title}**\n", "| | " + " | ".join(heads) + " |"]
        lines.append("|---" * (len(heads) + 1) + "|")
        for row in rows:
            cells = [_cell(row, OURS)]
            cells += [text for peer in peers for text in (_cell(row, peer), _ratio(row, peer))]
            lines.append("| " + " | ".join([row.name, *cells]) + " |")
        missing = {side: why for row in rows for side, why in row.missing.items()}
        lines += [f"\n{side} has no numbers: {why}" for side, why in missing.items()]
        versions = {side: text for row in rows for side, text in row.versions.items()}
        facts = [report[name][key] for key in ("date", "commit", "machine")]
        known = "; ".join(f"{side}: {text}" for side, text in versions.items() if side != OURS)
        lines.append(f"\n{', '.join(facts)}{f'; {known}' if known else ''}.")
    return lines


def line(report: Mapping[str, Any]) -> str:
    """The report as a line of the history: the ratio of every row that has a peer."""
    parts = []
    for section, found in report.items():
        for row in map(Row.of, found["rows"]):
            parts += [
                f"{section} {row.name} {ratio:.2f} ({peer})"
                for peer in row.sides
                if peer != OURS and (ratio := row.ratio(peer)) is not None
            ]
    facts = next(iter(report.values()))
    return f"| {facts['date']} | {facts['commit']} | {facts['machine']} | {'; '.join(parts)} |"


def write(measured: Mapping[str, Any], root: pathlib.Path) -> list[pathlib.Path]:
    """Puts the measured sections into benchmarks/results.json and the table of docs/speed.md, and
    appends a line to benchmarks/history.md. `root`: the checkout. Returns the files."""
    json_file, page = root / "benchmarks" / "results.json", root / "docs" / "speed.md"
    history = root / "benchmarks" / "history.md"
    text = page.read_text()
    if _BEGIN not in text or _END not in text:
        raise RunError(f"{page} has no place for the table: {_BEGIN.strip()} and {_END.strip()}")
    complete = read(json_file) | dict(measured)
    json_file.write_text(json.dumps(complete, indent=1) + "\n")
    before, after = text.split(_BEGIN)[0], text.split(_END)[1]
    page.write_text(before + _BEGIN + "\n".join(table(complete)) + "\n\n" + _END + after)
    with history.open("a") as file:
        file.write(line(measured) + "\n")
    return [json_file, page, history]
