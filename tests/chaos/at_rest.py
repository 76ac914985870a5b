"""Faults of a stopped run's files: its checkpoints, config, tokenizer and metrics."""

from __future__ import annotations

import json
import pathlib
import shutil

from chaos.config import STEPS
from chaos.faults import CHANGES, Fault, cut, newest, steps


def kinds(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """One file of each kind of the newest checkpoint; of arrays the largest."""
    step, found = newest(folder), {}
    for path in sorted(p for p in step.rglob("*") if p.is_file()):
        relative = path.relative_to(step)
        kind = f"{relative.parent}/*" if relative.parent.name == "d" else str(relative)
        if kind not in found or path.stat().st_size > found[kind].stat().st_size:
            found[kind] = path
    return found


def at_rest(method: str, files: list[str]) -> list[Fault]:
    """Faults of a stopped run's files. files: the kinds of files of a checkpoint."""
    changes = CHANGES if method == "clip" else {k: CHANGES[k] for k in ("cut", "one bit flipped")}
    made = [
        Fault(
            f"{kind} {name}",
            (0,),
            damage=lambda folder, k=kind, f=change: f(kinds(folder)[k]),
            newest=True,
        )
        for kind in files
        for name, change in changes.items()
    ]

    def all_of_it(folder):
        for path in newest(folder).iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def renamed(to):
        return lambda folder: newest(folder).rename(newest(folder).with_name(str(to)))

    def every(folder):
        for step in steps(folder):
            for path in (folder / "run" / "checkpoints" / str(step)).rglob("*"):
                if path.is_file():
                    cut(path)

    made += [
        Fault("newest checkpoint emptied", (0,), damage=all_of_it, newest=True),
        Fault(
            "newest checkpoint removed",
            (0,),
            damage=lambda f: shutil.rmtree(newest(f)),
            newest=True,
        ),
        Fault("newest checkpoint renamed to an earlier step", (0,), damage=renamed(5), newest=True),
        Fault(
            "newest checkpoint renamed to a later step", (0,), damage=renamed(STEPS), newest=True
        ),
        Fault("all checkpoints cut", (1,), damage=every, refused="checkpoint"),
    ]
    for name in ("config.json", "tokenizer.json", "metrics.jsonl"):
        for what, change in CHANGES.items():
            if name == "metrics.jsonl" and what == "one bit flipped":
                continue
            made.append(
                Fault(f"{name} {what}", (0,), damage=lambda f, n=name, c=change: c(f / "run" / n))
            )

    def swapped(folder):
        path = folder / "run" / "tokenizer.json"
        shutil.copy(path, folder / "tokenizer.kept")
        saved = json.loads(path.read_text())
        path.write_text(json.dumps(_other(saved)))

    def restored(folder):
        shutil.move(folder / "tokenizer.kept", folder / "run" / "tokenizer.json")

    def another(folder):
        path = folder / "run" / "config.json"
        shutil.copy(path, folder / "config.kept")
        saved = json.loads(path.read_text())
        saved["optimizer"]["learning_rate"] = 0.5
        path.write_text(json.dumps(saved))

    def back(folder):
        shutil.move(folder / "config.kept", folder / "run" / "config.json")

    made += [
        Fault(
            "another valid tokenizer.json",
            (2, 1),
            damage=swapped,
            undo=restored,
            refused="tokenizer",
        ),
        Fault(
            "another valid config.json", (2, 1), damage=another, undo=back, refused="learning_rate"
        ),
    ]
    return made


def _other(saved):
    """A tokenizer's JSON with another valid setting."""
    changed = json.loads(json.dumps(saved))
    config = changed.get("config", changed)
    config["context"] = config["context"] - 2
    return changed
