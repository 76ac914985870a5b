"""Builds loaders from keyword arguments alone."""

from __future__ import annotations

import numpy as np

from clipx.data.config import DataConfig
from clipx.data.loader import Loader
from clipx.data.order import Sampling

_SAMPLING = ("episode_steps", "with_replacement", "clusters", "left_out")


def build_loader(
    source,
    tokenizer,
    *,
    batch_size,
    seed=1,
    image_size=32,
    positions=None,
    crops=((0.9, 1.0),),
    flips=None,
    survey=False,
    texts=("caption",),
    mirror_words=False,
    features=None,
    tokens=False,
    row_ids=None,
    **values,
) -> Loader:
    """A loader of the complete batch. `values` are fields of `Sampling` or of `DataConfig`."""
    from clipx.ops.photometry import Policy  # not at the top: workers import this file
    from clipx.types import View, Views

    flips = flips or (False,) * len(crops)
    sampling = Sampling(**{name: values.pop(name) for name in _SAMPLING if name in values})
    pictures = tuple(View(crop, flip, Policy()) for crop, flip in zip(crops, flips, strict=True))
    return Loader(
        source,
        tokenizer,
        Views(pictures, texts, mirror_words),
        DataConfig("a test's", **values),
        seed=seed,
        batch_size=batch_size,
        positions=np.arange(batch_size) if positions is None else positions,
        image_size=image_size,
        sampling=sampling,
        survey=survey,
        features=features,
        tokens=tokens,
        row_ids=row_ids,
    )
