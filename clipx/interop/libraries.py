"""Optional libraries: torch, open_clip and transformers are imported only when they are needed."""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from clipx.errors import MissingLibrary


def require(name: str) -> Any:
    """Imports and returns the module `name`. Raises `MissingLibrary` if it is not installed or its
    import fails."""
    try:
        with quiet():
            if name not in sys.modules:
                _import_torchvision()
            return importlib.import_module(name)
    except ImportError as error:
        if getattr(error, "name", None) == name:
            raise MissingLibrary(f"{name} is not installed") from None
        raise MissingLibrary(f"{name} does not import ({one_line(error)})") from None
    except Exception as error:  # a torchvision that does not match its torch raises RuntimeError
        raise MissingLibrary(f"{name} does not import ({one_line(error)})") from None


@functools.cache
def _import_torchvision() -> None:
    """Imports torchvision, if installed, before open_clip, timm and transformers import it.

    A torchvision built for another torch (a CUDA wheel beside a CPU torch) misses its compiled
    operators, and its import fails where it registers two of them. clipx uses neither. This
    function declares both without a body and imports torchvision again.
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
        _KEPT.append(declared)  # freeing the library would remove its operators
        for module in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
            del sys.modules[module]
        importlib.import_module("torchvision")


_KEPT: list[Any] = []


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A context that silences the libraries' warnings: none of them concerns the model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def one_line(error: BaseException) -> str:
    """The message of an exception, on one line of at most 200 characters."""
    return " ".join(str(error).split())[:200]
