"""Base class of what a run minimises: `embed` treats each row alone, `loss` compares rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Key, UInt8

from clipx.config.ranges import Crop, Rgb, RgbDeviation
from clipx.models.base import Tower
from clipx.models.layers import check
from clipx.ops import photometry
from clipx.types import Batch, Encoded, Features, Loss, PyTree, Stored, View, Views, on_tpu

if TYPE_CHECKING:
    Augmentation = str | photometry.Policy  # checkers cannot expand the names in `Named`
else:
    Augmentation = photometry.Named | photometry.Policy


class Objective(nn.Module):
    """A training method: two towers, `embed` and `loss`.

    Subclasses add their constants as fields, which are their config keys, and write `embed` and
    `loss`. The other methods have defaults that suit a method of two plain towers.

    Everything is written in the global view, as if there were one device. Row i of the features
    that `embed` returns depends only on row i of the batch and on key i, except through BatchNorm
    inside a tower.
    """

    image: Tower
    text: Tower
    augmentation: Augmentation = "none"  # of every image view
    crop_scale: Crop | None = None  # area share; None: the augmentation's
    false_negatives: Literal["keep", "mask"] = "keep"  # mask: equal captions are not negatives
    mean: Rgb = photometry.OPENAI_MEAN  # of RGB in 0..1
    std: RgbDeviation = photometry.OPENAI_STD  # of RGB in 0..1
    # Set by the run: towers that are frozen completely, and those that are frozen below their heads
    locked: tuple[str, ...] = ()
    locked_features: tuple[str, ...] = ()

    # Fields that other sections of the config fill: {field: "section.key"}. A config cannot set
    # them under `objective`.
    filled: ClassVar[Mapping[str, str]] = {}

    @property
    def episode_steps(self) -> int | None:
        """Steps between two calls of `refresh`; None if it is never called."""
        return None

    @property
    def with_replacement(self) -> bool:
        """Whether an episode samples its rows with replacement. Otherwise it takes the next rows in
        the run's usual order."""
        return False

    @property
    def external_width(self) -> int | None:
        """Width e of the external teacher's rows, `batch.extra["teacher"]`, float32 [b, e]; None
        without a teacher."""
        return None

    @property
    def shares_space(self) -> bool:
        """Whether the towers' outputs are compared, so that both must have one width."""
        return True

    @property
    def views(self) -> Views:
        """The image views and texts that the data pipeline must deliver."""
        view = picture_view(self.augmentation, self.crop_scale)
        return Views((view,), mirror_words=view.photometry.mirror_words)

    @property
    def reads_tokens(self) -> bool:
        """Whether the objective uses `Encoded.tokens`, so that stored features must have them."""
        return "tokens" in self.compares

    @property
    def hides_words(self) -> bool:
        """Whether the text tower must read captions with hidden words, which cannot be stored."""
        return False

    @property
    def compares(self) -> tuple[str, ...]:
        """The fields of `Encoded` that `similarity` reads."""
        return ("unit",)

    def embed(self, batch: Batch, keys: Key[Array, " b"], *, train: bool) -> Features:
        """Features of every row, each computed from its own row of the batch and its own key."""
        raise TypeError(f"{type(self).__name__} does not implement embed")

    # `features` is whatever subclass of `Features` the objective's own `embed` returns.
    def loss(self, features: Any, memory: PyTree, *, train: bool) -> Loss:
        """The loss over all rows, its metrics, and the memory for the next step."""
        raise TypeError(f"{type(self).__name__} does not implement loss")

    def chance(self, rows: int) -> dict[str, float]:
        """The metrics that compare images with captions, and what each is in a batch of `rows` rows
        if the outputs are the same for all rows. {}: the loss is compared with `chance_loss`."""
        return {}

    def term_chances(self, rows: int) -> dict[str, float]:
        """What each term `loss/<name>` is, before its weight, in a batch of `rows` rows if the
        outputs are the same for all rows. A term that no number is known for is left out."""
        return self.chance(rows)

    def init_memory(self) -> PyTree:
        """The memory at step 0; {} for an objective that keeps none."""
        return {}

    def episode_features(self, features: Any) -> Features:
        """What `refresh` receives of one batch, from the features that `embed` computed in
        evaluation mode."""
        return features

    def refresh(self, memory: PyTree, features: Any, *, key: Key[Array, ""]) -> PyTree:
        """The memory of a new episode, from the `episode_features` of all its rows. Row p is the
        one at `position` p."""
        return memory

    def picture(
        self, batch: Batch, keys: Key[Array, " b"], view: int = 0
    ) -> UInt8[Array, "b h w 3"] | Stored:
        """One view of the batch's images, after its photometric augmentation, or its features."""
        if "image_features" in batch.extra:
            return _stored(batch, "image", view)
        policy = self.views.pictures[view].photometry
        return photometry.photometry(batch.image[:, view], tower_keys(keys, _VIEW + view), policy)

    def words(self, batch: Batch, text: int = 0) -> Int32[Array, "b n"] | Stored:
        """The token ids of one text of each row, or its features."""
        if "text_features" in batch.extra:
            return _stored(batch, "text", text).replace(ids=batch.text[:, text])
        return batch.text[:, text]

    def ids(self, batch: Batch) -> Int32[Array, " b"] | None:
        """The `ids` that `losses` take: equal for equal captions. None keeps those as negatives."""
        return caption_ids(batch.text[:, 0]) if self.false_negatives == "mask" else None

    def encode_image(
        self,
        image: UInt8[Array, "b h w 3"] | Stored,
        *,
        train: bool = False,
        keys: Key[Array, " b"] | None = None,
    ) -> Encoded:
        """Output of the image tower for raw images: uint8, RGB."""
        if not isinstance(image, Stored):
            image = photometry.normalize(image, self.mean, self.std)
        return self._tower("image", image, train, keys)

    def encode_text(
        self,
        text: Int32[Array, "b n"] | Stored,
        *,
        train: bool = False,
        keys: Key[Array, " b"] | None = None,
    ) -> Encoded:
        """Output of the text tower for token ids."""
        return self._tower("text", text, train, keys)

    def encode_views(
        self,
        tower: Literal["image", "text"],
        views: Mapping[int, Array | Stored],
        keys: Key[Array, " b"],
        *,
        train: bool,
    ) -> list[Encoded]:
        """Outputs of one tower for several views or texts of the same rows, by the numbers of their
        independent keys.

        On TPUs a tower whose blocks are scanned takes all views as one batch: of two loops over the
        same shapes the compiler first fills what they stack with zeros.
        """
        encode = self.encode_image if tower == "image" else self.encode_text
        arrays = [x for x in views.values() if not isinstance(x, Stored)]
        scanned = on_tpu() and getattr(getattr(self, tower), "scan", False)
        if not scanned or len(arrays) < len(views):
            return [encode(x, train=train, keys=tower_keys(keys, use)) for use, x in views.items()]

        def joined(*xs: Array) -> Array:
            """[b v ...] flattened, so that all views of a row stay on its device."""
            return jnp.stack(xs, axis=1).reshape(-1, *xs[0].shape[1:])

        own = joined(*(tower_keys(keys, use) for use in views))
        encoded = encode(joined(*arrays), train=train, keys=own)

        def view(i: int) -> Encoded:
            return jax.tree.map(lambda x: x.reshape(-1, len(views), *x.shape[1:])[:, i], encoded)

        return [view(i) for i in range(len(views))]

    def _tower(
        self, name: str, x: Array | Stored, train: bool, keys: Key[Array, " b"] | None
    ) -> Encoded:
        """Output of one tower. What is locked of it runs in evaluation mode and gets no
        gradient. Of stored features only the head is left to compute."""
        tower = getattr(self, name)
        if isinstance(x, Stored):
            features = jax.tree.map(lambda f: f.astype(tower.dtype), (x.backbone, x.tokens))
        elif name in (*self.locked, *self.locked_features):
            features = jax.lax.stop_gradient(tower.features(x))
        else:
            return tower(x, train=train, keys=keys)
        if name in self.locked:
            return jax.lax.stop_gradient(tower.project(*features))
        return tower.project(*features, train=train, keys=keys)

    def tower_features(
        self, name: str, rows: Array
    ) -> tuple[Float[Array, "b c"], Float[Array, "b n c"]]:
        """(pooled features, tokens) of raw images or token ids in evaluation mode: what is stored
        of a frozen tower."""
        if name == "image":
            rows = photometry.normalize(rows, self.mean, self.std)
        return getattr(self, name).features(rows)

    def similarity(self, images: Encoded, texts: Encoded) -> Float[Array, "i t"]:
        """Score of every image with every text: the inner product of their unit embeddings."""
        rows = present(images.unit), present(texts.unit)
        return jnp.einsum("id,td->it", *rows, precision=jax.lax.Precision.HIGHEST)

    def similarity_of_texts(self, images: Encoded, texts: Encoded) -> Float[Array, "i t"]:
        """Score of every image with every text, by which a text picks its image. It is `similarity`
        for a method that scores a pair in one way."""
        return self.similarity(images, texts)

    def similarity_scale(self) -> Float[Array, ""]:
        """The factor that makes logits of `similarity`: exp(logit_scale) as the loss multiplies by
        it, or 1 for a method without one."""
        scale = getattr(self, "logit_scale", None)
        return jnp.ones(()) if scale is None else jnp.exp(scale)

    def __call__(self, batch: Batch, keys: Key[Array, " b"], memory: PyTree) -> Loss:
        """`embed` and then `loss`. Initialisation traces it, so that every parameter is created."""
        return self.loss(self.embed(batch, keys, train=True), memory, train=True)


