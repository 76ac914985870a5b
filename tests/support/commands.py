"""`python -m clipx.NAME` in the test's own process: an import of JAX less for each command."""

import contextlib
import io
import logging
import runpy
import sys
import warnings
from typing import NamedTuple
from unittest import mock

from absl import app, flags
from absl import logging as absl_logging

from support import ROOT

assert app  # its own flags are defined before those of a command, and stay


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run(name, *arguments, folder=ROOT):
    """Runs clipx's command `name` in `folder`. Its flags are forgotten afterwards. Not for `plan`,
    which sets the number of JAX's devices."""
    before, out, err = set(flags.FLAGS), io.StringIO(), io.StringIO()
    verbosity = absl_logging.get_verbosity()
    handlers, level = logging.root.handlers[:], logging.root.level
    try:
        with (
            contextlib.chdir(folder),
            mock.patch.object(sys, "argv", [name, *arguments]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", "'clipx.* found in sys.modules")  # runpy's
            runpy.run_module(f"clipx.{name}", run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code or 0
    finally:
        for flag in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, flag)
        absl_logging.set_verbosity(verbosity)  # a command logs what is fatal alone
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)
    return Done(code, out.getvalue(), err.getvalue())
