"""FILIP: an image and a caption are compared token by token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int32, Key, UInt8

from clipx import losses
from clipx.config.ranges import (
    Count,
    CountOrZero,
    LogScale,
    MaskRate,
    NonNegative,
    Rgb,
    RgbDeviation,
    Width,
)
from clipx.models.heads import TokenProjection
from clipx.models.layers import check
from clipx.objectives.base import Augmentation, Objective, present, scalar, tower_keys
from clipx.ops import photometry
from clipx.types import Batch, Encoded, Features, Loss, PyTree, Stored

# the `filled` fields of objectives that hide words
WORDS = {"mask_id": "tokenizer.mask_id", "special_ids": "tokenizer.special_ids"}

_IMAGE, _TEXT, _HIDDEN = range(3)  # numbers of a row's independent keys


class LateInteraction(nn.Module):
    """The token-wise loss and its parameters: a projection for the tokens of each side, and a scale
    of its own, which is the `logit_scale_dense` of DeCLIP's code.

    With `mask_padding`, text tokens after the first end mark are set to 0. No unit vector is 0, so
    the zeros are the mask, and it travels with the tokens.
    """

    width: int
    top_k: int | None
    mask_padding: bool
    scale_init: float
    groups: Count = 1
    dtype: str = "float32"  # of the products of a large batch's tokens: the towers'

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
            dtype=self.dtype,
        )


class FILIPFeatures(Features):
    image_tokens: Float[Array, "b n d"]
    text_tokens: Float[Array, "b m d"]  # 0 where padding is masked
    image: Float[Array, "b e"] | None = None
    text: Float[Array, "b e"] | None = None
    ids: Int32[Array, " b"] | None = None  # caption hashes; None: equal captions stay negatives


class FILIP(Objective):
    """`late_interaction_weight` x a token-wise contrastive loss + `contrastive_weight` x CLIP's
    loss (arXiv 2111.07783, as in DeCLIP's repository, prototype/model/filip.py).

    Each token of a row looks for its best match among `top_k` tokens of every other row: those that
    are most similar to the other row's own pair. None keeps all tokens, as that code did until May
    2022. Image tokens are those of the tower's last map or block, without a class token. Text
    tokens are those up to the end mark; with `mask_padding` off, those of the complete context, as
    in the published runs, so that padding may be among the `top_k`.

    As in that code, the contrasted caption has hidden words (a share `mask_rate`, BERT's 80/10/10),
    though no term predicts them; `contrast_clean_caption` hides none. In evaluation no word is
    hidden. The default `contrastive_weight` of 0 leaves the towers' projections untrained.

    evaluation: how `similarity` scores a pair.
      `image_tokens`: the mean, over the image's tokens, of the largest cosine with a text token, as
      in that code. It uses all tokens rather than `top_k`.
      `both_tokens`: the mean of that score and the one with the sides swapped, as in training.
      `query_tokens`: an image picks its text by `image_tokens`, and a text its image by that score
      with the sides swapped, as in training (section 3.1 of the paper).
      `global`: the cosine of the towers' unit embeddings.
      That code averages the tokens of several prompts position by position, and divides a text's
      tokens by their Frobenius norm. Here the prompts' scores are averaged, because different words
      are at one position. The norm is left out: where padding counts, it is the same for all single
      prompts.

    With `groups` = n, rows are negatives only within groups of B/n rows. `mask_id` and
    `special_ids` come from the tokenizer.
    """

    augmentation: Augmentation = "mocov2"
    mean: Rgb = photometry.IMAGENET_MEAN
    std: RgbDeviation = photometry.IMAGENET_STD
    late_interaction_weight: NonNegative = 1.0
    contrastive_weight: NonNegative = 0.0
    top_k: Count | None = 16
    mask_padding: bool = True
    token_width: Width = 256
    contrast_clean_caption: bool = False
    mask_rate: MaskRate = 0.15
    evaluation: Literal["image_tokens", "both_tokens", "query_tokens", "global"] = "image_tokens"
    logit_scale_init: LogScale = math.log(1 / 0.07)  # of both scales
    groups: Count = 1
    mask_id: CountOrZero | None = None
    special_ids: tuple[CountOrZero, ...] = ()

    filled: ClassVar[Mapping[str, str]] = WORDS

    def __post_init__(self):
        check_masking(self, used=self.hides_words)
        check_late_interaction(self)
        check(
            self.late_interaction_weight > 0,
            "FILIP.late_interaction_weight",
            self.late_interaction_weight,
            "more than 0; without this term use the objective `clip`",
        )
        check(
            self.evaluation != "global" or self.contrastive_weight > 0,
            "FILIP.evaluation",
            "'global', which a contrastive_weight of 0 leaves untrained",
            "scores of tokens, such as 'query_tokens', or a contrastive_weight above 0",
        )
        super().__post_init__()

    def setup(self):
        if self.contrastive_weight:
            self.logit_scale = scalar(self, "logit_scale", self.logit_scale_init)
        self.late_interaction = LateInteraction(
            *(self.token_width, self.top_k, self.mask_padding, self.logit_scale_init, self.groups),
            dtype=compute_dtype(self),
        )

    @property
    def shares_space(self) -> bool:
        return self.contrastive_weight > 0  # tokens are projected to `token_width`

    @property
    def reads_tokens(self) -> bool:
        return True

    @property
    def hides_words(self) -> bool:
        return not self.contrast_clean_caption

    @property
    def compares(self) -> tuple[str, ...]:
        return ("unit",) if self.evaluation == "global" else ("tokens",)

    def embed(self, batch: Batch, keys: Key[Array, " b"], *, train: bool) -> FILIPFeatures:
        words = self.words(batch)
        if train and self.hides_words:
            words, _ = hide_words(self, batch, keys)
        images = self.picture(batch, keys)
        image = self.encode_image(images, train=train, keys=tower_keys(keys, _IMAGE))
        text = self.encode_text(words, train=train, keys=tower_keys(keys, _TEXT))
        contrasted = bool(self.contrastive_weight)
        return FILIPFeatures(
            image_tokens=present(image.tokens),
            text_tokens=present(text.tokens),
            image=image.unit if contrasted else None,
            text=text.unit if contrasted else None,
            ids=self.ids(batch) if contrasted else None,
        )

    def encode_image(
        self,
        image: UInt8[Array, "b h w 3"] | Stored,
        *,
        train: bool = False,
        keys: Key[Array, " b"] | None = None,
    ) -> Encoded:
        encoded = super().encode_image(image, train=train, keys=keys)
        return encoded.replace(tokens=self.late_interaction.image_tokens(present(encoded.tokens)))

    def encode_text(
        self,
        text: Int32[Array, "b n"] | Stored,
        *,
        train: bool = False,
        keys: Key[Array, " b"] | None = None,
    ) -> Encoded:
        encoded = super().encode_text(text, train=train, keys=keys)
        tokens = present(encoded.tokens)
        ids = present(text.ids) if isinstance(text, Stored) else text
        tokens = self.late_interaction.text_tokens(tokens, ids, self.text.eot_id)
        return encoded.replace(tokens=tokens)

    def term_chances(self, rows: int) -> dict[str, float]:
        names = ("late_interaction", *(["contrastive"] if self.contrastive_weight else []))
        return dict.fromkeys((f"loss/{name}" for name in names), math.log(rows // self.groups))

    def loss(self, features: FILIPFeatures, memory: PyTree, *, train: bool) -> Loss:
        late = jnp.mean(self.late_interaction(features.image_tokens, features.text_tokens))
        value = self.late_interaction_weight * late
        chance = math.log(len(features.image_tokens) // self.groups)
        metrics = {
            "loss/late_interaction": late,
            "logit_scale_dense": jnp.exp(self.late_interaction.logit_scale),
        }
        if self.contrastive_weight:
            image, text, groups = present(features.image), present(features.text), self.groups
            scale = jnp.exp(self.logit_scale)
            per_row = losses.info_nce(image, text, scale=scale, ids=features.ids, groups=groups)
            metrics |= {
                "loss/contrastive": jnp.mean(per_row),
                "logit_scale": scale,
                "batch/R@1": jnp.mean(losses.recall_at_1(image, text, groups=groups)),
            }
            value += self.contrastive_weight * jnp.mean(per_row)
        weight = self.late_interaction_weight + self.contrastive_weight
        metrics = {"loss": value, "chance_loss": weight * chance, **metrics}
        return Loss(value, metrics, memory)  # pyright: ignore[reportArgumentType]

    def similarity(self, images: Encoded, texts: Encoded) -> Float[Array, "i t"]:
        if self.evaluation == "global":
            return super().similarity(images, texts)
        image, text = present(images.tokens), present(texts.tokens)
        mask = self.late_interaction.mask(text)
        scores = losses.token_similarity(image, text, b_mask=mask)
        if self.evaluation == "both_tokens":
            scores = (scores + self._reverse(image, text)) / 2
        return scores

    def similarity_of_texts(self, images: Encoded, texts: Encoded) -> Float[Array, "i t"]:
        if self.evaluation != "query_tokens":
            return self.similarity(images, texts)
        return self._reverse(present(images.tokens), present(texts.tokens))

    def _reverse(
        self, image: Float[Array, "i n d"], text: Float[Array, "t m d"]
    ) -> Float[Array, "i t"]:
        """The mean, over a text's tokens, of the largest cosine with a token of the image."""
        mask = self.late_interaction.mask(text)
        return losses.token_similarity(text, image, a_mask=mask).T

    def similarity_scale(self) -> Float[Array, ""]:
        if self.evaluation == "global":
            return super().similarity_scale()
        return jnp.exp(self.late_interaction.logit_scale)


def compute_dtype(objective: Objective) -> str:
    """The dtype of the towers; of two, the wider."""
    return jnp.promote_types(objective.image.dtype, objective.text.dtype).name


def hide_words(
    objective: Objective, batch: Batch, keys: Key[Array, " b"]
) -> tuple[Int32[Array, "b n"], Bool[Array, "b n"]]:
    """The captions with words hidden, and a mask of the hidden words.

    The end mark is neither hidden nor a random replacement, so the text tower reads out at the
    text's end. In DeCLIP's code it may be a random replacement, and the tower then reads out there.
    """
    return losses.mask_tokens(
        batch.text[:, 0],
        tower_keys(keys, _HIDDEN),
        vocab_size=objective.text.vocab_size,
        mask_id=objective.mask_id,
        special_ids=objective.special_ids,
        rate=objective.mask_rate,
    )


def check_masking(objective: Objective, *, used: bool) -> None:
    """Raises `ConfigError` for masking that is `used` without a mask id from the tokenizer."""
    check(
        objective.mask_id is not None or not used,
        "config.tokenizer.mask",
        "false",
        "true: this objective hides words behind a mask token",
        "config.tokenizer.mask=true",
    )


def check_late_interaction(objective: Objective) -> None:
    """Raises `ConfigError` for a token-wise loss that shall leave out equal captions."""
    check(
        objective.false_negatives == "keep" or not objective.late_interaction_weight,
        f"{type(objective).__name__}.false_negatives",
        "'mask', with a token-wise loss, which uses all rows as negatives",
        "'keep'",
    )
