"""The harness on a few of its cases, and on all of them where there is time."""

import os
import subprocess
import sys

import pytest
from support import ROOT

FEW = (
    r"^clip: (kill -9 \(save|SIGTERM \(step|worker killed as|newest checkpoint renamed to a later"
    r"|config.json cut|state/d/\* one bit)"
)


def harness(*arguments, seconds):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "chaos" / "harness.py"), *arguments],
        capture_output=True, text=True, timeout=seconds, env=dict(os.environ),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_few_faults():
    assert " 0 wrong" in harness(f"--only={FEW}", seconds=300)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["^[a-z]+: ", "2 processes", "4 processes"])
def test_all_faults(which):
    assert " 0 wrong" in harness(f"--only={which}", seconds=3600)
