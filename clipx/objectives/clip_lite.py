"""CLIP-Lite: each image tells its caption from one other caption, through a learned critic."""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int32, Key, UInt8

from clipx import losses
from clipx.config.ranges import Count, Rate, Rgb, RgbDeviation, Width
from clipx.models.heads import ConcatCritic, DotCritic, PriorDiscriminator, next_row
from clipx.models.layers import check, unit, wide
from clipx.objectives.base import Augmentation, Objective, check_groups, present, tower_keys
from clipx.ops import photometry
from clipx.types import Batch, Encoded, Features, Loss, PyTree, Stored, Views

# the critic of image-caption pairs, and the one of two views or two captions of an image
_CRITICS = {
    "dot": (DotCritic, DotCritic),
    "concat": (ConcatCritic, ConcatCritic),
    "condot": (ConcatCritic, DotCritic),
    "dotcon": (DotCritic, ConcatCritic),
}
# numbers of a row's independent keys: towers, views, and the noise that a prior compares with
_IMAGE, _TEXT, _OTHER_IMAGE, _OTHER_TEXT, _IMAGE_NOISE, _TEXT_NOISE = range(6)


class CLIPLiteFeatures(Features):
    image: Float[Array, "b c"]
    text: Float[Array, "b e"]
    other_image: Float[Array, "b c"] | None = None  # features of the second view
    other_text: Float[Array, "b e"] | None = None  # features of another caption
    prior: Float[Array, " b"] | None = None  # sum of the two discriminators' losses
    ids: Int32[Array, " b"] | None = None  # caption hashes; None: equal captions stay negatives


