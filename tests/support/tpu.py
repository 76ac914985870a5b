"""A mark for tests that compile for TPUs."""

import importlib.util

import pytest

libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (the tpu extra)"
)
