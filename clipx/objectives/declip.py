"""DeCLIP: CLIP with two views of each image, two texts, and the texts' nearest neighbours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Key

from clipx import losses
from clipx.config.ranges import (
    Count,
    CountOrZero,
    LogScale,
    MaskRate,
    NonNegative,
    Positive,
    Range,
    Rgb,
    RgbDeviation,
    Width,
)
from clipx.models.heads import BatchNormMLP, VocabularyHead
from clipx.models.layers import check, unit, wide
from clipx.objectives.base import (
    Augmentation,
    Objective,
    check_groups,
    present,
    scalar,
)
from clipx.objectives.filip import (
    WORDS,
    LateInteraction,
    check_late_interaction,
    check_masking,
    compute_dtype,
    hide_words,
)
from clipx.ops import photometry
from clipx.types import Batch, Features, Loss, PyTree, Views

# numbers of a row's independent keys; key 2 hides words
_IMAGE, _TEXT, _, _OTHER_IMAGE, _OTHER_TEXT, _MASKED_TEXT = range(6)


class DeCLIPFeatures(Features):
    image: Float[Array, "b d"]  # of the two views, not normalised
    other_image: Float[Array, "b d"]
    text: Float[Array, "b d"]  # of the caption and its augmentation, unit length
    other_text: Float[Array, "b d"]
    masked_lm: Float[Array, "b 2"] | None = None  # summed cross-entropy, number of hidden words
    image_tokens: Float[Array, "b n e"] | None = None  # of the first view
    text_tokens: Float[Array, "b m e"] | None = None  # of the caption
    ids: Int32[Array, " b"] | None = None  # caption hashes; None: equal captions stay negatives


class DeCLIP(Objective):
    """Five weighted terms (arXiv 2110.05208). Where the paper and Sense-GVT/DeCLIP differ, the
    terms are the code's. DeFILIP is DeCLIP with a `late_interaction_weight`.

    contrastive: CLIP's loss, averaged over two views x two texts; the paper weights the first pair
      separately. The first text is the caption with hidden words, so that one pass of the text
      tower serves this term and `masked_lm`. `contrast_clean_caption` adds a pass without them.
      The second text is the caption after one augmentation, or, with `second_text` "other", another
      caption of the picture.
    masked_lm: predicts the hidden words (a share `mask_rate`, BERT's 80/10/10). It is one mean over
      all hidden words of the batch, 0 if there are none; the code's mean of per-device means is NaN
      there. The head shares no weights with an embedding. The text tower is causal, so a word is
      predicted from the words before it.
    simsiam: between the two views, on the image tower's projected output, not normalised.
    neighbour: each view is paired with the rows of a queue that are nearest to its row's two texts.
      Negatives are the other rows' neighbours. Neighbours get no gradient. `image_to_text`, as in
      the code: an image picks its neighbour; `both`: also the reverse. Both texts are looked up
      before either enters the queue. The augmented text enters first; rows beyond the queue's end
      are dropped. The queue starts as random rows and is saved in every checkpoint.
    late_interaction: FILIP's, between the first view and the first text; its fields are FILIP's.

    The loss multiplies by a scale of at most `logit_scale_cap`, but with the uncapped exponential's
    gradient, as in the code. A rule of the optimizer bounds the parameter itself. The scale of
    `late_interaction` has no cap.

    With `groups` = n, as on n devices, each group of B/n rows has its own queue of `queue_size`
    rows and its own BatchNorm statistics in the heads. Negatives are all rows of the batch in any
    case. With `groups` = 1 one queue takes in all rows, so that at a batch of 4,096 it is renewed
    in 8 steps rather than 256. The heads take separate statistics for each view.

    `mask_id` and `special_ids` come from the tokenizer. No special token is a random replacement,
    so that the text tower reads out at the text's end. In evaluation no word is hidden, and unit
    embeddings are compared, with `late_interaction` too.
    """

    augmentation: Augmentation = "mocov2"
    mean: Rgb = photometry.IMAGENET_MEAN
    std: RgbDeviation = photometry.IMAGENET_STD
    contrastive_weight: NonNegative = 0.4
    neighbour_weight: NonNegative = 0.2
    simsiam_weight: NonNegative = 0.2
    masked_lm_weight: NonNegative = 0.2
    late_interaction_weight: NonNegative = 0.0
    contrast_clean_caption: bool = False
    second_text: Literal["augmented", "other"] = "augmented"
    mask_rate: MaskRate = 0.15
    # the predictor's hidden layer has half this width
    simsiam_width: Annotated[int, Range(2, 2**16)] = 1024
    queue_size: Count = 65536
    neighbour_direction: Literal["image_to_text", "both"] = "image_to_text"
    top_k: Count | None = 16
    mask_padding: bool = True
    token_width: Width = 256
    logit_scale_init: LogScale = math.log(1 / 0.07)
    logit_scale_cap: Positive | None = 100.0
    groups: Count = 1
    mask_id: CountOrZero | None = None
    special_ids: tuple[CountOrZero, ...] = ()

    filled: ClassVar[Mapping[str, str]] = WORDS

    def __post_init__(self):
        used = self.contrastive_weight or self.neighbour_weight
        check(used > 0, "DeCLIP.contrastive_weight", 0, "more than 0, or a neighbour_weight > 0")
        check_masking(self, used=self.hides_words)
        check_late_interaction(self)
        check(
            self.text.embed_dim > 0,
            "config.text.embed_dim",
            self.text.embed_dim,
            "more than 0: the width of the shared space, which is also the queue's",
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
                *(self.token_width, self.top_k, self.mask_padding, self.logit_scale_init),
                dtype=compute_dtype(self),
            )

    @property
    def reads_tokens(self) -> bool:
        return self.late_interaction_weight > 0

    @property
    def hides_words(self) -> bool:
        return self.masked_lm_weight > 0 or not self.contrast_clean_caption

    @property
    def views(self) -> Views:
        views = super().views
        return views._replace(pictures=views.pictures * 2, texts=("caption", self.second_text))

    def chance(self, rows: int) -> dict[str, float]:
        return {"loss/contrastive": math.log(rows)}

    def term_chances(self, rows: int) -> dict[str, float]:
        chances = {"neighbour": math.log(rows), "simsiam": 0.0, "late_interaction": math.log(rows)}
        chances["masked_lm"] = math.log(self.text.vocab_size)
        present = {f"loss/{k}": x for k, x in chances.items() if getattr(self, f"{k}_weight")}
        return self.chance(rows) | present

    def init_memory(self) -> PyTree:
        if not self.neighbour_weight:
            return {}
        shape = (self.queue_size, self.text.embed_dim)
        shape = shape if self.groups == 1 else (self.groups, *shape)
        rows = jax.random.normal(jax.random.key(0), shape, jnp.float32)
        return {"queue": unit(rows), "pointer": jnp.int32(0)}

    def embed(self, batch: Batch, keys: Key[Array, " b"], *, train: bool) -> DeCLIPFeatures:
        ids, caption, second = batch.text[:, 0], self.words(batch, 0), self.words(batch, 1)

        hidden, selected = caption, jnp.zeros(ids.shape, bool)
        if train and self.hides_words:
            hidden, selected = hide_words(self, batch, keys)
        contrasted = caption if self.contrast_clean_caption else hidden
        images = {_IMAGE: self.picture(batch, keys), _OTHER_IMAGE: self.picture(batch, keys, 1)}
        texts = {_TEXT: contrasted, _OTHER_TEXT: second}
        if self.masked_lm_weight and self.contrast_clean_caption:
            texts[_MASKED_TEXT] = hidden
        first_image, other_image = self.encode_views("image", images, keys, train=train)
        first_text, other_text, *masked = self.encode_views("text", texts, keys, train=train)
        masked_lm = image_tokens = text_tokens = None
        if self.masked_lm_weight:
            tokens = present((masked[0] if masked else first_text).tokens)
            head = self.vocabulary(tokens.shape[-1])
            total, count = losses.masked_lm(tokens, *head, ids, selected)
            masked_lm = jnp.stack([total, count.astype(total.dtype)], axis=1)
        if self.late_interaction_weight:
            dense, end = self.late_interaction, self.text.eot_id
            image_tokens = dense.image_tokens(present(first_image.tokens))
            text_tokens = dense.text_tokens(present(first_text.tokens), ids, end)
        return DeCLIPFeatures(
            image=wide(present(first_image.raw)),
            other_image=wide(present(other_image.raw)),
            text=present(first_text.unit),
            other_text=present(other_text.unit),
            masked_lm=masked_lm,
            image_tokens=image_tokens,
            text_tokens=text_tokens,
            ids=self.ids(batch),
        )

    def loss(self, features: DeCLIPFeatures, memory: PyTree, *, train: bool) -> Loss:
        rows = len(features.text)
        check_groups(self.groups, rows)
        images = unit(features.image), unit(features.other_image)
        texts = features.text, features.other_text
        scale = capped(jnp.exp(self.logit_scale), self.logit_scale_cap)

        def contrast(texts: Sequence[Float[Array, "b d"]], symmetric: bool) -> Float[Array, ""]:
            """CLIP's loss, averaged over both views and the given texts."""
            options = {"scale": scale, "symmetric": symmetric, "ids": features.ids}
            pairs = [losses.info_nce(i, t, **options) for t in texts for i in images]
            return jnp.mean(jnp.stack(pairs))

        metrics, terms = {}, {"contrastive": (contrast(texts, True), math.log(rows))}
        if self.neighbour_weight:
            neighbours, memory = self.neighbours(features, memory, train)
            both = self.neighbour_direction == "both"
            terms["neighbour"] = contrast(neighbours, both), math.log(rows)
        if self.simsiam_weight:
            terms["simsiam"] = jnp.mean(losses.simsiam(*self.siamese(features, train))), 0.0
        if self.masked_lm_weight:
            total, count = jnp.sum(present(features.masked_lm), axis=0)
            words = self.text.vocab_size
            terms["masked_lm"] = total / jnp.maximum(count, 1), math.log(words)
        if self.late_interaction_weight:
            tokens = present(features.image_tokens), present(features.text_tokens)
            per_row = self.late_interaction(*tokens)
            terms["late_interaction"] = jnp.mean(per_row), math.log(rows)
            metrics["logit_scale_dense"] = jnp.exp(self.late_interaction.logit_scale)
        weights = {name: getattr(self, f"{name}_weight") for name in terms}
        value = sum(weights[name] * term for name, (term, _) in terms.items())
        metrics |= {
            "loss": value,
            "chance_loss": sum(weights[name] * chance for name, (_, chance) in terms.items()),
            **{f"loss/{name}": term for name, (term, _) in terms.items()},
            "batch/R@1": jnp.mean(losses.recall_at_1(images[0], texts[0])),
            "logit_scale": scale,
        }
        return Loss(value, metrics, memory)  # pyright: ignore[reportArgumentType]

    def neighbours(
        self, features: DeCLIPFeatures, memory: PyTree, train: bool
    ) -> tuple[list[Float[Array, "b d"]], PyTree]:
        """The queue's rows nearest to each of the two texts, and the next memory. In training both
        texts enter the queue."""
        queue, pointer = memory["queue"], memory["pointer"]
        nearest = [losses.nearest(text, queue) for text in (features.text, features.other_text)]
        if train:
            for text in (features.other_text, features.text):
                queue, pointer = losses.enqueue(queue, pointer, text)
        return nearest, {"queue": queue, "pointer": pointer}

    def siamese(
        self, features: DeCLIPFeatures, train: bool
    ) -> tuple[Float[Array, "b e"], Float[Array, "b e"], Float[Array, "b e"], Float[Array, "b e"]]:
        """Prediction and projection of the first view, then of the second."""
        views = features.image, features.other_image
        z1, z2 = (self.projector(view, train=train) for view in views)
        p1, p2 = (self.predictor(z, train=train) for z in (z1, z2))
        return p1, z1, p2, z2

    def similarity_scale(self) -> Float[Array, ""]:
        return capped(super().similarity_scale(), self.logit_scale_cap)


def capped(scale: Float[Array, ""], cap: float | None) -> Float[Array, ""]:
    """min(`scale`, `cap`) with the gradient of `scale`; `cap` = None leaves `scale` as it is."""
    if cap is None:
        return scale
    fixed = jax.lax.stop_gradient(scale)
    return jnp.minimum(fixed, cap) + (scale - fixed)
