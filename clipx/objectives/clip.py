"""CLIP: each image picks its caption among all captions of the batch, and the reverse."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Key

from clipx import losses
from clipx.config.ranges import Count, LogScale
from clipx.objectives.base import Objective, present, scalar, tower_keys
from clipx.types import Batch, Features, Loss, PyTree


class ClipFeatures(Features):
    image: Float[Array, "b d"]
    text: Float[Array, "b d"]
    ids: Int32[Array, " b"] | None = None  # caption hashes; None: equal captions stay negatives


class CLIP(Objective):
    """Symmetric InfoNCE with a learned temperature (arXiv 2103.00020, section 2.3).

    `logit_scale` is the logarithm of the scale. The recipe keeps it below ln 100 with a `clamp` in
    the optimizer's rules. With `groups` = n, rows are negatives only within groups of B/n rows.
    """

    logit_scale_init: LogScale = math.log(1 / 0.07)
    groups: Count = 1

    def setup(self):
        self.logit_scale = scalar(self, "logit_scale", self.logit_scale_init)

    def embed(self, batch: Batch, keys: Key[Array, " b"], *, train: bool) -> ClipFeatures:
        image = self.encode_image(self.picture(batch, keys), train=train, keys=tower_keys(keys, 0))
        text = self.encode_text(self.words(batch), train=train, keys=tower_keys(keys, 1))
        return ClipFeatures(image=present(image.unit), text=present(text.unit), ids=self.ids(batch))

    def loss(self, features: ClipFeatures, memory: PyTree, *, train: bool) -> Loss:
        image, text = features.image, features.text
        scale = jnp.exp(self.logit_scale)
        value = jnp.mean(
            losses.info_nce(image, text, scale=scale, ids=features.ids, groups=self.groups)
        )
        metrics = {
            "loss": value,
            "chance_loss": math.log(image.shape[0] // self.groups),
            "batch/R@1": jnp.mean(losses.recall_at_1(image, text, groups=self.groups)),
            "logit_scale": scale,
        }
        return Loss(value, metrics, memory)
