"""CLIP-Lite: each picture tells its caption from one other, through a learned critic."""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int32, Key

from clipx import losses
from clipx.models.heads import ConcatCritic, DotCritic, PriorDiscriminator, next_row
from clipx.models.layers import check, unit, wide
from clipx.objectives.base import Objective, check_groups, tower_keys
from clipx.ops import photometry
from clipx.types import Encoded, Features, Loss, Views

# the critic of picture-caption pairs, and that of two views or two captions of one picture
_CRITICS = {
    "dot": (DotCritic, DotCritic),
    "concat": (ConcatCritic, ConcatCritic),
    "condot": (ConcatCritic, DotCritic),
    "dotcon": (DotCritic, ConcatCritic),
}
# which of a row's independent keys: towers, views, and the noise that a prior compares with
_IMAGE, _TEXT, _OTHER_IMAGE, _OTHER_TEXT, _IMAGE_NOISE, _TEXT_NOISE = range(6)


class CLIPLiteFeatures(Features):
    image: Float[Array, "b c"]
    text: Float[Array, "b e"]
    other_image: Float[Array, "b c"] | None = None  # of the second view
    other_text: Float[Array, "b e"] | None = None  # of another caption
    prior: Float[Array, " b"] | None = None  # the two discriminators' losses, summed
    ids: Int32[Array, " b"] | None = None  # of captions, where equal ones are no negatives


