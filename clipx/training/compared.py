"""What `clipx.compare` writes beside a run that it trains."""

from __future__ import annotations

import pathlib
from typing import Any, TypedDict

from clipx.config import reading
from clipx.errors import damaged_file

FILE = "compared.json"


class Record(TypedDict, total=False):
    """The content of the file. All keys may be missing."""

    variant: str
    kind: str  # final, trial or timing
    budget: str  # what is equal between the variants: pairs, flops or seconds
    changes: dict[str, Any]  # key of the config -> the value in place of the variant's own
    metric: str  # that scores a trial
    size: float  # pairs that it sees, as a share of those of the variant's final runs
    seconds: float  # of wall time, evaluations and compiling included
    failed: str  # why a trial could not be trained to its end


def read(folder: pathlib.Path) -> Record:
    """What was recorded of the run in a folder; nothing for one that `clipx.compare` did not train.
    Raises `ConfigError` for a damaged file."""
    path = folder / FILE
    try:
        return reading.read_json(path, Record)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise damaged_file(path, error) from None
