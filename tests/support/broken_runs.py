"""A hundred ways to break the workdir of a run that was killed after step 8, and what comes of it.

The checkpoints are of steps 4 and 8. A case is a name, what breaks the workdir, and what the run
does
when it is started again: the step that it goes on from, or the error that it ends with.
"""

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import NamedTuple

from clipx.errors import CheckpointError, ConfigError

FILES = {  # of a checkpoint
    "arrays": "state/ocdbt.process_0/d/*",
    "manifest": "state/manifest.ocdbt",
    "part": "state/d/*",
    "manifest of a process": "state/ocdbt.process_0/manifest.ocdbt",
    "tree": "state/_METADATA",
    "shardings": "state/_sharding",
    "sizes": "state/array_metadatas/process_0",
    "config": "run/metadata",
    "scores": "metrics/metrics",
    "times": "_CHECKPOINT_METADATA",
    "lines": "metrics.jsonl",
    "proof": "proof_0.json",
}
OWN = ("config.json", "tokenizer.json", "metrics.jsonl")  # files of the workdir


class Case(NamedTuple):
    name: str
    break_it: Callable[[pathlib.Path], object]
    step: int | None  # that the run goes on from
    said: str = ""  # part of the one line that is printed or raised
    error: type[Exception] | None = None


def truncate(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: pathlib.Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path: pathlib.Path) -> None:
    path.write_bytes(b"")


def remove(path: pathlib.Path) -> None:
    path.unlink()


