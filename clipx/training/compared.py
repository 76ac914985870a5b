"""What `clipx.compare` writes beside a run that it trains."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any, TypedDict

from clipx.config import reading
from clipx.config.binding import to_lists
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
    config: str  # `digest` of the values that the run was planned with
    commit: str  # of the clipx that trained it
    failed: str  # why a trial could not be trained to its end


def digest(config: Mapping[str, Any]) -> str:
    """Twelve digits that stand for the values of a config."""
    text = json.dumps(to_lists(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


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
