"""Malformed files of every kind are loaded or refused: none ends in a traceback, hangs, runs code,
or writes outside of its folder."""

import collections
import json
import os
import subprocess
import sys

import pytest
from support import ROOT, hostile

PROCESSES, SECONDS = 4, 600  # of a process for its part


def test_a_few_hostile_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLIPX_CACHE", str(tmp_path / "cache"))
    count = len(hostile.kinds())
    with hostile.timed():  # every kind: half of them damaged, half hostile
        found = [hostile.outcome(i + (i % 2) * count, tmp_path) for i in range(count)]
    wrong = [said for outcome, said in found if outcome not in ("loaded", "refused")]
    assert not wrong
    assert sum(outcome == "refused" for outcome, _ in found) > count / 4


@pytest.mark.slow
def test_five_thousand_hostile_files(tmp_path, capsys):
    total, running = 5000, []
    for i in range(PROCESSES):
        folder = tmp_path / str(i)
        folder.mkdir()
        running.append((folder, i * total // PROCESSES, (i + 1) * total // PROCESSES))
    outcomes, ends = [], []
    while running:
        started = [(_start(*part), part) for part in running]
        running = []
        for process, (folder, first, last) in started:
            try:
                process.communicate(timeout=SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
            lines = (folder / "outcomes.jsonl").read_text().splitlines()
            done = [json.loads(line) for line in lines][-1:] or [[first - 1]]
            if done[0][0] + 1 < last:  # the next file ended or stopped the process
                ends.append(f"{done[0][0] + 1}: the process ended with {process.returncode}")
                with (folder / "outcomes.jsonl").open("a") as out:
                    out.write(json.dumps([done[0][0] + 1, "crash", ends[-1]]) + "\n")
                running.append((folder, done[0][0] + 2, last))
            else:
                outcomes += [json.loads(line) for line in lines]
    counts = collections.Counter(outcome for _, outcome, _ in outcomes)
    with capsys.disabled():
        print(f"\n{len(outcomes)} files: {dict(counts)}")
    wrong = [said for _, outcome, said in outcomes if outcome not in ("loaded", "refused")]
    assert not wrong and not ends
    assert len(outcomes) == total and min(counts["loaded"], counts["refused"]) > total / 10


def _start(folder, first, last):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    environment |= {"CLIPX_CACHE": str(folder / "cache"), "TMPDIR": str(folder)}
    command = [sys.executable, "-m", "support.hostile", str(first), str(last), str(folder)]
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.DEVNULL)
