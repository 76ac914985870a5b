"""The types that every package shares.

Shape letters: b rows of a batch, v picture views, u texts, h and w pixels, n tokens, d the width of
the shared embedding, c the width of one tower.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import numpy as np
from flax import struct
from jax.sharding import PartitionSpec
from jaxtyping import Float, Int32, UInt8

PyTree = Any
if TYPE_CHECKING:
    Array = jax.Array
    Scalar = Float[Array, ""] | float
else:  # functions of arrays take NumPy's too
    Array = jax.Array | np.ndarray
    Scalar = Float[Array, ""] | float | int | np.floating

Device = Any  # jax.Device, which type checkers cannot resolve
BATCH_AXES = ("data", "fsdp")  # the mesh axes that shard the rows of a batch


def batch_axes() -> tuple[str, ...]:
    """The batch axes of the current mesh, without axes of one device; () if no mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(a for a in BATCH_AXES if a in mesh.axis_names and mesh.shape[a] > 1)


def platform() -> str:
    """Where the program that is being traced will run: "cpu", "gpu" or "tpu".

    The devices are those of the current mesh, which may be absent from this machine, or else the
    default devices.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def on_tpu() -> bool:
    """Whether the program that is being traced will run on TPUs."""
    return platform() == "tpu"


def constrain_rows(tree: PyTree, axis: int = 0) -> PyTree:
    """`tree` with axis `axis` of every leaf sharded over the batch axes.

    Without this constraint the partitioner may follow a sharded weight and replicate the batch.
    """
    axes = batch_axes()
    if not axes:
        return tree
    spec = PartitionSpec(*[None] * axis, axes)
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, spec), tree)


class View(NamedTuple):
    """How one picture view is made.

    scale: the least and the most share of the picture's area that the crop covers; None: the
    evaluation transform, a centre crop. flip: whether half of the crops are mirrored. photometry:
    the colour augmentation on the device, an `ops.photometry.Policy`.
    """

    scale: tuple[float, float] | None
    flip: bool
    photometry: Any

    @property
    def random(self) -> bool:
        """Whether two views of one picture can differ."""
        return self.scale is not None or self.flip or self.photometry.on_device


class Views(NamedTuple):
    """The picture views and texts of one row that an objective asks of the data pipeline.

    texts: `caption`; `augmented`, the same caption after one operation of `data.text.augment`;
    `other`, another caption of the same picture, or the same one if the picture has only one.
    mirror_words: swap "left" and "right" in the captions of a mirrored picture; one coin flip then
    mirrors all views of a row, or none.
    """

    pictures: tuple[View, ...]
    texts: tuple[Literal["caption", "augmented", "other"], ...] = ("caption",)
    mirror_words: bool = False


class Batch(struct.PyTreeNode):
    """One global batch; rows are sharded over the mesh's batch axes."""

    image: UInt8[Array, "b v h w 3"]  # geometry is done on the host, photometry on the device
    text: Int32[Array, "b u n"]
    row: Int32[Array, " b"]  # stable id of the example in the data set; it may repeat
    position: Int32[Array, " b"]  # place in the epoch or episode; it never repeats there
    # `teacher` [b e] of an external teacher. Stored features of a frozen tower: `image_features`
    # [b v c], in place of `image`, which has no views then, and `text_features` [b u c]; where they
    # are used, `image_tokens` and `text_tokens`, the same with [n c]
    extra: dict[str, Array] = struct.field(default_factory=dict)


class Encoded(struct.PyTreeNode):
    """What one tower computes for its rows. A field that nobody uses is never computed."""

    unit: Float[Array, "b d"] | None = None  # `raw`, L2-normalised, at least float32
    raw: Float[Array, "b d"] | None = None  # after the projection
    backbone: Float[Array, "b c"] | None = None  # pooled, before the projection
    tokens: Float[Array, "b n c"] | None = None  # per patch or per text token


class Stored(struct.PyTreeNode):
    """What a frozen tower once computed for its rows, in place of the pictures or texts."""

    backbone: Float[Array, "b c"]
    tokens: Float[Array, "b n c"] | None = None
    ids: Int32[Array, "b n"] | None = None  # the token ids of texts


class Features(struct.PyTreeNode):
    """What `embed` returns and `loss` takes, with the row axis first. Objectives subclass it."""


class Loss(NamedTuple):
    """What `Objective.loss` returns: the loss, numbers to log, and the memory after this step."""

    value: Float[Array, ""]
    metrics: dict[str, Float[Array, ""]]
    memory: PyTree


class TrainState(struct.PyTreeNode):
    """The complete state of a run between two steps."""

    step: Int32[Array, ""]
    params: PyTree
    opt_state: PyTree
    batch_stats: PyTree  # running statistics of BatchNorm; {} without it
    memory: PyTree  # queues, prototypes; {} for most objectives


Metrics = dict[str, jax.Array]


class Curve(NamedTuple):
    """How the report plots a training metric."""

    # title of the chart; metrics with the same title share a chart. For the metrics of a pattern
    # "loss/*", a * in the title stands for what the metric's own name has in its place
    chart: str
    from_zero: bool = True  # the vertical axis starts at 0
    smooth: bool = True  # plot a running mean over the noisy values
    level: bool = False  # what the chart's other curves are compared with: a dashed line


@dataclasses.dataclass(frozen=True)
class Metric:
    """What a metric means and how it is shown. The defaults suit an unknown metric."""

    better: Literal["more", "less"] | None = None  # None: neither direction is better
    shown: Literal["percent", "number"] = "number"  # percent: the value is between 0 and 1
    detail: bool = False  # one of many, such as one per class: only metrics.jsonl has it
    headline: bool = False  # training metrics: also print it on the console
    curve: Curve | None = None  # training metrics: None plots nothing; eval metrics always plot
    column: str = ""  # its column in the table of `clipx.compare`; "" leaves the metric out
    label: str = ""  # tells the metrics of one column apart, in the column's heading
    benchmark: str = ""  # its name in CLIP_benchmark; "" if CLIP_benchmark has no such metric