class CLIPLite(Objective):
    """A Jensen-Shannon bound on mutual information from one negative a pair (arXiv 2112.07133):
    (1 - w) (picture-caption + picture-picture + caption-caption) + w prior.

    A row's negative is the next row of the batch, cyclically; `groups` = n: of its B/n rows, whose
    statistics the critics' BatchNorms take too, as on n devices that share nothing. With
    `data.clusters` rows 2i and 2i + 1 are of one cluster of captions, so that every other negative
    is a hard one: the authors' "clusters" mode, but each row stands in one pair an epoch, where
    theirs draws each row's partner anew, and k stays, where theirs grows. The critics see what the
    towers call `raw`: towers with `embed_dim` = 0 are the published ones, and a critic starts as a
    copy of its features padded to `width`.

    critic: `dot`, scaled cosines of projections; `concat`, a perceptron over both features; of
    `condot` and `dotcon` the first part is for picture-caption pairs, the second for the others.
    prior: discriminators tell features from uniform noise. As the authors' code has it, the towers
    help them ("cooperative"); as the paper's objective has it, they do not ("adversarial"). With
    "off" the rest keeps its factor of 1 - w.
    """

    augmentation: photometry.Named | photometry.Policy = "clip_lite"
    mean: tuple[float, float, float] = photometry.IMAGENET_MEAN
    std: tuple[float, float, float] = photometry.IMAGENET_STD
    critic: Literal["dot", "concat", "condot", "dotcon"] = "dot"
    prior: Literal["cooperative", "adversarial", "off"] = "cooperative"
    prior_weight: float = 0.1
    width: int = 2048  # of a dot critic's projections
    image_terms: bool = False  # a second view of each picture is a pair too
    text_terms: bool = False  # another caption of each picture is a pair too
    groups: int = 1

    def __post_init__(self):
        where = type(self).__name__
        weight, used = self.prior_weight, self.prior != "off"
        check(
            0 <= weight < 1 and (weight > 0 or not used),
            f"{where}.prior_weight",
            weight,
            "a share between 0 and 1",
            "prior='off'" if used and not weight else "",
        )
        check(self.width > 0, f"{where}.width", self.width, "1 or more")
        check(self.groups > 0, f"{where}.groups", self.groups, "1 or more")
        super().__post_init__()

    def setup(self):
        cross, within = _CRITICS[self.critic]
        self.image_text = self._critic(cross)
        if self.image_terms:
            self.image_image = self._critic(within)
        if self.text_terms:
            self.text_text = self._critic(within)
        if self.prior != "off":
            self.image_prior, self.text_prior = PriorDiscriminator(), PriorDiscriminator()

    def _critic(self, cls):
        if cls is DotCritic:
            return DotCritic(self.width, groups=self.groups)
        return ConcatCritic(groups=self.groups)

    @property
    def views(self) -> Views:
        views = super().views
        return views._replace(
            pictures=views.pictures * (1 + self.image_terms),
            texts=views.texts + ("other",) * self.text_terms,
        )

    @property
    def compares(self) -> tuple[str, ...]:
        return ("unit",) if _CRITICS[self.critic][0] is DotCritic else ("raw",)

    def embed(self, batch, keys, *, train):
        towers = super()

        def image(view, use):
            pictures = self.picture(batch, keys, view)
            return wide(towers.encode_image(pictures, train=train, keys=tower_keys(keys, use)).raw)

        def text(view, use):
            ids = batch.text[:, view]
            return wide(towers.encode_text(ids, train=train, keys=tower_keys(keys, use)).raw)

        own_image, own_text = image(0, _IMAGE), text(0, _TEXT)
        prior = None
        if self.prior != "off":
            prior = self._prior(self.image_prior, own_image, tower_keys(keys, _IMAGE_NOISE))
            prior += self._prior(self.text_prior, own_text, tower_keys(keys, _TEXT_NOISE))
        return CLIPLiteFeatures(
            image=own_image,
            text=own_text,
            other_image=image(1, _OTHER_IMAGE) if self.image_terms else None,
            other_text=text(1, _OTHER_TEXT) if self.text_terms else None,
            prior=prior,
            ids=self.ids(batch),
        )

    def _prior(
        self, discriminator: nn.Module, x: Float[Array, "b c"], keys: Key[Array, " b"]
    ) -> Float[Array, " b"]:
        def draw(key):
            return jax.random.uniform(key, x.shape[1:], jnp.float32)  # one draw for every dtype

        if self.prior == "adversarial":
            x = 2 * jax.lax.stop_gradient(x) - x  # x, with its gradient reversed
        noise = jax.vmap(draw)(keys).astype(x.dtype)
        return losses.prior(discriminator(x), discriminator(noise))

    def loss(self, features, memory, *, train):
        check_groups(self.groups, features.image.shape[0])
        pairs = {"cross_modal": (self.image_text, features.image, features.text)}
        if self.image_terms:
            pairs["image"] = (self.image_image, features.image, features.other_image)
        if self.text_terms:
            pairs["text"] = (self.text_text, features.text, features.other_text)
        weight = self._weight(features.ids)
        scores = {name: critic(a, b, train=train) for name, (critic, a, b) in pairs.items()}
        terms = {name: jnp.mean(losses.jsd(*s, weight=weight)) for name, s in scores.items()}
        value = (1 - self.prior_weight) * sum(terms.values())
        chance = (1 - self.prior_weight) * len(terms)
        if self.prior != "off":
            terms["prior"] = jnp.mean(features.prior)
            value += self.prior_weight * terms["prior"]
            chance += self.prior_weight * 2
        positive, negative = scores["cross_modal"]
        metrics = {
            "loss": value,
            "loss/chance": 2 * math.log(2) * chance,
            **{f"loss/{name}": term for name, term in terms.items()},
            "batch/accuracy": jnp.mean(positive > negative, dtype=jnp.float32),
        }
        if isinstance(self.image_text, DotCritic):
            metrics["logit_scale"] = jnp.exp(self.image_text.logit_scale)
        return Loss(value, metrics, memory)

    def _weight(self, ids: Int32[Array, " b"] | None) -> Float[Array, " b"] | None:
        """Of each row's negative: 0 where it has the row's own caption, so that the mean is one
        over the others."""
        if ids is None:
            return None
        differs = (ids != next_row(ids, self.groups)).astype(jnp.float32)
        return differs / jnp.maximum(jnp.mean(differs), 1 / len(ids))

    def encode_image(self, image, *, train=False, keys=None):
        return self._projected("left", super().encode_image(image, train=train, keys=keys), train)

    def encode_text(self, text, *, train=False, keys=None):
        return self._projected("right", super().encode_text(text, train=train, keys=keys), train)

    def _projected(self, side: str, encoded: Encoded, train: bool) -> Encoded:
        """`encoded` behind a dot critic's projection at its running statistics. In training, and
        before a critic that takes both sides at once, it is the tower's own."""
        if train or not isinstance(self.image_text, DotCritic):
            return encoded
        raw = getattr(self.image_text, side)(wide(encoded.raw))
        return encoded.replace(raw=raw, unit=unit(raw))

    def similarity(self, images, texts):
        if isinstance(self.image_text, DotCritic):
            return super().similarity(images, texts)
        return self.image_text.pairs(images.raw, texts.raw)

    def similarity_scale(self):
        """A dot critic's scale. Other critics give logits: at the optimum of the bound they are the
        logarithm of p(x, y) / p(x) p(y) (Goodfellow et al. 2014, Proposition 1)."""
        if isinstance(self.image_text, DotCritic):
            return jnp.exp(self.image_text.logit_scale)
        return jnp.ones(())