_VIEW = 1 << 16  # offset that keeps the keys of views apart from the keys of towers


def _stored(batch: Batch, tower: str, which: int) -> Stored:
    """The stored features of one view or text of each row."""
    tokens = batch.extra.get(f"{tower}_tokens")
    return Stored(
        backbone=batch.extra[f"{tower}_features"][:, which],
        tokens=None if tokens is None else tokens[:, which],
    )


def caption_ids(text: Int32[Array, "b n"]) -> Int32[Array, " b"]:
    """A hash of each row's tokens. Equal captions have equal hashes; two different captions collide
    with a probability of 2^-32."""
    n = text.shape[1]
    weights = np.random.default_rng(0).integers(1 << 32, size=n, dtype=np.uint32) | 1
    total = jnp.sum(text.astype(jnp.uint32) * weights, axis=1, dtype=jnp.uint32)
    return jax.lax.bitcast_convert_type(total, jnp.int32)


def picture_view(augmentation: Augmentation, crop_scale: tuple[float, float] | None) -> View:
    """The view of an augmentation, with crops of `crop_scale` if that is given."""
    policy = photometry.find(augmentation)
    check(
        crop_scale is None or policy.scale is not None,
        "config.objective.crop_scale",
        f"{crop_scale}, with an augmentation that cuts out the centre",
        "None, or an augmentation with random crops",
        "config.objective.crop_scale=None",
    )
    return View(crop_scale or policy.scale, policy.flip, policy)


def check_groups(groups: int, rows: int) -> None:
    """Raises `ConfigError` unless `groups` divides `rows`, the size of the global batch."""
    check(
        rows % groups == 0,
        "config.objective.groups",
        f"{groups}, with {rows} rows",
        "a number that divides the batch size",
    )


def present(x: Array | None) -> Array:
    """`x`, which must not be None. Towers fill every field of `Encoded`, and `embed` fills those
    fields of its features that `loss` reads."""
    assert x is not None
    return x


def tower_keys(keys: Key[Array, " b"], tower: int) -> Key[Array, " b"]:
    """One key per row for one use of a tower, independent of the keys of other towers and views."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, tower)


def scalar(module: nn.Module, name: str, value: float) -> Any:
    """A learned float32 scalar, initialised to `value`."""
    return module.param(name, nn.initializers.constant(value), (), jnp.float32)
