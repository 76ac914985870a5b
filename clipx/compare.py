"""`python -m clipx.compare --config=configs/compare_flickr8k.py --workdir=DIR`: trains the variants
of a config one after another, each in a folder of its own, and prints one table of their evals.

Started again it goes on where it stopped; what is finished is not trained again.
"""

from __future__ import annotations

import pathlib
import re
from typing import Any

from absl import flags

from clipx import cli, report
from clipx.config import binding as configs
from clipx.config import files
from clipx.errors import ConfigError
from clipx.train import train
from clipx.training import metrics
from clipx.training.checkpoint import read_json, refuse_other_config
from clipx.training.run import assemble

_PLAIN = ("/ami", "/gap")
_RECALL = re.compile(r"(.*)/(.*)_R@(\d+)")


def results(folder: pathlib.Path) -> dict[str, float]:
    """What the evals found at the last step that a workdir was evaluated at."""
    found: dict[int, dict[str, float]] = {}
    names = tuple(f"{name}/" for name in read_json(folder / "config.json")["evals"])
    for row in metrics.read(folder):
        if scores := {key: value for key, value in row.items() if key.startswith(names)}:
            found.setdefault(row["step"], {}).update(scores)  # evals may be added to a whole run
    return found[max(found)] if found else {}


def finished(folder: pathlib.Path, config: dict[str, Any]) -> bool:
    """Whether a workdir holds a whole run of this very config, its evals included. Raises
    `ConfigError` if it holds a run of another."""
    if not (folder / report.FILE).exists():  # which a run writes last
        return False
    complete = assemble(config).complete
    refuse_other_config(folder, complete)
    return read_json(folder / "config.json")["evals"] == configs.to_lists(complete["evals"])


def columns(found: dict[str, float]) -> dict[str, str]:
    """Table cells by their heads: recalls of one direction in one cell, and accuracies, both in %;
    then the mutual information of clusters with classes, and modality gaps."""
    recalls: dict[str, list[tuple[int, float]]] = {}
    cells: dict[str, str] = {}
    for key, value in found.items():
        if match := _RECALL.fullmatch(key):
            head = f"{match[1]} {match[2].replace('_to_', '→')} R@"
            recalls.setdefault(head, []).append((int(match[3]), value))
        elif key.endswith("/top1"):
            cells[key.removesuffix("/top1") + " top-1"] = f"{100 * value:.1f}"
        elif key.endswith(_PLAIN):
            cells[key.replace("/", " ")] = f"{value:.3f}"
    for head, values in recalls.items():
        values.sort()
        numbers = " / ".join(str(k) for k, _ in values)
        cells[head + numbers] = " / ".join(f"{100 * value:.1f}" for _, value in values)
    return dict(sorted(cells.items(), key=lambda cell: "R@" not in cell[0]))


def table(rows: dict[str, dict[str, str]]) -> list[str]:
    """Lines of a Markdown table; a cell that a row does not have is empty."""
    heads = list(dict.fromkeys(head for cells in rows.values() for head in cells))
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name, cells in rows.items():
        lines.append(f"| {name} | " + " | ".join(cells.get(head, "") for head in heads) + " |")
    return lines


def compare(config: str, chosen: tuple[str, ...], workdir: str, overrides) -> int:
    """Trains what is not finished and prints the table; the exit code is that of a run that did
    not end, or 0."""
    known = files.variants(config)
    for name in chosen:
        if name not in known:
            raise ConfigError("--variants", repr(name), "one of " + ", ".join(known))
    rows: dict[str, dict[str, str]] = {}
    for name in chosen or known:
        folder = pathlib.Path(workdir, name)
        values = cli.load_config(f"{config}:{name}", overrides)
        done = finished(folder, values)
        print(f"\n{name}{': done before' if done else ''}", flush=True)
        if not done and (code := train(values, str(folder))):
            return code
        rows[name] = columns(results(folder))
    print("\n" + "\n".join(table(rows)))
    return 0


def main(overrides: list[tuple[str, str]]) -> int:
    chosen = tuple(filter(None, (name.strip() for name in flags.FLAGS.variants)))
    return compare(flags.FLAGS.config, chosen, flags.FLAGS.workdir, overrides)


if __name__ == "__main__":
    flags.DEFINE_string("config", None, "Config file whose variants are compared.")
    flags.DEFINE_list("variants", [], "Some of them, separated by commas; all by default.")
    flags.DEFINE_string("workdir", None, "Folder of the runs: new, or one to go on with.")
    cli.run(main, required=("config", "workdir"))
