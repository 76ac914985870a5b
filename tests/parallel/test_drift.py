"""How far several processes drift from one: rounding, and no more."""

import os
import subprocess
import sys

import numpy as np
import pytest
from support import ROOT
from support.runs import free_port

STEPS, PROCESSES = 30, 4


def train(name, dtype, processes, folder):
    """What `support.drift` computes in so many processes, each with one device."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": path}
    file = folder / f"{name}-{dtype}-{processes}.npz"
    several = [f"127.0.0.1:{free_port()}", str(processes)] if processes > 1 else []
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "support.drift", name, dtype, str(STEPS), str(file),
             *several, *[str(i)] * bool(several)],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in range(processes)
    ]  # fmt: skip
    output = [process.communicate(timeout=600)[0] for process in started]
    assert not any(process.returncode for process in started), output
    return np.load(file)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["declip", "slip"])  # with BatchNorm in their heads
def test_the_drift_of_four_processes_is_rounding(name, tmp_path):
    """It falls with the unit of rounding, by 2^29 from float32 to float64. A fault, such as
    statistics of a process's own rows or random keys of its own, would be as large in float64."""
    drifts = {}
    for dtype in ("float32", "float64"):
        one, four = (train(name, dtype, count, tmp_path) for count in (1, PROCESSES))
        drifts[dtype] = {x: np.abs(one[x] - four[x]).max() / np.abs(one[x]).max() for x in one}
    print(name, drifts)
    assert 0 < drifts["float32"]["loss"] < 1e-3 and drifts["float64"]["loss"] < 1e-11
    for what, drift in drifts["float32"].items():
        assert drifts["float64"][what] < 1e-6 * drift
