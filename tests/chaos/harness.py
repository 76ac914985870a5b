"""`python tests/chaos/harness.py`: breaks real runs on purpose, and compares what comes of them.

Each case trains CLIP, DeCLIP or ProtoCLIP in one, two or four processes, lets one fault happen,
starts the same command again, and holds the end to a run without a fault: the same bits of the
state, and the same metrics. `--only=REGEX` picks cases by name, `--every=N` each N-th of them.
`--write` puts the outcomes into README.md's table, which keeps the rows of other
cases. Exits with 1 if a case went wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "CLIPX_WAIT_SECONDS": "60",  # for a process that never starts; below `forks.LIMIT`
    "PYTHONPATH": os.pathsep.join(sys.path[:2]),
    "PYTHONWARNINGS": "ignore",
}
os.environ.update(ENVIRONMENT)

from chaos import at_rest, faults, forks  # noqa: E402  after the environment, which JAX reads
from chaos.config import SAVE, VARIANTS  # noqa: E402
from chaos.faults import Fault  # noqa: E402
from support.runs import free_port  # noqa: E402
from support.shards import shard  # noqa: E402

ROWS = 64
NONE = Fault("none", (0,))  # a start that nothing breaks
BEGIN, END = "<!-- table -->", "<!-- end of the table -->"


@dataclasses.dataclass(frozen=True)
class Case:
    fault: Fault
    method: str
    processes: int = 1
    at: int = 0  # the process that is broken

    @property
    def name(self) -> str:
        many = f", {self.processes} processes" if self.processes > 1 else ""
        return f"{self.method}{many}: {self.fault.name}"


@dataclasses.dataclass(frozen=True)
class Outcome:
    case: Case
    codes: str  # of the broken run's processes
    again: int  # steps that were done twice
    wrong: str  # what is not as it must be; "" if all is
    skipped: str = ""


class Harness:
    """Runs of one temporary folder, which share compiled programs."""

    def __init__(self, folder: pathlib.Path, seed: int):
        self.folder, self.seed, self.number = folder, seed, 0
        self.expected: dict[tuple[str, int], dict] = {}
        self.stopped: dict[tuple[str, int], pathlib.Path] = {}
        os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ.get(
            "CLIPX_TEST_CACHE", str(folder / "programs")
        )
        os.environ["CLIPX_CACHE"] = str(folder / "cache")
        self.data = folder / "pairs.tar"
        shard(self.data, ROWS)

    def new(self) -> pathlib.Path:
        """A new folder with its own data and an empty workdir."""
        self.number += 1
        folder = self.folder / f"case-{self.number}"
        (folder / "data").mkdir(parents=True)
        shutil.copy2(self.data, folder / "data" / "pairs.tar")
        (folder / "run").mkdir()
        return folder

    def start(
        self, case: Case, folder: pathlib.Path, *, broken: bool = False, hook=None
    ) -> list[forks.Process]:
        """Starts the command of a case, in all its processes."""
        arguments = [
            f"--config={HERE / 'config.py'}:{case.method}",
            f"--workdir={folder / 'run'}",
            *case.fault.arguments,
        ]
        port, started = free_port(), []
        for i in range(case.processes):
            env = {"CHAOS_DATA": str(folder / "data")}
            if case.processes > 1:
                env |= {
                    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                    "JAX_NUM_PROCESSES": str(case.processes),
                    "JAX_PROCESS_ID": str(i),
                }
            mine = hook if broken and i == case.at else None
            out = folder / f"out-{len(list(folder.glob('out-*')))}.txt"
            started.append(forks.Process(arguments, out, env, mine))
        return started

    def reference(self, case: Case) -> dict:
        """What a run without a fault comes to."""
        key = (case.method, case.processes)
        if key not in self.expected:
            plain = Case(NONE, *key)
            folder = self.new()
            started = self.start(plain, folder)
            forks.wait(started)
            if any(process.code for process in started):
                raise SystemExit(f"{plain.name}:\n" + "\n".join(p.text for p in started))
            self.expected[key] = forks.result(folder / "run", case.processes)
        return self.expected[key]

    def half(self, case: Case) -> pathlib.Path:
        """The folder of a run that was killed after its second checkpoint."""
        key = (case.method, case.processes)
        if key not in self.stopped:
            folder = self.new()

            def hook() -> None:
                from clipx.training.loop import Trainer

                drain = Trainer._drain

                def until(self, pending, keep):
                    if pending and pending[-1][0] > 2 * SAVE:
                        self.checkpoints.wait()
                        os.kill(os.getpid(), 9)
                    return drain(self, pending, keep)

                Trainer._drain = until

            plain = Case(Fault("half", (-9,)), *key)
            started = self.start(plain, folder, broken=True, hook=hook)
            forks.wait(started)
            if faults.steps(folder) != [SAVE, 2 * SAVE]:
                raise SystemExit(f"{plain.name}:\n" + "\n".join(p.text for p in started))
            self.stopped[key] = folder
        return self.stopped[key]

    def run(self, case: Case) -> Outcome:
        """What comes of a case."""
        expected = self.reference(case)
        rng = random.Random(f"{self.seed} {case.name}")
        fault, codes, wrong, again = case.fault, "", [], 0
        if fault.damage is None:
            folder = self.new()
            if fault.disk and not _mount(folder / "run"):
                return Outcome(case, "", 0, "", "mounting a disk needs rights that are missing")
            assert fault.hook
            started = self.start(case, folder, broken=True, hook=fault.hook(rng, folder))
            forks.wait(started)
            wrong += _faults_of(case, started)
            codes = " ".join(str(process.code) for process in started)
        else:
            folder = self.new()
            half = self.half(case)
            shutil.rmtree(folder / "run")
            shutil.copytree(half / "run", folder / "run", symlinks=True)
            fault.damage(folder)
            if fault.refused:
                started = self.start(case, folder)
                forks.wait(started)
                codes = " ".join(str(process.code) for process in started)
                wrong += _faults_of(case, started)
                if not any(fault.refused in process.text for process in started):
                    wrong.append(f"does not say {fault.refused!r}")
                if fault.refused == "checkpoint":  # nothing is left to go on from
                    return self.close(case, folder, codes, 0, wrong)
        fault.undo(folder)
        saved = faults.steps(folder)
        before = len(_starts(folder))
        if any(c != "0" for c in codes.split()) or not codes:
            plain = Case(NONE, case.method, case.processes)
            started = self.start(plain, folder)
            forks.wait(started)
            wrong += _faults_of(plain, started, "second start: ")
            starts = _starts(folder)[before:]
            enough = (saved[-2] if fault.newest and len(saved) > 1 else saved[-1]) if saved else 0
            enough = min(enough, SAVE) if fault.newest else enough
            if starts and starts[0] < enough:
                wrong.append(f"went on from step {starts[0]}, and {enough} was saved")
            again = (saved[-1] - starts[0]) if starts and saved else 0
        if not wrong:
            found = forks.result(folder / "run", case.processes)
            for name in ("digests", "rows"):
                if found[name] != expected[name]:
                    wrong.append(f"other {name}")
        return self.close(case, folder, codes or "-", max(again, 0), wrong)

    def close(self, case, folder, codes, again, wrong) -> Outcome:
        if case.fault.disk:
            subprocess.run(["umount", "-l", str(folder / "run")], check=False)
        if wrong:
            for out in sorted(folder.glob("out-*")):
                print(f"--- {case.name}, {out.name}\n{out.read_text(errors='replace')[-3000:]}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
        return Outcome(case, codes, again, "; ".join(wrong))


def _faults_of(case: Case, started: list[forks.Process], which: str = "") -> list[str]:
    """What a start of a case did that none may do, each after the words `which`."""
    wrong = []
    # JAX may notice first that a process is gone: it aborts then, which is 134 in a shell
    peers = () if case.fault is NONE else (134, -6, 1, 42)
    for i, process in enumerate(started):
        right = case.fault.codes if i == case.at else (*case.fault.codes, *peers)
        if process.hung:
            wrong.append(f"{which}process {i} hangs")
        elif process.code not in right:
            wrong.append(f"{which}process {i} ended with {process.code}")
        if "Traceback (most recent call last)" in process.text:
            wrong.append(f"{which}process {i} printed a traceback")
    return wrong


def _starts(folder: pathlib.Path) -> list[int]:
    path = folder / "run" / "starts.txt"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def _mount(folder: pathlib.Path) -> bool:
    """Whether `folder` is a disk of 8 MiB now."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    return subprocess.run(mount, capture_output=True).returncode == 0


