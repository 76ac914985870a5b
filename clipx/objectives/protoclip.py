"""ProtoCLIP: CLIP whose rows also pick the prototype of the cluster that another modality puts them
in, clusters of an episode at a time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from clipx import losses
from clipx.models.heads import PrototypeHeads
from clipx.models.layers import check, unit, wide
from clipx.objectives.base import Objective, check_groups, scalar, tower_keys
from clipx.objectives.filip import check_weights
from clipx.ops import kmeans, photometry
from clipx.types import Features, Loss, PyTree

_MODALITIES = ("image", "text")
_PAIRS = (  # a term, who picks in it, and whose clusters
    ("prototype", "image", "text"),
    ("prototype", "text", "image"),
    ("external", "image", "external"),
    ("external", "text", "external"),
)
_LEAST = {  # values of fields
    "target_temperature": 0,
    "k": 2,
    "iterations": 1,
    "restarts": 1,
    "projection_dim": 1,
    "projection_hidden": 1,
    "projection_layers": 0,
    "teacher_width": 1,
    "warmup_episodes": 0,
    "groups": 1,
}


@dataclasses.dataclass(frozen=True)
class Compat:
    """What published numbers were trained with and nobody would choose."""

    lit_start: bool = False  # episodes of the contrastive loss alone begin one before `lit_start`


class ProtoCLIPFeatures(Features):
    image: Float[Array, "b d"]  # not normalised
    text: Float[Array, "b d"]
    position: Int32[Array, " b"]  # place in the episode
    teacher: Float[Array, "b e"] | None = None  # in the pass before an episode
    ids: Int32[Array, " b"] | None = None  # of captions, where equal ones are no negatives


class EpisodeFeatures(Features):
    image: Float[Array, "b d"]  # what the heads say, unit rows
    text: Float[Array, "b d"]
    teacher: Float[Array, "b e"] | None = None


class ProtoCLIP(Objective):
    """CLIP's loss + `prototype_weight` x prototypes + `external_weight` x external prototypes
    (arXiv 2206.10996, as megvii-research/protoclip computes them).

    An episode is `episode_size` // `batch_size` steps; the rows left over, which the reference
    clusters too but never trains on, are left out. Before it, k-means of what the heads say of its
    rows gives each row a label in either modality. In its steps a picture picks, among k
    prototypes, that of its caption's cluster, and a caption that of its picture's. k-means of both
    modalities, and of the teacher, start from the same rows.

    back_translation: the prototypes are the means of the picking modality's own rows over the other
      one's clusters, zeros for a cluster left empty; without, the other one's centroids. None is
      normalised.
    target_temperature: the target is a softmax over the centroids of the modality that labelled, by
      their products with the row's own over this temperature; 0: one-hot.
    external_weight: the same with the clusters of a teacher's rows, which `config.data.teacher`
      names; targets are one-hot. Needs `back_translation`, as a teacher's space is not the heads'.
    warmup_episodes, lit_start: the contrastive loss alone, with a weight of 1, in so many first
      episodes, and from that episode (of 0, 1, ...) on; a `horizon` of the optimizer's rule for the
      image tower then ends its training, and the text tower goes on to it (LiT). There the heads
      learn nothing, while their running statistics move.
    with_replacement: each of an episode's rows is drawn from all of the data; else they are the
      next of the run's order, so that the same pairs are seen as without episodes.

    compat.lit_start: the reference's `--lit-start-epoch` n begins with episode n - 1.

    `groups` = n: the heads' statistics are those of B/n rows, as on n devices. Negatives are all
    rows in any case. In evaluation the towers' unit rows are compared, without heads.
    """

    augmentation: photometry.Named | photometry.Policy = "protoclip_light"
    contrastive_weight: float = 1.0
    prototype_weight: float = 1.0
    external_weight: float = 0.0
    back_translation: bool = True
    target_temperature: float = 0.01
    k: int = 20_000
    episode_size: int = 200_000  # rows
    with_replacement: bool = True
    iterations: int = 20  # of k-means
    restarts: int = 3
    projection_dim: int = 128
    projection_hidden: int = 2048
    projection_layers: int = 1  # before the last: dense, BatchNorm, ReLU
    teacher_width: int = 64
    warmup_episodes: int = 1
    lit_start: int | None = None
    logit_scale_init: float = math.log(1 / 0.07)  # of both scales
    groups: int = 1
    compat: Compat = Compat()
    batch_size: int = 512  # the run's

    filled: ClassVar[Mapping[str, str]] = {"batch_size": "train.batch_size"}

    def __post_init__(self):
        check_weights(self, "contrastive_weight", "prototype_weight", "external_weight")
        for field, least in _LEAST.items():
            value = getattr(self, field)
            check(value >= least, f"ProtoCLIP.{field}", value, f"{least} or more")
        used = self.prototype_weight + self.external_weight
        check(used > 0, "ProtoCLIP.prototype_weight", 0, "a weight for this term or `external`")
        check(
            self.back_translation or not self.external_weight,
            "ProtoCLIP.external_weight",
            f"{self.external_weight}, without back_translation",
            "0: a teacher's centroids are not in the space of the heads",
            "config.objective.back_translation=true",
        )
        image, text = self.image.embed_dim, self.text.embed_dim
        found = f"{text}, and {image} of the image tower"
        check(image == text, "config.text.embed_dim", found, "one width for both")
        self._check_episode()
        super().__post_init__()

    def _check_episode(self):
        size, batch = self.episode_size, self.batch_size
        check(
            size >= batch,
            "ProtoCLIP.episode_size",
            f"{size} rows, with batches of {batch}",
            "a batch or more",
            f"config.objective.episode_size={batch}, or a smaller config.train.batch_size",
        )
        rows = size // batch * batch
        check(
            self.k <= rows,
            "ProtoCLIP.k",
            f"{self.k}, with too few rows for k: episodes of {size // batch} batches of {batch}",
            f"{rows} at most",
            f"config.objective.k={rows}, or a larger config.objective.episode_size",
        )
        if self.lit_start is not None:
            least = self.warmup_episodes + 1 + self.compat.lit_start
            check(
                self.lit_start >= least,
                "ProtoCLIP.lit_start",
                f"{self.lit_start}, after warmup_episodes={self.warmup_episodes}",
                f"{least} or more, so that an episode between the two learns from prototypes",
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
        """Those of terms with a weight."""
        return tuple(pair for pair in _PAIRS if getattr(self, f"{pair[0]}_weight"))

    def init_memory(self) -> PyTree:
        rows, table = self.episode_steps * self.batch_size, (self.k, self.projection_dim)
        clustered = list(dict.fromkeys(name for _, _, name in self._pairs))
        soft = self.target_temperature > 0 or not self.back_translation
        translated = [f"{a}_from_{b}" for _, a, b in self._pairs if self.back_translation]
        scalars = [f"{name}_{what}" for name in clustered for what in ("inertia", "empty")]
        scalars += ["equal_labels"] if self.prototype_weight else []

        def zeros(names, shape=(), dtype=jnp.float32):
            return {name: jnp.zeros(shape, dtype) for name in names}

        return {
            "episode": jnp.int32(-1),  # the number of the current one; -1 before the first
            "labels": zeros(clustered, rows, jnp.int32),  # by position
            "centroids": zeros([x for x in clustered if soft and x in _MODALITIES], table),
            "translated": zeros(translated, table),
            "clusters": zeros(scalars),  # metrics of the episode's
        }

    def embed(self, batch, keys, *, train):
        picture = self.picture(batch, keys)
        image = self.encode_image(picture, train=train, keys=tower_keys(keys, 0))
        text = self.encode_text(batch.text[:, 0], train=train, keys=tower_keys(keys, 1))
        return ProtoCLIPFeatures(
            image=wide(image.raw),
            text=wide(text.raw),
            position=batch.position,
            teacher=batch.extra.get("teacher"),
            ids=self.ids(batch),
        )

    def episode_features(self, features):
        image, text = self.heads(features.image, features.text)
        return EpisodeFeatures(image=image, text=text, teacher=features.teacher)

    def refresh(self, memory, features, *, key):
        rows = {"image": _finite(features.image), "text": _finite(features.text)}
        if self.external_weight:
            rows["external"] = _finite(features.teacher)
        found = {
            name: kmeans.fit(
                rows[name], self.k, key=key, iterations=self.iterations, restarts=self.restarts
            )
            for name in memory["labels"]
        }
        labels = {name: one.assignment for name, one in found.items()}
        clusters = {}
        for name, one in found.items():
            clusters[f"{name}_inertia"] = one.inertia / len(rows[name])  # of a row
            clusters[f"{name}_empty"] = jnp.sum(one.counts == 0)
        if self.prototype_weight:
            clusters["equal_labels"] = jnp.mean(labels["image"] == labels["text"])
        return {
            "episode": memory["episode"] + 1,
            "labels": labels,
            "centroids": {name: found[name].centroids for name in memory["centroids"]},
            "translated": {
                f"{a}_from_{b}": losses.back_translate(labels[b], rows[a], self.k)
                for _, a, b in self._pairs
                if self.back_translation
            },
            "clusters": {name: x.astype(jnp.float32) for name, x in clusters.items()},
        }

    def loss(self, features, memory, *, train):
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
            "loss/chance": jnp.where(active, self.contrastive_weight * chance + others, chance),
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
        """The terms in which rows pick prototypes, and metrics. Unless `active` nothing learns from
        them, even where they are not finite."""

        def learned(x):
            return jnp.where(active, x, jax.lax.stop_gradient(x))

        heads = self.heads(features.image, features.text, train=train)
        students = dict(zip(_MODALITIES, map(learned, heads)))
        scale = learned(jnp.exp(self.heads.logit_scale))
        tables = {name: memory[name] for name in ("centroids", "translated")}
        tables = jax.tree.map(lambda x: jnp.asarray(x, heads[0].dtype), tables)
        terms, metrics = {}, {"logit_scale_prototype": scale}
        for term, a, b in self._pairs:
            name, student = f"{a}_from_{b}", students[a]
            labels = jnp.asarray(memory["labels"][b])[features.position]
            prototypes = tables["translated"].get(name, tables["centroids"].get(b))
            temperature = self.target_temperature if term == "prototype" else 0.0
            target = labels  # which stand for their one-hot
            if temperature:
                target = losses.targets(tables["centroids"][b], labels, temperature=temperature)
            each = losses.prototypical(student, prototypes, target, scale=scale)
            terms[term] = terms.get(term, 0) + jnp.mean(each) / 2
            accuracy = losses.prototype_accuracy(student, prototypes, labels)
            metrics[f"batch/{name}"] = jnp.mean(accuracy)
        return terms, metrics


def _finite(x: Float[Array, "m d"]) -> Float[Array, "m d"]:
    """`x` with 0 for what is not finite, as k-means takes it."""
    return jnp.where(jnp.isfinite(x), x, 0).astype(jnp.float32)
