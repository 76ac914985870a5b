"""The keys of `config.data` that do not belong to its source."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from clipx.config.ranges import CountOrZero, Fraction, Positive, Range, Share
from clipx.data.framing import Framing, Interpolation, Resize
from clipx.data.limits import Limits
from clipx.data.manifests import MANIFESTS
from clipx.data.text.augment import TextAugmentConfig

TIMEOUT = 300.0  # seconds


@dataclasses.dataclass(frozen=True)
class FeaturesConfig:
    """`config.data.features`: folders that `python -m clipx.embed` wrote, in place of the pictures
    or captions of a frozen tower."""

    image: str | None = None
    text: str | None = None
    # random crops of each picture that `image.cache` stores; 0: the centre alone, as evaluation
    # sees it
    views: CountOrZero = 0
    # keeps what towers that are frozen below their heads compute of evaluated rows, for later
    # evaluations and other runs; None: in the workdir's features/evals if a tower has `cache`
    evals: str | None = None


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The keys of `config.data` that every source shares."""

    source: str  # what the data is: auto, webdataset, table, files, folder, tfds, shapes, mixture
    fraction: Share = 1.0  # share of the rows to train on; every run selects the same rows
    # rows to keep apart and evaluate on; auto: the smaller of 10 % and 1,000 if the data of an eval
    # has an empty path, else none. They are chosen by a hash of the picture
    holdout: CountOrZero | Literal["auto"] = "auto"
    # how evaluation, and training without random crops, make a square of a picture; under
    # open_clip's names (see framing.py)
    resize: Resize = "shortest"
    interpolation: Interpolation = "bicubic"  # of that resizing
    # decoding processes; 0: threads of the main process
    workers: Annotated[int, Range(0, 1024)] = 0
    # which of several captions to use; all: each in turn, one per epoch
    caption: Literal["random", "first", "all"] = "random"
    reject_cjk: bool = False  # count rows whose caption has Chinese characters as bad (DeCLIP)
    text_augment: TextAugmentConfig = TextAugmentConfig()  # for objectives that augment captions
    features: FeaturesConfig = FeaturesConfig()  # stored features of frozen towers
    teacher: str | None = None  # features from `clipx.teacher`, for objectives that use a teacher
    # clusters from `clipx.teacher`: rows 2i and 2i + 1 of a batch are from the same cluster
    clusters: str | None = None
    # the published data set that this data is a copy of, in whole or in part
    manifest: Literal[*MANIFESTS] | None = None  # pyright: ignore[reportInvalidTypeForm]
    max_bad_fraction: Fraction = 0.01  # tolerated share of bad rows; a higher one stops the run
    limits: Limits = Limits()  # a row beyond one is a bad row
    # seconds: so long an error of a remote file is tried again; a read that takes longer stops the
    # run
    timeout: Positive = TIMEOUT

    @property
    def framing(self) -> Framing:
        return Framing(self.resize, self.interpolation)