class CLIPLite(Objective):
    """A Jensen-Shannon bound on mutual information, with one negative per pair (arXiv 2112.07133):
    (1 - w) (image-caption + image-image + caption-caption) + w prior, where w = `prior_weight`.

    A row's negative is the next row of the batch, cyclically. With `groups` = n it is the next row
    of a group of B/n rows, and the critics' BatchNorms take their statistics within the group, as
    on n devices that share nothing.

    With `data.clusters`, rows 2i and 2i + 1 come from one cluster of captions, so every other
    negative is a hard one. This is the authors' "clusters" mode with two differences: here each row
    is in one pair per epoch and k is constant; there each row's partner is sampled anew and k
    grows.

    The critics read the towers' `raw` output; the published towers have `embed_dim` = 0. A dot
    critic starts as a copy of its features padded to `width`.

    critic: `dot` is a scaled cosine of projections; `concat` is a perceptron over both features.
    `condot` uses `concat` for image-caption pairs and `dot` for the others; `dotcon` the reverse.
    prior: discriminators tell features from uniform noise. "cooperative": the towers help them, as
    in the authors' code. "adversarial": the towers work against them, as in the paper's objective.
    "off": there is no prior, and the other terms keep their factor 1 - w.
    """

    augmentation: Augmentation = "clip_lite"
    mean: Rgb = photometry.IMAGENET_MEAN
    std: RgbDeviation = photometry.IMAGENET_STD
    critic: Literal["dot", "concat", "condot", "dotcon"] = "dot"
    prior: Literal["cooperative", "adversarial", "off"] = "cooperative"
    prior_weight: Rate = 0.1
    width: Width = 2048  # of a dot critic's projections
    image_terms: bool = False  # two views of each image are a pair too
    text_terms: bool = False  # two captions of each image are a pair too
    groups: Count = 1

    def __post_init__(self):
        where = type(self).__name__
        check(
            self.prior_weight > 0 or self.prior == "off",
            f"{where}.prior_weight",
            self.prior_weight,
            "more than 0 and less than 1",
            "config.objective.prior='off'",
        )
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

    def _critic(self, cls: type[nn.Module]) -> DotCritic | ConcatCritic:
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
    def shares_space(self) -> bool:
        return False  # the critics project both sides

    @property
    def compares(self) -> tuple[str, ...]:
        return ("unit",) if _CRITICS[self.critic][0] is DotCritic else ("raw",)

    def chance(self, rows: int) -> dict[str, float]:
        return {"loss/cross_modal": 2 * math.log(2)}

    def term_chances(self, rows: int) -> dict[str, float]:
        parts = {"image": self.image_terms, "text": self.text_terms}
        chances = {f"loss/{name}": 2 * math.log(2) for name, there in parts.items() if there}
        if self.prior != "off":
            chances["loss/prior"] = 4 * math.log(2)  # of both modalities
        return self.chance(rows) | chances

    def embed(self, batch: Batch, keys: Key[Array, " b"], *, train: bool) -> CLIPLiteFeatures:
        towers = super()

        def image(view: int, use: int) -> Float[Array, "b c"]:
            pixels = self.picture(batch, keys, view)
            encoded = towers.encode_image(pixels, train=train, keys=tower_keys(keys, use))
            return wide(present(encoded.raw))

        def text(view: int, use: int) -> Float[Array, "b e"]:
            words = self.words(batch, view)
            encoded = towers.encode_text(words, train=train, keys=tower_keys(keys, use))
            return wide(present(encoded.raw))

        first_image, first_text = image(0, _IMAGE), text(0, _TEXT)
        prior = None
        if self.prior != "off":
            prior = self._prior(self.image_prior, first_image, tower_keys(keys, _IMAGE_NOISE))
            prior += self._prior(self.text_prior, first_text, tower_keys(keys, _TEXT_NOISE))
        return CLIPLiteFeatures(
            image=first_image,
            text=first_text,
            other_image=image(1, _OTHER_IMAGE) if self.image_terms else None,
            other_text=text(1, _OTHER_TEXT) if self.text_terms else None,
            prior=prior,
            ids=self.ids(batch),
        )

    def _prior(
        self, discriminator: nn.Module, x: Float[Array, "b c"], keys: Key[Array, " b"]
    ) -> Float[Array, " b"]:
        """One discriminator's loss per row: the row's features against one sample of noise."""

        def sample(key: Key[Array, ""]) -> Float[Array, " c"]:
            return jax.random.uniform(key, x.shape[1:], jnp.float32)  # the same for every dtype

        if self.prior == "adversarial":
            x = 2 * jax.lax.stop_gradient(x) - x  # x, with its gradient reversed
        noise = jax.vmap(sample)(keys).astype(x.dtype)
        return losses.prior(discriminator(x), discriminator(noise))

    def loss(self, features: CLIPLiteFeatures, memory: PyTree, *, train: bool) -> Loss:
        check_groups(self.groups, features.image.shape[0])
        pairs = {"cross_modal": (self.image_text, features.image, features.text)}
        if self.image_terms:
            pairs["image"] = (self.image_image, features.image, present(features.other_image))
        if self.text_terms:
            pairs["text"] = (self.text_text, features.text, present(features.other_text))
        weight = self._weight(features.ids)
        scores = {name: critic(a, b, train=train) for name, (critic, a, b) in pairs.items()}
        terms = {name: jnp.mean(losses.jsd(*s, weight=weight)) for name, s in scores.items()}
        value = (1 - self.prior_weight) * sum(terms.values())
        chance = (1 - self.prior_weight) * len(terms)
        if self.prior != "off":
            terms["prior"] = jnp.mean(present(features.prior))
            value += self.prior_weight * terms["prior"]
            chance += self.prior_weight * 2
        positive, negative = scores["cross_modal"]
        metrics = {
            "loss": value,
            "chance_loss": 2 * math.log(2) * chance,
            **{f"loss/{name}": term for name, term in terms.items()},
            "batch/accuracy": jnp.mean(positive > negative, dtype=jnp.float32),
        }
        if isinstance(self.image_text, DotCritic):
            metrics["logit_scale"] = jnp.exp(self.image_text.logit_scale)
        return Loss(value, metrics, memory)  # pyright: ignore[reportArgumentType]

    def _weight(self, ids: Int32[Array, " b"] | None) -> Float[Array, " b"] | None:
        """Weight of each row's negative: 0 if the negative has the row's own caption. The weights
        are scaled so that a mean over all rows is the mean over the negatives that count."""
        if ids is None:
            return None
        differs = (ids != next_row(ids, self.groups)).astype(jnp.float32)
        return differs / jnp.maximum(jnp.mean(differs), 1 / len(ids))

    def encode_image(
        self,
        image: UInt8[Array, "b h w 3"] | Stored,
        *,
        train: bool = False,
        keys: Key[Array, " b"] | None = None,
    ) -> Encoded:
        return self._projected("left", super().encode_image(image, train=train, keys=keys), train)

    def encode_text(
        self,
        text: Int32[Array, "b n"] | Stored,
        *,
        train: bool = False,
        keys: Key[Array, " b"] | None = None,
    ) -> Encoded:
        return self._projected("right", super().encode_text(text, train=train, keys=keys), train)

    def _projected(self, side: str, encoded: Encoded, train: bool) -> Encoded:
        """`encoded` after a dot critic's projection, with running statistics. In training, and for
        a critic that reads both sides at once, it is `encoded` unchanged."""
        if train or not isinstance(self.image_text, DotCritic):
            return encoded
        raw = getattr(self.image_text, side)(wide(present(encoded.raw)))
        return encoded.replace(raw=raw, unit=unit(raw))

    def similarity(self, images: Encoded, texts: Encoded) -> Float[Array, "i t"]:
        if isinstance(self.image_text, DotCritic):
            return super().similarity(images, texts)
        return self.image_text.pairs(present(images.raw), present(texts.raw))

    def similarity_scale(self) -> Float[Array, ""]:
        """A dot critic's scale. Other critics give logits: at the optimum of the bound they are the
        logarithm of p(x, y) / p(x) p(y) (Goodfellow et al. 2014, Proposition 1)."""
        if isinstance(self.image_text, DotCritic):
            return jnp.exp(self.image_text.logit_scale)
        return jnp.ones(())
