"""The proof of a checkpoint: the size and the SHA-256 of every file in its folder.

Each process writes the proof of the files that it wrote, once the checkpoint is complete. So a
folder with all its proofs was written whole, and a file that no longer has its digest was changed
since. A folder without them is complete, but says nothing about its bytes: clipx 0.1 wrote none,
and a run may be killed right after a save.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import stat
from collections.abc import Callable, Sequence
from typing import Any

_NAME = "proof_{}.json"  # of a process
_FORMAT = 1
_THREADS = 4  # SHA-256 releases the interpreter's lock
_OWN = re.compile(r"(?:^|/)(?:ocdbt\.|array_metadatas/)process_(\d+)(?:/|$)")


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a folder says about itself. fault: why it is damaged; "" if nothing says so. proven:
    whether the digests of all its files are there."""

    fault: str = ""
    proven: bool = False


def write(folder: pathlib.Path, *, process: int = 0, processes: int = 1) -> None:
    """Writes the proof of the files of one process into the complete checkpoint `folder`, whose
    name is its step. Process 0 also proves what belongs to no process."""
    names = [name for name in _files(folder) if _owner(name, processes) == process]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        digests = pool.map(lambda name: _digest(folder / name), names)
    proof: dict[str, Any] = {"format": _FORMAT, "step": int(folder.name)}
    proof |= {"process": process, "processes": processes, "files": dict(zip(names, digests))}
    path = folder / _NAME.format(process)
    aside = path.with_suffix(".part")
    with open(aside, "w") as file:
        json.dump({**proof, "sha256": _own_digest(proof)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def check(
    folder: pathlib.Path, *, process: int = 0, processes: int = 1, without: str = "\0"
) -> Finding:
    """Compares a checkpoint with its proofs. Each of `processes` reads its share of the files, and
    all of them together read every file whose name does not start with `without`."""
    if not folder.is_dir():
        return Finding("it is no folder")
    if not any(folder.iterdir()):
        return Finding("it is empty")
    proofs = [folder / name for name in _files(folder, proofs=True)]
    if not proofs:
        return Finding()
    files: dict[str, tuple[int, str]] = {}
    writers = 0
    for path in proofs:
        try:
            proof = json.loads(path.read_bytes())
            own = proof.pop("sha256")
            if own != _own_digest(proof):
                raise ValueError
            step, writers = int(proof["step"]), int(proof["processes"])
            files |= {name: (int(size), str(text)) for name, (size, text) in proof["files"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return Finding(f"{path.name} is damaged")
        if step != int(folder.name):
            return Finding(f"it is the checkpoint of step {step}")
    if {p.name for p in proofs} != {_NAME.format(i) for i in range(writers)}:
        return Finding()  # a process was killed before it wrote its own
    share = sorted(files, key=lambda name: (files[name][0], name))[process::processes]
    share = [name for name in share if not name.startswith(without)]
    return Finding(_first(lambda name: _fault(folder / name, name, *files[name]), share), True)


def _first(fault: Callable[[str], str], names: Sequence[str]) -> str:
    """The first fault of the files, by name; "" if there is none."""
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return next(filter(None, pool.map(fault, sorted(names))), "")


def _fault(path: pathlib.Path, name: str, size: int, digest: str) -> str:
    """Why a file is not the one that was written; "" if it is."""
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            return f"{name} is no file"
        if about.st_size != size:
            return f"{name} has {about.st_size} of its {size} bytes"
        same = _digest(path)[1] == digest
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return "" if same else f"{name} has other bytes than were written"


def _digest(path: pathlib.Path) -> tuple[int, str]:
    """(bytes, SHA-256) of a file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest


def _own_digest(proof: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(proof, sort_keys=True).encode()).hexdigest()


def _files(folder: pathlib.Path, *, proofs: bool = False) -> list[str]:
    """The names of the files of a checkpoint, sorted: those that are proven, or the proofs."""
    if proofs:
        return sorted(p.name for p in folder.glob(_NAME.format("*")))
    paths = (p for p in folder.rglob("*") if p.is_file())
    names = (str(p.relative_to(folder)) for p in paths)
    return sorted(name for name in names if not name.startswith(_NAME.partition("{")[0]))


def _owner(name: str, processes: int) -> int:
    """The process that writes a file: it is part of the names of those that several write."""
    found = _OWN.search(name)
    number = int(found[1]) if found else 0
    return number if number < processes else 0
