"""The words that every room speaks.

Shape letters: b rows of a batch, v picture views, u texts, h and w pixels, n tokens, d the shared
embedding width, c a tower's own width.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
from flax import struct
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32, UInt8

PyTree = Any
BATCH_AXES = ("data", "fsdp")  # the mesh axes over which rows are spread


def batch_axes() -> tuple[str, ...]:
    """The batch axes of the mesh that is set, those of one device left out; () with no mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(a for a in BATCH_AXES if a in mesh.axis_names and mesh.shape[a] > 1)


def constrain_rows(tree: PyTree, axis: int = 0) -> PyTree:
    """`tree` with the rows of every leaf kept on the batch axes.

    Without it the partitioner may follow a sharded weight instead and replicate the batch.
    """
    axes = batch_axes()
    if not axes:
        return tree
    spec = PartitionSpec(*[None] * axis, axes)
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, spec), tree)


class View(NamedTuple):
    """One picture view: a crop covering `scale` (least, most) of the area, with `flip` every other
    one mirrored, and what the device then does to its colours (an `augment.Policy`)."""

    scale: tuple[float, float]
    flip: bool
    photometry: Any


class Views(NamedTuple):
    """What the data pipeline must deliver for an objective.

    The texts: `caption`; `augmented`, the same caption after one operation of `text_augment`;
    `other`, another caption of the same picture, or the same where it has one. With `mirror_words`
    a mirrored picture's captions have left and right swapped, and one coin decides for all views.
    """

    pictures: tuple[View, ...]
    texts: tuple[Literal["caption", "augmented", "other"], ...] = ("caption",)
    mirror_words: bool = False


class Batch(struct.PyTreeNode):
    """One global batch; rows are sharded over the mesh's batch axes."""

    image: UInt8[Array, "b v h w 3"]  # geometry is done on the host, photometry on the device
    text: Int32[Array, "b u n"]
    row: Int32[Array, " b"]  # stable id of the example in the data set
    position: Int32[Array, " b"]  # place in the epoch or episode: rows may repeat, it does not
    extra: dict[str, Array] = struct.field(default_factory=dict)


class Encoded(struct.PyTreeNode):
    """What one tower says of its rows. A field that nobody uses is never computed."""

    unit: Float[Array, "b d"] | None = None  # `raw`, L2-normalised, at least float32
    raw: Float[Array, "b d"] | None = None  # after the projection
    backbone: Float[Array, "b c"] | None = None  # pooled, before the projection
    tokens: Float[Array, "b n c"] | None = None  # per patch or per text token


class Features(struct.PyTreeNode):
    """What `embed` hands to `loss`: every leaf has the row axis first. Objectives subclass it."""


class Loss(NamedTuple):
    value: Float[Array, ""]
    metrics: dict[str, Float[Array, ""]]
    memory: PyTree


class TrainState(struct.PyTreeNode):
    """All that a run is between two steps."""

    step: Int32[Array, ""]
    params: PyTree
    opt_state: PyTree
    batch_stats: PyTree  # running statistics of BatchNorm; {} without it
    memory: PyTree  # queues, prototypes; {} for most objectives


Metrics = dict[str, jax.Array]


class Curve(NamedTuple):
    """How a metric of training is drawn in the report."""

    chart: str  # title of its chart; metrics of one title share a chart
    from_zero: bool = True  # the vertical axis starts at 0
    smooth: bool = True  # a running mean is drawn over the values: they are noisy
    level: bool = False  # only the last value is drawn, as a dashed line


@dataclasses.dataclass(frozen=True)
class Metric:
    """What a number means and how it is shown. The defaults serve a number nobody knows."""

    better: Literal["more", "less"] | None = None  # None: neither is better
    shown: Literal["percent", "number"] = "number"  # percent: the number is between 0 and 1
    detail: bool = False  # one of many, such as one a class: metrics.jsonl alone has it
    headline: bool = False  # of training: on the console too
    curve: Curve | None = None  # of training: None draws nothing. Every eval's metric is drawn
    column: str = ""  # heading where runs are compared; "" leaves it out
    label: str = ""  # metrics of one column share a cell; this tells them apart in the heading
    benchmark: str = ""  # its name in CLIP_benchmark; "" where that has none
