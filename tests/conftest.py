"""Eight CPU devices stand for a mesh; programs are compiled fast rather than to be fast, and once
for the tests and the commands that they start."""

import atexit
import gc
import os
import pathlib
import shutil
import tempfile
from importlib.metadata import version

import pytest

pytest.register_assert_rewrite("support")
# Newer versions of jaxlib end the process on a flag that they no longer have.
OLD = tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11)
FASTER = [  # a third and a twelfth less to compile
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
]
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        *(FASTER if OLD else []),
    ]
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # all are shared
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers share what the process above them made
    for name in ("JAX_COMPILATION_CACHE_DIR", "CLIPX_CACHE"):
        os.environ[name] = tempfile.mkdtemp(prefix="clipx-test-")
        atexit.register(shutil.rmtree, os.environ[name], ignore_errors=True)
    if kept := os.environ.get("CLIPX_TEST_CACHE"):  # for programs, between calls of pytest
        os.environ["JAX_COMPILATION_CACHE_DIR"] = kept

# Files that train for a fixture of theirs come first: what a worker steals of another is the last
# that the other has, and a stolen test makes its fixtures again.
FIRST = [
    "training/test_episode_run.py",
    "test_train.py",
    "training/test_init_from.py",
    "laws/test_old_workdirs.py",
    "interop/test_interop_siglip.py",
    "interop/test_interop_judge.py",
    "parallel/test_processes.py",
]


def pytest_collection_modifyitems(items):
    def place(item):
        file = item.path.relative_to(pathlib.Path(__file__).parent).as_posix()
        return FIRST.index(file) if file in FIRST else len(FIRST)

    items.sort(key=place)


def pytest_collection_finish(session):
    """What is imported stays, and what tracing leaves is swept rarely: a sixth less to trace."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def pytest_sessionfinish(session):
    """pytest collects garbage ten times more: of all that a worker has made, once is enough."""
    gc.collect()
    gc.freeze()
