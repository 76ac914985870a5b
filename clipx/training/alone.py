"""A run on one device, to look at its data or to time its loading."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from clipx.training.feed import TrainingData, open_data, to_batch
from clipx.training.initial import open_tokenizer
from clipx.training.run import OpenRun, assemble, with_data
from clipx.training.step import row_keys
from clipx.types import Stored


def open_alone(config: Mapping[str, Any]) -> tuple[OpenRun, TrainingData]:
    """The run of `config` on one device, without evals, and its data. A batch larger than the data
    is reduced to the number of rows."""
    alone = {**config, "mesh": {}, "evals": {}, "train": {**config.get("train", {}), "best": ""}}
    run = assemble(alone, jax.devices()[:1])
    data = dataclasses.replace(open_data(run), features={})  # pictures and captions are looked at
    tokenizer = open_tokenizer(run, data.source)
    if len(data) < run.batch_size:
        alone["train"] |= {"batch_size": max(len(data), 1), "microbatches": 1}
        run = assemble(alone, jax.devices()[:1])
    return with_data(run, len(data), tokenizer), data


def after_photometry(run: OpenRun, pieces: Mapping[str, np.ndarray]) -> Iterator[jax.Array]:
    """Each picture view of a batch at step 0 after the colour augmentation and before the towers
    normalise it, uint8 [b, h, w, 3]. `pieces`: the arrays of one batch of a loader."""
    rows = len(pieces["row"])
    batch = to_batch(pieces, run.mesh, np.arange(rows), rows)
    keys = row_keys(run.config.seed, 0, rows)
    for view in range(len(run.objective.views.pictures)):
        picture = run.objective.picture(batch, keys, view)
        assert not isinstance(picture, Stored)  # `open_alone` reads pictures
        yield picture
