"""What a run minimises: two towers, `embed` in which rows are alone, `loss` in which they meet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Key, UInt8

from clipx.models.layers import Tower, check
from clipx.ops import photometry
from clipx.types import Batch, Encoded, Features, Loss, PyTree, View, Views


class Objective(nn.Module):
    """A method. Subclasses add their constants as fields, which are their config keys, and write
    `embed` and `loss`; the rest has defaults that suit a method of two plain towers.

    Everything is written in the global view, as if there were one device. Row i of what `embed`
    returns comes from row i of the batch and key i alone (but for BatchNorm inside a tower).
    """

    image: Tower
    text: Tower
    augmentation: photometry.Named | photometry.Policy = "none"  # of each picture view
    crop_scale: tuple[float, float] | None = None  # area share of a crop; None: the augmentation's
    false_negatives: Literal["keep", "mask"] = "keep"  # mask: equal captions are no negatives
    mean: tuple[float, float, float] = photometry.OPENAI_MEAN  # of RGB in 0..1
    std: tuple[float, float, float] = photometry.OPENAI_STD
    locked: tuple[str, ...] = ()  # given: towers that the optimizer freezes whole

    # Fields that other sections of the config fill: {field: "section.key"}. A config cannot set
    # them under `objective`.
    filled: ClassVar[Mapping[str, str]] = {}

    @property
    def episode_steps(self) -> int | None:
        """Steps between two calls of `refresh`; None: never."""
        return None

    @property
    def with_replacement(self) -> bool:
        """Whether an episode's rows are drawn with replacement; else they are the next ones of the
        run's usual order."""
        return False

    @property
    def external_width(self) -> int | None:
        """Width of the external teacher's rows, `batch.extra["teacher"]`, float32 [b, e]; None
        without a teacher."""
        return None

    @property
    def views(self) -> Views:
        """What the data pipeline must deliver."""
        view = picture_view(self.augmentation, self.crop_scale)
        return Views((view,), mirror_words=view.photometry.mirror_words)

    @property
    def compares(self) -> tuple[str, ...]:
        """The fields of `Encoded` that `similarity` reads."""
        return ("unit",)

    def embed(self, batch: Batch, keys: Key[Array, " b"], *, train: bool) -> Features:
        """Features of every row, each from its own row of the batch and its own key."""
        raise TypeError(f"{type(self).__name__} has no embed")

    def loss(self, features: Features, memory: PyTree, *, train: bool) -> Loss:
        """The loss over all rows, its metrics, and the memory of the next step."""
        raise TypeError(f"{type(self).__name__} has no loss")

    def init_memory(self) -> PyTree:
        """The memory of step 0."""
        return {}

    def episode_features(self, features: Features) -> Features:
        """What `refresh` is given of a batch that `embed` has seen in evaluation mode."""
        return features

    def refresh(self, memory: PyTree, features: Features, *, key: Key[Array, ""]) -> PyTree:
        """The memory of a new episode, from the features of all its rows: row p is that of
        `position` p."""
        return memory

    def picture(
        self, batch: Batch, keys: Key[Array, " b"], view: int = 0
    ) -> UInt8[Array, "b h w 3"]:
        """One view of the batch's pictures after its photometry."""
        policy = self.views.pictures[view].photometry
        return photometry.photometry(batch.image[:, view], tower_keys(keys, _VIEW + view), policy)

    def ids(self, batch: Batch) -> Int32[Array, " b"] | None:
        """What `losses` take as `ids`: rows of one caption share one; None keeps them negatives."""
        return caption_ids(batch.text[:, 0]) if self.false_negatives == "mask" else None

    def encode_image(
        self,
        image: UInt8[Array, "b h w 3"],
        *,
        train: bool = False,
        keys: Key[Array, " b"] | None = None,
    ) -> Encoded:
        """The image tower's rows, for pictures as a user has them: uint8, RGB."""
        image = photometry.normalize(image, self.mean, self.std)
        return self._tower("image", image, train, keys)

    def encode_text(
        self,
        text: Int32[Array, "b n"],
        *,
        train: bool = False,
        keys: Key[Array, " b"] | None = None,
    ) -> Encoded:
        """The text tower's rows, for token ids."""
        return self._tower("text", text, train, keys)

    def _tower(self, name: str, x, train: bool, keys) -> Encoded:
        """What a tower says; a locked one, as in evaluation and without a gradient."""
        if name not in self.locked:
            return getattr(self, name)(x, train=train, keys=keys)
        return jax.lax.stop_gradient(getattr(self, name)(x))

    def similarity(self, images: Encoded, texts: Encoded) -> Float[Array, "i t"]:
        """The score of every picture with every text: the product of unit rows."""
        return jnp.einsum("id,td->it", images.unit, texts.unit, precision=jax.lax.Precision.HIGHEST)

    def similarity_scale(self) -> Float[Array, ""]:
        """The factor that makes logits of `similarity`: exp(logit_scale) as the loss multiplies by
        it, or 1 for a method without one."""
        scale = getattr(self, "logit_scale", None)
        return jnp.ones(()) if scale is None else jnp.exp(scale)

    def __call__(self, batch: Batch, keys: Key[Array, " b"], memory: PyTree) -> Loss:
        """`embed` and `loss` in one: what initialisation traces, so that every parameter exists."""
        return self.loss(self.embed(batch, keys, train=True), memory, train=True)


_VIEW = 1 << 16  # keys of views lie apart from those of towers


def caption_ids(text: Int32[Array, "b n"]) -> Int32[Array, " b"]:
    """A hash of each row's tokens: equal for equal captions, and else different but for one pair
    in 2^32."""
    n = text.shape[1]
    weights = np.random.default_rng(0).integers(1 << 32, size=n, dtype=np.uint32) | 1
    total = jnp.sum(text.astype(jnp.uint32) * weights, axis=1, dtype=jnp.uint32)
    return jax.lax.bitcast_convert_type(total, jnp.int32)


def picture_view(
    augmentation: photometry.Named | photometry.Policy, crop_scale: tuple[float, float] | None
) -> View:
    """A view of an augmentation, its crops of `crop_scale` if that is given."""
    policy = photometry.find(augmentation)
    return View(crop_scale or policy.scale, policy.flip, policy)


def check_groups(groups: int, rows: int) -> None:
    """Raises `ConfigError` for rows that do not fall into so many groups."""
    check(
        rows % groups == 0,
        "config.objective.groups",
        f"{groups}, with {rows} rows",
        "a number that divides the batch",
    )


def tower_keys(keys: Key[Array, " b"], tower: int) -> Key[Array, " b"]:
    """One key per row for one use of a tower, independent of the other towers' and views'."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, tower)


def scalar(module: nn.Module, name: str, value: float) -> Any:
    """A learned float32 scalar that starts at `value`."""
    return module.param(name, nn.initializers.constant(value), (), jnp.float32)
