"""SigLIP: every image-caption pair of the batch is classified alone, as match or no match."""

from __future__ import annotations

import math
from typing import Annotated

import jax.numpy as jnp

from clipx import losses
from clipx.config.ranges import LogScale, Range, Rgb, RgbDeviation
from clipx.objectives.base import scalar
from clipx.objectives.clip import CLIP, ClipFeatures
from clipx.types import Loss, PyTree


class SigLIP(CLIP):
    """Pairwise sigmoid loss, summed over each row's pairs (arXiv 2303.15343, algorithm 1).

    `logit_scale` is the logarithm of the scale and starts at ln 10. `logit_bias` starts at -10, so
    that the loss of the many negatives starts near zero (section 3.2 of the paper). With `groups` =
    n, rows are negatives only within groups of B/n rows.
    """

    mean: Rgb = (0.5, 0.5, 0.5)
    std: RgbDeviation = (0.5, 0.5, 0.5)
    logit_scale_init: LogScale = math.log(10.0)
    logit_bias_init: Annotated[float, Range(-1000, 1000)] = -10.0

    def setup(self):
        self.logit_scale = scalar(self, "logit_scale", self.logit_scale_init)
        self.logit_bias = scalar(self, "logit_bias", self.logit_bias_init)

    def loss(self, features: ClipFeatures, memory: PyTree, *, train: bool) -> Loss:
        image, text = features.image, features.text
        scale = jnp.exp(self.logit_scale)
        value = jnp.mean(
            losses.sigmoid(
                image,
                text,
                scale=scale,
                bias=self.logit_bias,
                ids=features.ids,
                groups=self.groups,
            )
        )
        rows = image.shape[0] // self.groups  # chance: each pair matches with probability 1/rows
        metrics = {
            "loss": value,
            "chance_loss": math.log(rows) + (rows - 1) * math.log(rows / max(rows - 1, 1)),
            "batch/R@1": jnp.mean(losses.recall_at_1(image, text, groups=self.groups)),
            "logit_scale": scale,
            "logit_bias": self.logit_bias,
        }
        return Loss(value, metrics, memory)
