"""Large blocks that are freed and taken again keep their pages; who sets malloc's own is obeyed."""

import os
import subprocess
import sys

import pytest
from support import ROOT

CODE = """
import resource
from clipx.parallel import memory
kept = memory.keep_pages()
bytearray(1 << 26)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    bytearray(1 << 26)  # 16,384 pages
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="settings of glibc")
def test_large_blocks_keep_their_pages():
    def run(**more):
        clean = {k: v for k, v in os.environ.items() if "MALLOC" not in k}
        clean = {k: v for k, v in clean.items() if k not in ("GLIBC_TUNABLES", "LD_PRELOAD")}
        environment = clean | {"PYTHONPATH": str(ROOT), **more}
        done = subprocess.run(
            [sys.executable, "-c", CODE], capture_output=True, text=True, env=environment
        )
        return done.stdout.split()

    kept, faults = run()
    assert kept == "True" and int(faults) < 1000
    kept, faults = run(MALLOC_ARENA_MAX="8")
    assert kept == "False" and int(faults) > 10_000
