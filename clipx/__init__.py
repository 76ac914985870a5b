"""clipx: image-text models from little data, in JAX.

`clipx.load(path)` opens a trained model. Importing clipx alone imports nothing heavy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipx.serving.model import load as load

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "load":
        from clipx.serving.model import load

        return load
    raise AttributeError(f"module 'clipx' has no attribute {name!r}")
