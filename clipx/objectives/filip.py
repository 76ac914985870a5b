"""FILIP: a picture and a caption are compared token by token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int32, Key

from clipx import losses
from clipx.models.heads import TokenProjection
from clipx.models.layers import check
from clipx.objectives.base import Objective, scalar, tower_keys
from clipx.ops import photometry
from clipx.types import Batch, Features, Loss

# of the `filled` fields of objectives that hide words
WORDS = {"mask_id": "tokenizer.mask_id", "special_ids": "tokenizer.special_ids"}

_IMAGE, _TEXT, _HIDDEN = range(3)  # which of a row's independent keys


class LateInteraction(nn.Module):
    """The token-wise loss, and what it needs beside two towers: a map for the tokens of each side,
    and a scale of its own, the `logit_scale_dense` of DeCLIP's code.

    Text tokens beyond the first end mark are 0 with `mask_padding`, which no unit row is: so a mask
    travels with its tokens.
    """

    width: int
    top_k: int | None
    mask_padding: bool
    scale_init: float
    groups: int = 1

    def setup(self):
        self.image, self.text = TokenProjection(self.width), TokenProjection(self.width)
        self.logit_scale = scalar(self, "logit_scale", self.scale_init)

    def image_tokens(self, tokens: Float[Array, "b n c"]) -> Float[Array, "b n d"]:
        return self.image(tokens)

    def text_tokens(
        self, tokens: Float[Array, "b m c"], ids: Int32[Array, "b m"], eot_id: int
    ) -> Float[Array, "b m d"]:
        tokens = self.text(tokens)
        if not self.mask_padding:
            return tokens
        end = (ids == eot_id).astype(jnp.int32)
        return jnp.where((jnp.cumsum(end, axis=1) - end == 0)[..., None], tokens, 0)

    def mask(self, text_tokens: Float[Array, "b m d"]) -> Bool[Array, "b m"] | None:
        return jnp.any(text_tokens != 0, axis=-1) if self.mask_padding else None

    def __call__(
        self, image: Float[Array, "b n d"], text: Float[Array, "b m d"]
    ) -> Float[Array, " b"]:
        return losses.late_interaction(
            image,
            text,
            scale=jnp.exp(self.logit_scale),
            top_k=self.top_k,
            b_mask=self.mask(text),
            groups=self.groups,
        )


class FILIPFeatures(Features):
    image_tokens: Float[Array, "b n d"]
    text_tokens: Float[Array, "b m d"]  # 0 where padding is masked
    image: Float[Array, "b e"] | None = None
    text: Float[Array, "b e"] | None = None
    ids: Int32[Array, " b"] | None = None  # of captions, where equal ones are no negatives


class FILIP(Objective):
    """Token-wise contrastive loss (arXiv 2111.07783), as DeCLIP's repository has it
    (prototype/model/filip.py): `late_interaction_weight` x it + `contrastive_weight` x CLIP's.

    All tokens of a row look for their best among the `top_k` tokens of each other row that are most
    like their own pair's; None keeps all, as that code did until May 2022. Tokens are those of the
    image tower's last map or block, without a class token, and those of the text up to its end
    mark; with `mask_padding` off all of the context, as the published runs had it, so that padding
    may be among the kept.

    As in that code the caption that is contrasted has hidden words (a share `mask_rate`, BERT's
    80/10/10), though nothing asks which; with `contrast_clean_caption` it has none. It never has
    any in evaluation. Its zero `contrastive_weight` leaves the towers' projections untrained.

    evaluation: `image_tokens` scores a pair by the mean, over the picture's tokens, of the largest
    cosine with one of the text's, as that code does, over all tokens rather than `top_k`;
    `both_tokens` by the mean of that and the same with sides changed, which training has both of;
    `global` by the towers' unit rows. In evaluation that code averages prompts position by position
    and divides a text's matrix by its Frobenius norm. Here prompts are averaged by score, since
    different words stand at one position; the norm, which is one number for all single prompts
    where padding counts, is left out.

    `groups` = n: rows are negatives only within B/n rows. `mask_id` and `special_ids` are the
    tokenizer's.
    """

    augmentation: photometry.Named | photometry.Policy = "mocov2"
    mean: tuple[float, float, float] = photometry.IMAGENET_MEAN
    std: tuple[float, float, float] = photometry.IMAGENET_STD
    late_interaction_weight: float = 1.0
    contrastive_weight: float = 0.0
    top_k: int | None = 16
    mask_padding: bool = True
    token_width: int = 256
    contrast_clean_caption: bool = False
    mask_rate: float = 0.15
    evaluation: Literal["image_tokens", "both_tokens", "global"] = "image_tokens"
    logit_scale_init: float = math.log(1 / 0.07)  # of both scales
    groups: int = 1
    mask_id: int | None = None
    special_ids: tuple[int, ...] = ()

    filled: ClassVar[Mapping[str, str]] = WORDS

    def __post_init__(self):
        check_weights(self, "late_interaction_weight", "contrastive_weight")
        check_masking(self, used=not self.contrast_clean_caption)
        check_late_interaction(self)
        check(
            self.late_interaction_weight > 0,
            "FILIP.late_interaction_weight",
            self.late_interaction_weight,
            "more than 0; without it there is `clip`",
        )
        check(
            self.evaluation != "global" or self.contrastive_weight > 0,
            "FILIP.evaluation",
            "'global', which nothing trains at a contrastive_weight of 0",
            "'image_tokens', 'both_tokens', or a contrastive_weight",
        )
        super().__post_init__()

    def setup(self):
        if self.contrastive_weight:
            self.logit_scale = scalar(self, "logit_scale", self.logit_scale_init)
        self.late_interaction = LateInteraction(
            self.token_width, self.top_k, self.mask_padding, self.logit_scale_init, self.groups
        )

    @property
    def compares(self) -> tuple[str, ...]:
        return ("unit",) if self.evaluation == "global" else ("tokens",)

    def embed(self, batch, keys, *, train):
        text = batch.text[:, 0]
        if train and not self.contrast_clean_caption:
            text, _ = hide_words(self, batch, keys)
        images = self.picture(batch, keys)
        image = self.encode_image(images, train=train, keys=tower_keys(keys, _IMAGE))
        text = self.encode_text(text, train=train, keys=tower_keys(keys, _TEXT))
        contrasted = bool(self.contrastive_weight)
        return FILIPFeatures(
            image_tokens=image.tokens,
            text_tokens=text.tokens,
            image=image.unit if contrasted else None,
            text=text.unit if contrasted else None,
            ids=self.ids(batch) if contrasted else None,
        )

    def encode_image(self, image, *, train=False, keys=None):
        encoded = super().encode_image(image, train=train, keys=keys)
        return encoded.replace(tokens=self.late_interaction.image_tokens(encoded.tokens))

    def encode_text(self, text, *, train=False, keys=None):
        encoded = super().encode_text(text, train=train, keys=keys)
        tokens = self.late_interaction.text_tokens(encoded.tokens, text, self.text.eot_id)
        return encoded.replace(tokens=tokens)

    def loss(self, features, memory, *, train):
        late = jnp.mean(self.late_interaction(features.image_tokens, features.text_tokens))
        value = self.late_interaction_weight * late
        chance = math.log(len(features.image_tokens) // self.groups)
        metrics = {
            "loss/late_interaction": late,
            "logit_scale_dense": jnp.exp(self.late_interaction.logit_scale),
        }
        if self.contrastive_weight:
            image, text, groups = features.image, features.text, self.groups
            scale = jnp.exp(self.logit_scale)
            each = losses.info_nce(image, text, scale=scale, ids=features.ids, groups=groups)
            metrics |= {
                "loss/contrastive": jnp.mean(each),
                "logit_scale": scale,
                "batch/R@1": jnp.mean(losses.recall_at_1(image, text, groups=groups)),
            }
            value += self.contrastive_weight * jnp.mean(each)
        weight = self.late_interaction_weight + self.contrastive_weight
        return Loss(value, {"loss": value, "loss/chance": weight * chance, **metrics}, memory)

    def similarity(self, images, texts):
        if self.evaluation == "global":
            return super().similarity(images, texts)
        mask = self.late_interaction.mask(texts.tokens)
        scores = losses.token_similarity(images.tokens, texts.tokens, b_mask=mask)
        if self.evaluation == "both_tokens":
            reverse = losses.token_similarity(texts.tokens, images.tokens, a_mask=mask)
            scores = (scores + reverse.T) / 2
        return scores

    def similarity_scale(self):
        if self.evaluation == "global":
            return super().similarity_scale()
        return jnp.exp(self.late_interaction.logit_scale)


def hide_words(
    objective: Objective, batch: Batch, keys: Key[Array, " b"]
) -> tuple[Int32[Array, "b n"], Bool[Array, "b n"]]:
    """The captions with words hidden, and True where one is. The end mark is never drawn, so that a
    text is read out where it ends, which it is not always in DeCLIP's code."""
    return losses.mask_tokens(
        batch.text[:, 0],
        tower_keys(keys, _HIDDEN),
        vocab_size=objective.text.vocab_size,
        mask_id=objective.mask_id,
        special_ids=objective.special_ids,
        rate=objective.mask_rate,
    )


