"""The section `config.data`, but for the keys of its source."""

from __future__ import annotations

import dataclasses
from typing import Literal

from clipx.data.manifests import MANIFESTS
from clipx.data.text.augment import TextAugmentConfig
from clipx.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The keys of `config.data` beside its source's own."""

    source: str
    fraction: float = 1.0  # of the rows: so many, chosen once and for all
    workers: int = 0  # processes that decode; 0: threads of this one
    caption: Literal["random", "first", "all"] = "random"  # of several; all: in turn, one an epoch
    reject_cjk: bool = False  # a caption with Chinese characters counts as bad, as DeCLIP has it
    text_augment: TextAugmentConfig = TextAugmentConfig()  # of objectives that ask for it
    teacher: str | None = None  # rows that `clipx.teacher` wrote, for objectives that ask for them
    clusters: str | None = (
        None  # that `clipx.teacher` wrote: rows 2i and 2i + 1 of a batch share one
    )
    manifest: Literal[*MANIFESTS] | None = None  # the known set that this is, or is a part of
    max_bad_fraction: float = 0.01  # of the rows read; more stop the run

    def __post_init__(self):
        if not 0 < self.fraction <= 1:
            raise ConfigError("DataConfig.fraction", str(self.fraction), "more than 0, at most 1")
