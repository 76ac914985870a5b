"""Marks of tests that ask torch, open_clip or transformers, which may not be installed."""

import warnings

import pytest

from clipx.errors import MissingLibrary, install_hint
from clipx.interop import libraries


def missing(*names) -> str:
    """Why one of the libraries cannot be asked; empty if all can."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for name in names:
                libraries.require(name)
        except MissingLibrary as error:
            return f"{error}: {install_hint('interop')}"
    return ""


def asked(reason: str):
    """A mark of tests that ask a library, which are skipped for a reason where it is missing."""
    skip = pytest.mark.skipif(bool(reason), reason=reason or "-")
    return lambda test: pytest.mark.interop(skip(test))


NO_OPEN_CLIP = missing("torch", "open_clip", "transformers")
with_open_clip = asked(NO_OPEN_CLIP)
NO_TRANSFORMERS = missing("torch", "transformers")
with_transformers = asked(NO_TRANSFORMERS)
