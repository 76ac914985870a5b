"""Eight CPU devices stand for a mesh; programs are compiled fast rather than to be fast, and once
for the tests and the commands that they start."""

import atexit
import os
import shutil
import tempfile
from importlib.metadata import version

import pytest

pytest.register_assert_rewrite("support")
# Newer versions of jaxlib end the process on a flag that they no longer have.
OLD = tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11)
EMITTERS = ["--xla_cpu_use_fusion_emitters=false"] if OLD else []
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        *EMITTERS,  # a third less to compile
    ]
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers share what the process above them made
    for name in ("JAX_COMPILATION_CACHE_DIR", "CLIPX_CACHE"):
        os.environ[name] = tempfile.mkdtemp(prefix="clipx-test-")
        atexit.register(shutil.rmtree, os.environ[name], ignore_errors=True)
    if kept := os.environ.get("CLIPX_TEST_CACHE"):  # for programs, between calls of pytest
        os.environ["JAX_COMPILATION_CACHE_DIR"] = kept