def cases(harness: Harness) -> Iterator[Case]:
    files = list(at_rest.kinds(harness.half(Case(NONE, VARIANTS[0]))))
    for method in VARIANTS:
        for fault in (
            *faults.running(method),
            *faults.shards(method),
            *faults.disks(method),
            *at_rest.at_rest(method, files),
        ):
            yield Case(fault, method)
    for processes in (2, 4):
        for method in VARIANTS if processes == 2 else VARIANTS[:1]:
            for i, fault in enumerate(faults.peers(method)):
                yield Case(fault, method, processes, at=i % processes)


HEADS = ["| Case | Exit codes | Steps done twice | Outcome |", "|---|---|---|---|"]


def row(outcome: Outcome) -> str:
    """A case's row of the table."""
    case, wrong, skipped = outcome.case, outcome.wrong, outcome.skipped
    right = "refused by name" if case.fault.refused else "same bits"
    what = f"skipped: {skipped}" if skipped else f"wrong: {wrong}" if wrong else right
    return f"| {case.name} | {outcome.codes} | {outcome.again} | {what} |"


def write(outcomes: list[Outcome]) -> None:
    """Puts the outcomes into the table of README.md, which keeps its other rows."""
    path = HERE / "README.md"
    head, rest = path.read_text().split(BEGIN)
    before, tail = rest.split(END)
    rows = {line.split(" | ")[0]: line for line in before.splitlines() if line.startswith("| ")}
    rows.pop("| Case", None)
    rows |= {line.split(" | ")[0]: line for line in map(row, outcomes)}
    counts = {
        what: sum(f"| {what}: " in line for line in rows.values()) for what in ("skipped", "wrong")
    }
    parts = [f"{sum(f', {n} processes: ' in name for name in rows)} in {n}" for n in (2, 4)]
    summary = (
        f"{len(rows)} faults, {', '.join(parts)} processes: {counts['wrong']} wrong, "
        f"{counts['skipped']} skipped."
    )
    lines = "\n".join([*HEADS, *rows.values()])
    path.write_text(f"{head}{BEGIN}\n{summary}\n\n{lines}\n{END}{tail}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--only", default="", help="regular expression of the cases' names")
    parser.add_argument("--every", type=int, default=1, help="each N-th case alone")
    parser.add_argument("--seed", type=int, default=0, help="of the times at which faults come")
    parser.add_argument("--list", action="store_true", help="print the cases' names alone")
    parser.add_argument(
        "--write", action="store_true", help="put the outcomes into README.md's table"
    )
    args = parser.parse_args()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="clipx-chaos-"))
    outcomes, begun = [], time.monotonic()
    try:
        harness = Harness(folder, args.seed)
        chosen = [c for c in cases(harness) if re.search(args.only, c.name)][:: args.every]
        for i, case in enumerate(chosen):
            if args.list:
                print(case.name)
                continue
            outcome = harness.run(case)
            outcomes.append(outcome)
            if args.write:
                write([outcome])
            what = outcome.skipped or outcome.wrong or "as it must be"
            print(f"{i + 1}/{len(chosen)}  {case.name}  [{outcome.codes}]  {what}", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    wrong = [o for o in outcomes if o.wrong]
    skipped = sum(bool(o.skipped) for o in outcomes)
    took = time.monotonic() - begun
    print(f"{len(outcomes)} faults, {skipped} skipped, {len(wrong)} wrong, {took:.0f} s")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