def swap(path: pathlib.Path) -> None:
    """As many other bytes, as of another program's file."""
    path.write_bytes(b"\x89PNG" * (path.stat().st_size // 4) + b"x" * (path.stat().st_size % 4))


HOW = (truncate, flip, empty, remove, swap)


def find(workdir: pathlib.Path, step: int, pattern: str) -> pathlib.Path:
    """The largest of the files that match."""
    found = list((workdir / "checkpoints" / str(step)).glob(pattern))
    return max(found, key=lambda path: path.stat().st_size)


def _at(workdir: pathlib.Path, step: int) -> pathlib.Path:
    return workdir / "checkpoints" / str(step)


def _rename(old: int, new: int, *, proof: bool = True) -> Callable[[pathlib.Path], None]:
    def rename(workdir):
        shutil.rmtree(_at(workdir, new), ignore_errors=True)
        shutil.copytree(_at(workdir, old), _at(workdir, new))
        if old == 8:
            shutil.rmtree(_at(workdir, old))
        if not proof:
            remove(find(workdir, new, FILES["proof"]))

    return rename


def _unproven(workdir: pathlib.Path, pattern: str = "", how: Callable = truncate) -> None:
    remove(find(workdir, 8, FILES["proof"]))
    if pattern:
        how(find(workdir, 8, pattern))


def _emptied(workdir: pathlib.Path) -> None:
    shutil.rmtree(_at(workdir, 8))
    _at(workdir, 8).mkdir()


def _a_file(workdir: pathlib.Path) -> None:
    shutil.rmtree(_at(workdir, 8))
    _at(workdir, 8).write_bytes(b"")


def _both(how: Callable) -> Callable[[pathlib.Path], None]:
    def both(workdir):
        for step in (4, 8):
            how(find(workdir, step, FILES["arrays"]))

    return both


def _aside(workdir: pathlib.Path) -> None:
    for step in (4, 8):
        _at(workdir, step).rename(_at(workdir, step).with_suffix(".damaged"))


def _edit(name: str, change: Callable) -> Callable[[pathlib.Path], None]:
    def edit(workdir):
        values = json.loads((workdir / name).read_text())
        change(values)
        (workdir / name).write_text(json.dumps(values))

    return edit


def _nested(workdir: pathlib.Path) -> None:
    (workdir / "config.json").write_text("[" * 100_000)


def _lines(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[pathlib.Path], None]:
    def edit(workdir):
        lines = (workdir / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        (workdir / "metrics.jsonl").write_bytes(b"".join(change(lines)))

    return edit


def _cases() -> list[Case]:
    cases = []
    for kind, pattern in FILES.items():
        for how in HOW:
            step, said = 4, "Step 4 is taken: 4 steps are done again"
            if (kind, how) == ("proof", remove):
                step, said = 8, "a checkpoint without proof"
            name = f"{kind} of the newest checkpoint: {how.__name__}"
            cases.append(Case(name, lambda w, p=pattern, h=how: h(find(w, 8, p)), step, said))
    for kind in (
        "scores",
        "config",
    ):  # of a checkpoint that is not taken: Orbax reads it all the same
        cases.append(
            Case(
                f"{kind} of the older", lambda w, p=FILES[kind]: truncate(find(w, 4, p)), 8, "4.dam"
            )
        )
    cases += [
        Case("without proof: cut arrays", lambda w: _unproven(w, FILES["arrays"]), 4, "Step 4 is"),
        Case(
            "without proof: no arrays", lambda w: _unproven(w, FILES["arrays"], remove), 4, "Step"
        ),
        Case("without proof: cut config", lambda w: _unproven(w, FILES["config"]), 4, "Step 4 is"),
        Case(
            "without proof: cut tree", lambda w: _unproven(w, FILES["tree"]), 4, "Step 4 is taken"
        ),
        Case("without proof: cut scores", lambda w: _unproven(w, FILES["scores"]), 4, "Step 4 is"),
        Case("without proof: renamed", _rename(8, 10, proof=False), 4, "the state of step 8"),
        Case("an emptied folder", _emptied, 4, "it is empty"),
        Case("a file in its place", _a_file, 4, "it is no folder"),
        Case(
            "renamed to a later step", _rename(8, 10), 4, "is the checkpoint of step 8); renamed to"
        ),
        Case("the older one as the newest", _rename(4, 8), 4, "it is the checkpoint of step 4"),
        Case("all are cut", _both(truncate), None, "no checkpoint is left", CheckpointError),
        Case("all are flipped", _both(flip), None, "no checkpoint is left", CheckpointError),
        Case("all were set aside", _aside, None, "only damaged ones: 4.damaged", CheckpointError),
    ]
    for name in OWN:
        for how in HOW:
            what = "missing" if how is remove else "damaged"
            case = Case(f"{name}: {how.__name__}", lambda w, n=name, h=how: h(w / n), 8)
            if (name, how) == ("tokenizer.json", flip):  # one other letter: a valid vocabulary
                said = "tokenizer: another vocabulary"
                cases.append(case._replace(step=None, said=said, error=ConfigError))
            else:
                cases.append(case._replace(said=f"{name} was {what}"))
    other = "which is not of the run of checkpoint 8"
    cases += [
        Case("config.json: nested", _nested, 8, "config.json was damaged"),
        Case("config.json: a letter of a key",
             _edit("config.json", lambda c: c["text"].update(widtl=c["text"].pop("width"))), 8,
             "config.json was damaged"),
        Case("config.json: another seed", _edit("config.json", lambda c: c.update(seed=7)), None,
             other, ConfigError),
        Case("config.json: another learning rate",
             _edit("config.json", lambda c: c["optimizer"].update(learning_rate=0.5)), None,
             "optimizer.learning_rate: ", ConfigError),
        Case("config.json: logs more often",
             _edit("config.json", lambda c: c["train"].update(log_every_steps=3)), 8),
        Case("tokenizer.json: another context",
             _edit("tokenizer.json", lambda t: t["config"].update(context=9)), None,
             "tokenizer.context: ", ConfigError),
        Case("metrics.jsonl: a line less", _lines(lambda lines: lines[1:]), 8, "was damaged"),
        Case("metrics.jsonl: later lines", _lines(lambda lines: [*lines, lines[-1]]), 8),
        Case("nothing", lambda w: None, 8),
    ]  # fmt: skip
    return cases


CASES = _cases()
QUICK = {  # one for each thing that may come of it
    "arrays of the newest checkpoint: flip",
    "tree of the newest checkpoint: truncate",
    "config of the newest checkpoint: remove",
    "proof of the newest checkpoint: remove",
    "proof of the newest checkpoint: flip",
    "scores of the older",
    "without proof: cut arrays",
    "without proof: renamed",
    "an emptied folder",
    "renamed to a later step",
    "all are flipped",
    "all were set aside",
    "config.json: truncate",
    "config.json: a letter of a key",
    "config.json: another seed",
    "config.json: logs more often",
    "tokenizer.json: remove",
    "tokenizer.json: another context",
    "metrics.jsonl: empty",
    "metrics.jsonl: later lines",
    "nothing",
}
