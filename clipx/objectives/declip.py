"""DeCLIP: CLIP that learns from two views of each picture, two texts, and texts like them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from clipx import losses
from clipx.models.heads import BatchNormMLP, VocabularyHead
from clipx.models.layers import check, unit, wide
from clipx.objectives.base import Objective, check_groups, scalar, tower_keys
from clipx.objectives.filip import (
    WORDS,
    LateInteraction,
    check_late_interaction,
    check_masking,
    check_weights,
    hide_words,
)
from clipx.ops import photometry
from clipx.types import Features, Loss, PyTree, Views

_WEIGHTS = (
    "contrastive_weight",
    "neighbour_weight",
    "simsiam_weight",
    "masked_lm_weight",
    "late_interaction_weight",
)
# which of a row's independent keys; 2 hides words
_IMAGE, _TEXT, _, _OTHER_IMAGE, _OTHER_TEXT, _MASKED_TEXT = range(6)


class DeCLIPFeatures(Features):
    image: Float[Array, "b d"]  # of both views, not normalised
    other_image: Float[Array, "b d"]
    text: Float[Array, "b d"]  # of the caption and of its augmentation, unit rows
    other_text: Float[Array, "b d"]
    masked_lm: Float[Array, "b 2"] | None = None  # each row's summed cross-entropy, and of how many
    image_tokens: Float[Array, "b n e"] | None = None  # of the first view
    text_tokens: Float[Array, "b m e"] | None = None  # of the caption
    ids: Int32[Array, " b"] | None = None  # of captions, where equal ones are no negatives


class DeCLIP(Objective):
    """Five terms by their weights (arXiv 2110.05208; as Sense-GVT/DeCLIP computes them, where the
    two differ). DeFILIP is the same with a `late_interaction_weight`.

    contrastive: the mean of CLIP's loss over two views x two texts; the paper weighs the first pair
      apart. The first text is the caption with hidden words, as one pass of the text tower serves
      this term and the next; `contrast_clean_caption` takes a pass more.
    masked_lm: which words are hidden (a share `mask_rate`, 80/10/10). One mean over all that the
      batch hides, 0 where that is none; the code's mean of means per device is NaN there. The head
      is tied to no embedding. The text tower is causal, so a word is guessed from those before.
    simsiam: between the two views, on what the image tower says after its projection, as it is.
    neighbour: a view meets the texts of a queue that are nearest to its row's two texts, against
      the other rows' neighbours, which get no gradient. `image_to_text`, as in the code: a picture
      picks its neighbour; `both`: and the reverse. The two texts look into the queue before either
      enters it, the augmented first; rows beyond its end are dropped. It starts as random rows and
      is in every checkpoint.
    late_interaction: FILIP's, between the first view and the first text; its fields are FILIP's.

    The scale that the loss multiplies by is at most `logit_scale_cap`, while its gradient is that
    of the exponential, as in the code; a rule of the optimizer bounds the parameter. The scale of
    `late_interaction` has no cap.

    `groups` = n: as on n devices, each B/n rows have a queue of `queue_size` and the heads'
    statistics of their own; negatives are all rows of the batch in any case. With 1 the one queue
    takes in all rows, which at a batch of 4,096 makes it new in 8 steps rather than 256. The heads'
    statistics are each view's.

    `mask_id` and `special_ids` are the tokenizer's; no random word is special, so that the text is
    read out where it ends. In evaluation no word is hidden, and unit rows are compared, with
    `late_interaction` too.
    """

    augmentation: photometry.Named | photometry.Policy = "mocov2"
    mean: tuple[float, float, float] = photometry.IMAGENET_MEAN
    std: tuple[float, float, float] = photometry.IMAGENET_STD
    contrastive_weight: float = 0.4
    neighbour_weight: float = 0.2
    simsiam_weight: float = 0.2
    masked_lm_weight: float = 0.2
    late_interaction_weight: float = 0.0
    contrast_clean_caption: bool = False
    mask_rate: float = 0.15
    simsiam_width: int = 1024  # the predictor's hidden layer has half of it
    queue_size: int = 65536
    neighbour_direction: Literal["image_to_text", "both"] = "image_to_text"
    top_k: int | None = 16
    mask_padding: bool = True
    token_width: int = 256
    logit_scale_init: float = math.log(1 / 0.07)
    logit_scale_cap: float | None = 100.0
    groups: int = 1
    mask_id: int | None = None
    special_ids: tuple[int, ...] = ()

    filled: ClassVar[Mapping[str, str]] = WORDS

    def __post_init__(self):
        check_weights(self, *_WEIGHTS)
        used = self.contrastive_weight or self.neighbour_weight
        check(used > 0, "DeCLIP.contrastive_weight", 0, "a weight for this term or `neighbour`")
        check_masking(self, used=self.masked_lm_weight > 0 or not self.contrast_clean_caption)
        check_late_interaction(self)
        check(self.queue_size > 0, "DeCLIP.queue_size", self.queue_size, "1 or more")
        check(self.simsiam_width > 1, "DeCLIP.simsiam_width", self.simsiam_width, "2 or more")
        cap = self.logit_scale_cap
        check(cap is None or cap > 0, "DeCLIP.logit_scale_cap", cap, "more than 0, or None")
        check(
            self.text.embed_dim > 0,
            "config.text.embed_dim",
            self.text.embed_dim,
            "the width of the shared space, which the queue's rows have",
        )
        super().__post_init__()

    def setup(self):
        self.logit_scale = scalar(self, "logit_scale", self.logit_scale_init)
        if self.simsiam_weight:
            width = self.simsiam_width
            self.projector = BatchNormMLP((width,) * 3, last_norm=True, groups=self.groups)
            self.predictor = BatchNormMLP((width // 2, width), groups=self.groups)
        if self.masked_lm_weight:
            self.vocabulary = VocabularyHead(self.text.vocab_size)
        if self.late_interaction_weight:
            self.late_interaction = LateInteraction(
                self.token_width, self.top_k, self.mask_padding, self.logit_scale_init
            )

    @property
    def views(self) -> Views:
        views = super().views
        return views._replace(pictures=views.pictures * 2, texts=("caption", "augmented"))

    def init_memory(self) -> PyTree:
        if not self.neighbour_weight:
            return {}
        shape = (self.queue_size, self.text.embed_dim)
        shape = shape if self.groups == 1 else (self.groups, *shape)
        rows = jax.random.normal(jax.random.key(0), shape, jnp.float32)
        return {"queue": unit(rows), "pointer": jnp.int32(0)}

    def embed(self, batch, keys, *, train):
        caption, augmented = batch.text[:, 0], batch.text[:, 1]

        def image(view, use):
            picture, use = self.picture(batch, keys, view), tower_keys(keys, use)
            return self.encode_image(picture, train=train, keys=use)

        def text(ids, use):
            return self.encode_text(ids, train=train, keys=tower_keys(keys, use))

        hidden, selected = caption, jnp.zeros(caption.shape, bool)
        if train and (self.masked_lm_weight or not self.contrast_clean_caption):
            hidden, selected = hide_words(self, batch, keys)
        first = caption if self.contrast_clean_caption else hidden
        own_image, own_text = image(0, _IMAGE), text(first, _TEXT)
        masked_lm = image_tokens = text_tokens = None
        if self.masked_lm_weight:
            masked = text(hidden, _MASKED_TEXT) if self.contrast_clean_caption else own_text
            head = self.vocabulary(masked.tokens.shape[-1])
            total, count = losses.masked_lm(masked.tokens, *head, caption, selected)
            masked_lm = jnp.stack([total, count.astype(total.dtype)], axis=1)
        if self.late_interaction_weight:
            dense, end = self.late_interaction, self.text.eot_id
            image_tokens = dense.image_tokens(own_image.tokens)
            text_tokens = dense.text_tokens(own_text.tokens, caption, end)
        return DeCLIPFeatures(
            image=wide(own_image.raw),
            other_image=wide(image(1, _OTHER_IMAGE).raw),
            text=own_text.unit,
            other_text=text(augmented, _OTHER_TEXT).unit,
            masked_lm=masked_lm,
            image_tokens=image_tokens,
            text_tokens=text_tokens,
            ids=self.ids(batch),
        )

    def loss(self, features, memory, *, train):
        rows = len(features.text)
        check_groups(self.groups, rows)
        images = unit(features.image), unit(features.other_image)
        texts = features.text, features.other_text
        scale = capped(jnp.exp(self.logit_scale), self.logit_scale_cap)

        def contrast(texts, symmetric):
            """The mean over both views and the given texts."""
            options = {"scale": scale, "symmetric": symmetric, "ids": features.ids}
            pairs = [losses.info_nce(i, t, **options) for t in texts for i in images]
            return jnp.mean(jnp.stack(pairs))

        metrics, terms = {}, {"contrastive": (contrast(texts, True), math.log(rows))}
        if self.neighbour_weight:
            found, memory = self.neighbours(features, memory, train)
            both = self.neighbour_direction == "both"
            terms["neighbour"] = contrast(found, both), math.log(rows)
        if self.simsiam_weight:
            terms["simsiam"] = jnp.mean(losses.simsiam(*self.siamese(features, train))), 0.0
        if self.masked_lm_weight:
            total, count = jnp.sum(features.masked_lm, axis=0)
            words = self.text.vocab_size
            terms["masked_lm"] = total / jnp.maximum(count, 1), math.log(words)
        if self.late_interaction_weight:
            each = self.late_interaction(features.image_tokens, features.text_tokens)
            terms["late_interaction"] = jnp.mean(each), math.log(rows)
            metrics["logit_scale_dense"] = jnp.exp(self.late_interaction.logit_scale)
        weights = {name: getattr(self, f"{name}_weight") for name in terms}
        value = sum(weights[name] * term for name, (term, _) in terms.items())
        metrics |= {
            "loss": value,
            "loss/chance": sum(weights[name] * chance for name, (_, chance) in terms.items()),
            **{f"loss/{name}": term for name, (term, _) in terms.items()},
            "batch/R@1": jnp.mean(losses.recall_at_1(images[0], texts[0])),
            "logit_scale": scale,
        }
        return Loss(value, metrics, memory)

    def neighbours(
        self, features: DeCLIPFeatures, memory: PyTree, train: bool
    ) -> tuple[list[Float[Array, "b d"]], PyTree]:
        """The queue's rows nearest to each of the texts, and the queue that both have entered."""
        queue, pointer = memory["queue"], memory["pointer"]
        found = [losses.nearest(text, queue) for text in (features.text, features.other_text)]
        if train:
            for text in (features.other_text, features.text):
                queue, pointer = losses.enqueue(queue, pointer, text)
        return found, {"queue": queue, "pointer": pointer}

    def siamese(
        self, features: DeCLIPFeatures, train: bool
    ) -> tuple[Float[Array, "b e"], Float[Array, "b e"], Float[Array, "b e"], Float[Array, "b e"]]:
        """Prediction and projection of the first view, then of the second."""
        views = features.image, features.other_image
        z1, z2 = (self.projector(view, train=train) for view in views)
        p1, p2 = (self.predictor(z, train=train) for z in (z1, z2))
        return p1, z1, p2, z2

    def similarity_scale(self):
        return capped(super().similarity_scale(), self.logit_scale_cap)


def capped(scale: Float[Array, ""], cap: float | None) -> Float[Array, ""]:
    """The smaller of both, with the gradient of `scale`."""
    if cap is None:
        return scale
    fixed = jax.lax.stop_gradient(scale)
    return jnp.minimum(fixed, cap) + (scale - fixed)
