"""`Encoder`: one pretrained tower in the files of another library."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from clipx.models.base import Tower
from clipx.types import PyTree


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A tower as its files describe it. `read` opens its weights."""

    layout: str  # the library whose layout the files have, such as "timm"
    tower: Tower  # with the files' settings, without a projection, in float32
    read: Callable[[], tuple[PyTree, PyTree]]  # () -> (params, batch_stats), float32 NumPy arrays
    # images: "mean" and "std" of the files, as config.objective has them
    preprocessing: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # texts: the config's section of the files' tokenizer
    tokenizer: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    longest: int = 0  # tokens of a text that a text tower takes, marks included
    notes: tuple[str, ...] = ()  # what was guessed, and what the library does otherwise than clipx
    # what clipx cannot reproduce, as "name: description"; `config.init_ignore` accepts it
    differences: tuple[str, ...] = ()
    # (tower) -> the same files with the settings of a config's tower that no file tells
    adapt: Callable[[Tower], Encoder] | None = None