def check_weights(objective: Objective, *fields: str) -> None:
    """Raises `ConfigError` for a weight below 0."""
    where = type(objective).__name__
    for field in fields:
        check(
            getattr(objective, field) >= 0,
            f"{where}.{field}",
            getattr(objective, field),
            "0 or more",
        )


def check_masking(objective: Objective, *, used: bool) -> None:
    """Raises `ConfigError` where words cannot be hidden that are to be."""
    where = type(objective).__name__
    check(
        0 < objective.mask_rate < 1, f"{where}.mask_rate", objective.mask_rate, "a share in (0, 1)"
    )
    check(
        objective.mask_id is not None or not used,
        "config.tokenizer.mask",
        "false",
        "an id for hidden words",
        "config.tokenizer.mask=true",
    )


def check_late_interaction(objective: Objective) -> None:
    """Raises `ConfigError` for fields of a token-wise loss that cannot be."""
    where = type(objective).__name__
    for field in ("top_k", "token_width", "groups"):
        value = getattr(objective, field)
        check(value is None or value > 0, f"{where}.{field}", value, "1 or more")
    check(
        objective.false_negatives == "keep" or not objective.late_interaction_weight,
        f"{where}.false_negatives",
        "'mask', with a token-wise loss, which takes all rows as negatives",
        "'keep'",
    )
