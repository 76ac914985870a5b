"""ProtoCLIP: CLIP whose rows also pick prototypes, by the clusters of the other modality or of a
teacher. Clusters are computed once per episode."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, Key

from clipx import losses
from clipx.config.ranges import (
    INT,
    BatchSize,
    Count,
    CountOrZero,
    LogScale,
    NonNegative,
    Range,
    Width,
)
from clipx.models.heads import PrototypeHeads
from clipx.models.layers import check, unit, wide
from clipx.objectives.base import (
    Augmentation,
    Objective,
    check_groups,
    present,
    scalar,
    tower_keys,
)
from clipx.ops import kmeans
from clipx.types import Batch, Features, Loss, PyTree

_MODALITIES: tuple[str, ...] = ("image", "text")
_PAIRS = (  # term, modality that picks, modality whose clusters give the labels
    ("prototype", "image", "text"),
    ("prototype", "text", "image"),
    ("external", "image", "external"),
    ("external", "text", "external"),
)


@dataclasses.dataclass(frozen=True)
class Compat:
    """Quirks that published numbers were trained with and that nobody would choose."""

    lit_start: bool = False  # the contrastive loss is alone from one episode earlier


class ProtoCLIPFeatures(Features):
    image: Float[Array, "b d"]  # not normalised
    text: Float[Array, "b d"]
    position: Int32[Array, " b"]  # place in the episode
    teacher: Float[Array, "b e"] | None = None  # only in the pass before an episode
    ids: Int32[Array, " b"] | None = None  # caption hashes; None: equal captions stay negatives


class EpisodeFeatures(Features):
    image: Float[Array, "b d"]  # output of the heads, unit length
    text: Float[Array, "b d"]
    teacher: Float[Array, "b e"] | None = None


class ProtoCLIP(Objective):
    """CLIP's loss + `prototype_weight` x prototypes + `external_weight` x external prototypes
    (arXiv 2206.10996, as megvii-research/protoclip computes them).

    An episode is `episode_size` // `batch_size` steps; rows that do not fill a batch are left out.
    (The reference clusters them but never trains on them.) Before each episode, k-means on the
    heads' outputs gives each of its rows a label in either modality. During the episode an image
    picks, among k prototypes, the one of its caption's cluster, and a caption the one of its
    image's cluster. The k-means of both modalities, and of the teacher, start from the same rows.

    back_translation: a prototype is the mean of the picking modality's own rows over a cluster of
      the other modality, or zeros if the cluster is empty. Without it, a prototype is the other
      modality's centroid. Prototypes are not normalised.
    target_temperature: the target is a softmax over the labelling modality's centroids, of their
      inner products with the row's own centroid over this temperature. 0: one-hot.
    external_weight: the same term with the clusters of a teacher's rows (`config.data.teacher`).
      Targets are one-hot. Needs `back_translation`: a teacher's space is not the heads'.
    warmup_episodes, lit_start: the loss is the contrastive term alone, with a weight of 1, in the
      first `warmup_episodes` episodes and from episode `lit_start` (counted from 0) on. The heads
      then learn nothing, but their running statistics move. A `horizon` in the optimizer's rule for
      the image tower can end its training at `lit_start`, so that only the text tower learns (LiT).
    with_replacement: each row of an episode is sampled from all data. Otherwise an episode takes
      the next rows of the run's order, so that the same pairs are seen as without episodes.

    compat.lit_start: the reference's `--lit-start-epoch` n begins with episode n - 1.

    With `groups` = n, the heads take their statistics within groups of B/n rows, as on n devices.
    Negatives are all rows in any case. In evaluation the towers' unit embeddings are compared,
    without the heads.
    """

    augmentation: Augmentation = "protoclip_light"
    contrastive_weight: NonNegative = 1.0
    prototype_weight: NonNegative = 1.0
    external_weight: NonNegative = 0.0
    back_translation: bool = True
    target_temperature: Annotated[float, Range(1e-4, 1000, also=(0,))] = 0.01
    k: Annotated[int, Range(2, INT)] = 20_000
    episode_size: Count = 200_000  # rows
    with_replacement: bool = True  # pyright: ignore[reportIncompatibleMethodOverride]
    iterations: Annotated[int, Range(1, 10_000)] = 20  # of k-means
    restarts: Annotated[int, Range(1, 1000)] = 3
    projection_dim: Width = 128
    projection_hidden: Width = 2048
    projection_layers: Annotated[int, Range(0, 100)] = 1  # before the last: dense, BatchNorm, ReLU
    teacher_width: Width = 64
    warmup_episodes: CountOrZero = 1
    lit_start: CountOrZero | None = None
    logit_scale_init: LogScale = math.log(1 / 0.07)  # of both scales
    groups: Count = 1
    compat: Compat = Compat()
    batch_size: BatchSize = 512  # of the run

    filled: ClassVar[Mapping[str, str]] = {"batch_size": "train.batch_size"}

    def __post_init__(self):
        used = self.prototype_weight + self.external_weight
        check(used > 0, "ProtoCLIP.prototype_weight", 0, "more than 0, or an external_weight > 0")
        check(
            self.back_translation or not self.external_weight,
            "ProtoCLIP.external_weight",
            f"{self.external_weight}, without back_translation",
            "0 without back_translation: a teacher's centroids are not in the heads' space",
            "config.objective.back_translation=true",
        )
        self._check_episode()
        super().__post_init__()

    def _check_episode(self):
        size, batch = self.episode_size, self.batch_size
        check(
            size >= batch,
            "ProtoCLIP.episode_size",
            f"{size} rows, with batches of {batch}",
            "at least one batch",
            f"config.objective.episode_size={batch}, or a smaller config.train.batch_size",
        )
        rows = size // batch * batch
        check(
            self.k <= rows,
            "ProtoCLIP.k",
            f"{self.k}, with too few rows for k: episodes of {size // batch} batches of {batch}",
            f"at most {rows}",
            f"config.objective.k={rows}, or a larger config.objective.episode_size",
        )
        if self.lit_start is not None:
            least = self.warmup_episodes + 1 + self.compat.lit_start
            check(
                self.lit_start >= least,
                "ProtoCLIP.lit_start",
                f"{self.lit_start}, after warmup_episodes={self.warmup_episodes}",
                f"{least} or more, so that at least one episode learns from prototypes",
            )

    def setup(self):
        self.logit_scale = scalar(self, "logit_scale", self.logit_scale_init)
        widths = (self.projection_hidden,) * self.projection_layers + (self.projection_dim,)
        self.heads = PrototypeHeads(widths, self.groups, self.logit_scale_init)

    @property
    def episode_steps(self) -> int:
        return self.episode_size // self.batch_size

    @property
    def external_width(self) -> int | None:
        return self.teacher_width if self.external_weight else None

    @property
    def _pairs(self) -> tuple[tuple[str, str, str], ...]:
        """The entries of `_PAIRS` whose term has a weight."""
        return tuple(pair for pair in _PAIRS if getattr(self, f"{pair[0]}_weight"))

    def chance(self, rows: int) -> dict[str, float]:
        return {"loss/contrastive": math.log(rows)}

    def term_chances(self, rows: int) -> dict[str, float]:
        terms = dict.fromkeys((f"loss/{term}" for term, *_ in self._pairs), math.log(self.k))
        return self.chance(rows) | terms

    def init_memory(self) -> PyTree:
        rows, table_shape = self.episode_steps * self.batch_size, (self.k, self.projection_dim)
        clustered = list(dict.fromkeys(name for _, _, name in self._pairs))
        needs_centroids = self.target_temperature > 0 or not self.back_translation
        centroids = [name for name in clustered if needs_centroids and name in _MODALITIES]
        translated = [f"{a}_from_{b}" for _, a, b in self._pairs if self.back_translation]
        scalars = [f"{name}_{what}" for name in clustered for what in ("inertia", "empty")]
        scalars += ["equal_labels"] if self.prototype_weight else []

        def zeros(
            names: Iterable[str], shape: int | tuple[int, ...] = (), dtype: Any = jnp.float32
        ) -> dict[str, Array]:
            return {name: jnp.zeros(shape, dtype) for name in names}

        return {
            "episode": jnp.int32(-1),  # number of the current episode; -1 before the first
            "labels": zeros(clustered, rows, jnp.int32),  # of each row, by position
            "centroids": zeros(centroids, table_shape),
            "translated": zeros(translated, table_shape),
            "clusters": zeros(scalars),  # metrics of the episode's clusters
        }

    def embed(self, batch: Batch, keys: Key[Array, " b"], *, train: bool) -> ProtoCLIPFeatures:
        pixels = self.picture(batch, keys)
        image = self.encode_image(pixels, train=train, keys=tower_keys(keys, 0))
        text = self.encode_text(self.words(batch), train=train, keys=tower_keys(keys, 1))
        return ProtoCLIPFeatures(
            image=wide(present(image.raw)),
            text=wide(present(text.raw)),
            position=batch.position,
            teacher=batch.extra.get("teacher"),
            ids=self.ids(batch),
        )

    def episode_features(self, features: ProtoCLIPFeatures) -> EpisodeFeatures:
        image, text = self.heads(features.image, features.text)
        return EpisodeFeatures(image=image, text=text, teacher=features.teacher)

    def refresh(self, memory: PyTree, features: EpisodeFeatures, *, key: Key[Array, ""]) -> PyTree:
        rows = {"image": _finite(features.image), "text": _finite(features.text)}
        if self.external_weight:
            rows["external"] = _finite(present(features.teacher))
        fits = {
            name: kmeans.fit(
                rows[name], self.k, key=key, iterations=self.iterations, restarts=self.restarts
            )
            for name in memory["labels"]
        }
        labels = {name: fit.assignment for name, fit in fits.items()}
        clusters = {}
        for name, fit in fits.items():
            clusters[f"{name}_inertia"] = fit.inertia / len(rows[name])  # per row
            clusters[f"{name}_empty"] = jnp.sum(fit.counts == 0)
        if self.prototype_weight:
            clusters["equal_labels"] = jnp.mean(labels["image"] == labels["text"])
        return {
            "episode": memory["episode"] + 1,
            "labels": labels,
            "centroids": {name: fits[name].centroids for name in memory["centroids"]},
            "translated": {
                f"{a}_from_{b}": losses.back_translate(labels[b], rows[a], self.k)
                for _, a, b in self._pairs
                if self.back_translation
            },
            "clusters": {name: x.astype(jnp.float32) for name, x in clusters.items()},
        }

    def loss(self, features: ProtoCLIPFeatures, memory: PyTree, *, train: bool) -> Loss:
        rows = len(features.text)
        check_groups(self.groups, rows)
        image, text = unit(features.image), unit(features.text)
        scale = jnp.exp(self.logit_scale)
        contrastive = jnp.mean(losses.info_nce(image, text, scale=scale, ids=features.ids))
        active = memory["episode"] >= self.warmup_episodes
        if self.lit_start is not None:
            active &= memory["episode"] < self.lit_start - self.compat.lit_start
        terms, metrics = self._prototypes(features, memory, active, train)
        value, chance = self.contrastive_weight * contrastive, math.log(rows)
        value += sum(getattr(self, f"{name}_weight") * term for name, term in terms.items())
        value = jnp.where(active, value, contrastive)
        others = sum(getattr(self, f"{name}_weight") for name in terms) * math.log(self.k)
        metrics = {
            "loss": value,
            "chance_loss": jnp.where(active, self.contrastive_weight * chance + others, chance),
            "loss/contrastive": contrastive,
            **{f"loss/{name}": term for name, term in terms.items()},
            "batch/R@1": jnp.mean(losses.recall_at_1(image, text)),
            "batch/modality_gap": jnp.linalg.norm(jnp.mean(image, axis=0) - jnp.mean(text, axis=0)),
            "logit_scale": scale,
            **metrics,
            "clusters/episode": memory["episode"].astype(jnp.float32),
            **{f"clusters/{name}": x for name, x in memory["clusters"].items()},
        }
        return Loss(value, metrics, memory)

    def _prototypes(
        self, features: ProtoCLIPFeatures, memory: PyTree, active: Bool[Array, ""], train: bool
    ) -> tuple[dict[str, Float[Array, ""]], dict[str, Float[Array, ""]]]:
        """The terms in which rows pick prototypes, and their metrics. Unless `active` they have no
        gradient, not even NaN where they are not finite."""

        def if_active(x: Array) -> Array:
            """`x`, without a gradient unless `active`."""
            return jnp.where(active, x, jax.lax.stop_gradient(x))

        heads = self.heads(features.image, features.text, train=train)
        students = dict(zip(_MODALITIES, map(if_active, heads)))
        scale = if_active(jnp.exp(self.heads.logit_scale))
        tables = {name: memory[name] for name in ("centroids", "translated")}
        tables = jax.tree.map(lambda x: jnp.asarray(x, heads[0].dtype), tables)
        terms, metrics = {}, {"logit_scale_prototype": scale}
        for term, a, b in self._pairs:
            name, student = f"{a}_from_{b}", students[a]
            labels = jnp.asarray(memory["labels"][b])[features.position]
            prototypes = tables["translated"].get(name, tables["centroids"].get(b))
            temperature = self.target_temperature if term == "prototype" else 0.0
            target = labels  # integer labels stand for one-hot targets
            if temperature:
                target = losses.targets(tables["centroids"][b], labels, temperature=temperature)
            per_row = losses.prototypical(student, prototypes, target, scale=scale)
            terms[term] = terms.get(term, 0) + jnp.mean(per_row) / 2
            accuracy = losses.prototype_accuracy(student, prototypes, labels)
            metrics[f"batch/{name}"] = jnp.mean(accuracy)
        return terms, metrics


def _finite(x: Float[Array, "m d"]) -> Float[Array, "m d"]:
    """`x` in float32, with 0 for NaN and infinity."""
    return jnp.where(jnp.isfinite(x), x, 0).astype(jnp.float32)
