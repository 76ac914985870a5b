"""SLIP: CLIP on a light crop, SimCLR on two strongly distorted views of the same picture."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clipx import losses
from clipx.models.heads import BatchNormMLP
from clipx.models.layers import check, unit, wide
from clipx.objectives.base import picture_view, tower_keys
from clipx.objectives.clip import CLIP, ClipFeatures
from clipx.ops import photometry
from clipx.types import Loss, Views


@dataclasses.dataclass(frozen=True)
class Compat:
    """What published numbers were trained with and nobody would choose."""

    detach_gather: bool = False  # no gradient to a row as another row's negative or match


class SLIPFeatures(ClipFeatures):
    view: Float[Array, "b c"] | None = None  # of the two distorted views, before the projection
    other_view: Float[Array, "b c"] | None = None


class SLIP(CLIP):
    """CLIP's loss + `ssl_weight` x NT-Xent (arXiv 2112.12750, as facebookresearch/SLIP has it).

    Three views: one of `augmentation`, which meets the caption, and two of `ssl_augmentation`, a
    crop of `ssl_crop_scale` of the area if that is given. The DeCLIP repository's SLIP takes its
    "mocov2" for those two. The head stands on what the image tower says before its projection.

    The head's BatchNorms see all rows, as the synchronised ones of facebookresearch's code do; with
    `groups` = n rows meet only within B/n rows, in both losses and in the head's statistics.

    compat.detach_gather: facebookresearch gathers CLIP's features without their gradient, so that a
    feature learns as the one that picks and not as one of those picked from; NT-Xent's gather has
    it. Values are the same. Captions keep their end mark, where that code cuts it off long ones.
    """

    augmentation: photometry.Named | photometry.Policy = "standard_slip"
    ssl_augmentation: photometry.Named | photometry.Policy = "slip"
    ssl_crop_scale: tuple[float, float] | None = None  # None: the augmentation's
    mean: tuple[float, float, float] = photometry.IMAGENET_MEAN
    std: tuple[float, float, float] = photometry.IMAGENET_STD
    ssl_weight: float = 1.0
    temperature: float = 0.1  # of NT-Xent
    head_width: int = 4096
    head_dim: int = 256
    compat: Compat = Compat()

    def __post_init__(self):
        for field in ("ssl_weight", "temperature", "head_width", "head_dim", "groups"):
            value = getattr(self, field)
            check(value > 0, f"SLIP.{field}", value, "more than 0")
        super().__post_init__()

    def setup(self):
        super().setup()
        widths = (self.head_width, self.head_width, self.head_dim)
        self.head = BatchNormMLP(widths, groups=self.groups)

    @property
    def views(self) -> Views:
        distorted = picture_view(self.ssl_augmentation, self.ssl_crop_scale)
        views = super().views
        return views._replace(pictures=(*views.pictures, distorted, distorted))

    def embed(self, batch, keys, *, train):
        features = super().embed(batch, keys, train=train)

        def view(number):
            use = tower_keys(keys, 1 + number)  # 0 and 1 are CLIP's two towers
            encoded = self.encode_image(self.picture(batch, keys, number), train=train, keys=use)
            return wide(encoded.backbone)

        return SLIPFeatures(
            image=features.image,
            text=features.text,
            ids=features.ids,
            view=view(1),
            other_view=view(2),
        )

    def loss(self, features, memory, *, train):
        clip = super().loss(features, memory, train=train)
        contrastive = clip.value
        if self.compat.detach_gather:
            contrastive = self._detached(features)
        a, b = (unit(self.head(x, train=train)) for x in (features.view, features.other_view))
        each = losses.nt_xent(a, b, temperature=self.temperature, groups=self.groups)
        ssl = jnp.mean(each)
        value = contrastive + self.ssl_weight * ssl
        rows = len(a) // self.groups
        metrics = clip.metrics | {
            "loss": value,
            "loss/chance": math.log(rows) + self.ssl_weight * math.log(2 * rows - 1),
            "loss/contrastive": contrastive,
            "loss/ssl": ssl,
            "batch/ssl_R@1": jnp.mean(losses.recall_at_1(a, b, groups=self.groups)),
        }
        return Loss(value, metrics, memory)

    def _detached(self, features: SLIPFeatures) -> Float[Array, ""]:
        def pick(queries, keys):
            each = losses.info_nce(
                queries,
                jax.lax.stop_gradient(keys),
                scale=jnp.exp(self.logit_scale),
                symmetric=False,
                ids=features.ids,
                groups=self.groups,
            )
            return jnp.mean(each)

        pairs = (features.image, features.text), (features.text, features.image)
        return sum(pick(*pair) for pair in pairs) / 2
