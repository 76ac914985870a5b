"""Optional libraries: torch, open_clip and transformers are imported only when they are asked."""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import warnings
from typing import Any

from clipx.errors import MissingLibrary


def require(name: str) -> Any:
    """The module `name`, imported. Raises `MissingLibrary` if it is not installed or fails."""
    try:
        with quiet():
            if name not in sys.modules:
                _torchvision()
            return importlib.import_module(name)
    except ImportError as error:
        if getattr(error, "name", None) == name:
            raise MissingLibrary(f"{name} is not installed") from None
        raise MissingLibrary(f"{name} does not import ({one_line(error)})") from None
    except Exception as error:  # a torchvision that does not match its torch raises RuntimeError
        raise MissingLibrary(f"{name} does not import ({one_line(error)})") from None


@functools.cache
def _torchvision() -> None:
    """Imports torchvision if it is installed: open_clip, timm and transformers will import it too.

    A torchvision that was built for another torch (a CUDA wheel beside a CPU torch) does not find
    its compiled operators and fails when it describes two of them. clipx needs neither, so both
    are declared without a body and the import is tried again.
    """
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            return
        torch = importlib.import_module("torch")
        declared = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            declared.define(f"{operator}(Tensor dets, Tensor scores, float threshold) -> Tensor")
        _KEPT.append(declared)  # its operators are undeclared when it is freed
        for module in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
            del sys.modules[module]
        importlib.import_module("torchvision")


_KEPT: list[Any] = []


@contextlib.contextmanager
def quiet():
    """A context without the libraries' warnings: none of them is about the model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def one_line(error: BaseException) -> str:
    """What an exception says, on one line of at most 200 characters."""
    return " ".join(str(error).split())[:200]
