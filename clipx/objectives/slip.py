"""SLIP: CLIP on a lightly cropped view, SimCLR on two distorted views of the same image."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from clipx import losses
from clipx.config.ranges import Crop, Positive, Rgb, RgbDeviation, Temperature, Width
from clipx.models.heads import BatchNormMLP
from clipx.models.layers import unit, wide
from clipx.objectives.base import Augmentation, picture_view, present, tower_keys
from clipx.objectives.clip import CLIP, ClipFeatures
from clipx.ops import photometry
from clipx.types import Batch, Loss, PyTree, Views


@dataclasses.dataclass(frozen=True)
class Compat:
    """Quirks that published numbers were trained with and that nobody would choose."""

    detach_gather: bool = False  # features learn as queries only, not as keys


class SLIPFeatures(ClipFeatures):
    # backbone features of the two distorted views, before the head
    view: Float[Array, "b c"] | None = None
    other_view: Float[Array, "b c"] | None = None


class SLIP(CLIP):
    """CLIP's loss + `ssl_weight` x NT-Xent (arXiv 2112.12750, as facebookresearch/SLIP has it).

    Each image has three views: one of `augmentation`, which is paired with the caption, and two of
    `ssl_augmentation`, which are paired with each other. `ssl_crop_scale`, if given, is the crop
    scale of those two. (The DeCLIP repository's SLIP uses its "mocov2" for them.) The head of
    NT-Xent reads the image tower's backbone, before its projection.

    The head's BatchNorms take their statistics over all rows, as the synchronised BatchNorms of
    facebookresearch's code do. With `groups` = n, both losses and the head's statistics stay within
    groups of B/n rows.

    compat.detach_gather: facebookresearch gathers CLIP's features without a gradient, so that a
    feature learns as a query and not as a key. (Its gather for NT-Xent passes the gradient on.) The
    loss value is the same. Captions keep their end mark here; that code cuts it off long captions.
    """

    augmentation: Augmentation = "standard_slip"
    ssl_augmentation: Augmentation = "slip"
    ssl_crop_scale: Crop | None = None  # area share; None: the augmentation's
    mean: Rgb = photometry.IMAGENET_MEAN
    std: RgbDeviation = photometry.IMAGENET_STD
    ssl_weight: Positive = 1.0
    temperature: Temperature = 0.1  # of NT-Xent
    head_width: Width = 4096
    head_dim: Width = 256
    compat: Compat = Compat()

    def setup(self):
        super().setup()
        widths = (self.head_width, self.head_width, self.head_dim)
        self.head = BatchNormMLP(widths, groups=self.groups)

    @property
    def views(self) -> Views:
        distorted = picture_view(self.ssl_augmentation, self.ssl_crop_scale)
        views = super().views
        return views._replace(pictures=(*views.pictures, distorted, distorted))

    def chance(self, rows: int) -> dict[str, float]:
        return {"loss/contrastive": math.log(rows // self.groups)}

    def term_chances(self, rows: int) -> dict[str, float]:
        return self.chance(rows) | {"loss/ssl": math.log(2 * (rows // self.groups) - 1)}

    def embed(self, batch: Batch, keys: Key[Array, " b"], *, train: bool) -> SLIPFeatures:
        features = super().embed(batch, keys, train=train)

        def view(number: int) -> Float[Array, "b c"]:
            view_keys = tower_keys(keys, 1 + number)  # 0 and 1 are CLIP's two towers
            image = self.picture(batch, keys, number)
            encoded = self.encode_image(image, train=train, keys=view_keys)
            return wide(present(encoded.backbone))

        return SLIPFeatures(
            image=features.image,
            text=features.text,
            ids=features.ids,
            view=view(1),
            other_view=view(2),
        )

    def loss(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, features: SLIPFeatures, memory: PyTree, *, train: bool
    ) -> Loss:
        clip = super().loss(features, memory, train=train)
        contrastive = clip.value
        if self.compat.detach_gather:
            contrastive = self._detached(features)
        views = present(features.view), present(features.other_view)
        a, b = (unit(self.head(x, train=train)) for x in views)
        ssl = jnp.mean(losses.nt_xent(a, b, temperature=self.temperature, groups=self.groups))
        value = contrastive + self.ssl_weight * ssl
        rows = len(a) // self.groups
        metrics = clip.metrics | {
            "loss": value,
            "chance_loss": math.log(rows) + self.ssl_weight * math.log(2 * rows - 1),
            "loss/contrastive": contrastive,
            "loss/ssl": ssl,
            "batch/ssl_R@1": jnp.mean(losses.recall_at_1(a, b, groups=self.groups)),
        }
        return Loss(value, metrics, memory)

    def _detached(self, features: SLIPFeatures) -> Float[Array, ""]:
        """CLIP's loss, its value unchanged, with gradients to queries only."""

        def pick(queries: Float[Array, "b d"], keys: Float[Array, "b d"]) -> Float[Array, ""]:
            per_row = losses.info_nce(
                queries,
                jax.lax.stop_gradient(keys),
                scale=jnp.exp(self.logit_scale),
                symmetric=False,
                ids=features.ids,
                groups=self.groups,
            )
            return jnp.mean(per_row)

        pairs = (features.image, features.text), (features.text, features.image)
        return sum(pick(*pair) for pair in pairs) / 2  # pyright: ignore[reportReturnType]
