"""ProtoCLIP's losses, in which every row picks the prototype of its cluster.

Prototypes and targets are constants: gradients flow to the rows alone. Every result is float32, or
float64 for float64 inputs.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int

from clipx.losses import ring
from clipx.losses.forms import pick_form
from clipx.losses.pairwise import NEVER, Rows, product, wide
from clipx.losses.reductions import LOG_SUM_EXP
from clipx.losses.tiles import size
from clipx.types import Array, Scalar, batch_axes, constrain_rows


@partial(jax.jit, static_argnames="k")
def _sums(labels: Array, x: Array, k: int) -> tuple[Array, Array]:
    """(sums [k d], counts [k]) of the rows of each label.

    Rows are sorted and scanned instead of scattered, because a GPU's scatter adds in any order, and
    the bits of the sums would differ from call to call.
    """
    order = jnp.argsort(labels, stable=True)
    labels, x = labels[order], x[order]
    first = jnp.concatenate([jnp.ones_like(labels[:1], bool), labels[1:] != labels[:-1]])

    def add(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        (x, x_first), (y, y_first) = a, b
        return jnp.where(y_first[:, None], y, x + y), x_first | y_first

    running, _ = lax.associative_scan(add, (x, first))
    ends = jnp.searchsorted(labels, jnp.arange(k), side="right")
    counts = ends - jnp.searchsorted(labels, jnp.arange(k), side="left")
    return jnp.where(counts[:, None] > 0, running[ends - 1], 0), counts


def back_translate(
    labels: Int[Array, " n"], features: Float[Array, "n d"], k: int
) -> Float[Array, "k d"]:
    """The mean of the rows of each of k labels, not normalised; zeros for a label without rows.

    This is Prototypical Back Translation: with `labels` from the teacher's clusters and `features`
    of the student, the clusters become prototypes in the student's own space. Rows whose label is
    outside 0..k-1 are ignored. The result is replicated, and the same bits from call to call. No
    gradient flows. Source: ProtoCLIP (arXiv 2206.10996); training/clustering.py, `PBT`.
    """
    axes = batch_axes()
    x = lax.stop_gradient(jnp.asarray(features, wide(features)))

    def local(labels: Array, x: Array) -> tuple[Array, Array]:
        sums, counts = _sums(labels, x, k)
        return lax.psum((sums, counts), axes) if axes else (sums, counts)

    if axes:
        local = jax.shard_map(local, in_specs=P(axes), out_specs=P())
    sums, counts = local(jnp.asarray(labels), x)
    return sums / jnp.maximum(counts, 1).astype(sums.dtype)[:, None]


def targets(
    prototypes: Float[Array, "k e"],
    labels: Int[Array, " b"],
    *,
    temperature: Scalar,
) -> Float[Array, "b k"]:
    """The target distribution of each row over the prototypes, from its label alone.

    Row i's target is softmax(prototypes @ prototypes[labels[i]] / temperature). At temperature 0 it
    is the one-hot label. `temperature` is a Python number. Products and softmax run in float32 at
    least, because a temperature of 0.01 magnifies rounding. No gradient flows.

    Raises `ValueError` for a negative temperature. Source: ProtoCLIP (arXiv 2206.10996);
    training/loss.py, `ProtoLoss`.
    """
    if temperature < 0:
        raise ValueError(f"temperature={temperature}: expected 0 (one-hot targets) or more")
    table = lax.stop_gradient(jnp.asarray(prototypes, wide(prototypes)))
    if not temperature:
        return constrain_rows(jax.nn.one_hot(labels, len(table), dtype=table.dtype))
    return jax.nn.softmax(_products(table[labels], table) / temperature, axis=1)


def prototypical(
    student: Float[Array, "b d"],
    prototypes: Float[Array, "k d"],
    targets: Float[Array, "b k"] | Int[Array, " b"],
    *,
    scale: Scalar,
    form: Literal["gather", "ring"] | None = None,
) -> Float[Array, " b"]:
    """Cross-entropy of each row's choice among the prototypes, against its target, in nats.

    The value of row i is -Σ_k target[i, k]·log softmax(scale·prototypes @ student[i])[k]. Targets
    are distributions [b k], or labels [b], which stand for one-hot distributions. Prototypes are
    not normalised here: the mean of a tight cluster is longer, and a prototype of zeros always has
    the logit 0.

    With `form="gather"` each device holds all prototypes and all logits of its rows. With "ring"
    the prototypes travel round the devices, and logits are computed in tiles. None takes the ring
    from 2**25 logits per device on. Raises `ValueError` for an unknown `form`. Source: ProtoCLIP
    (arXiv 2206.10996); training/loss.py, `ProtoLoss`, which returns the mean over rows.
    """
    (b, _), k = student.shape, len(prototypes)
    prototypes, targets = lax.stop_gradient((prototypes, targets))
    hard = targets.ndim == 1
    if form is None:
        form = "ring" if b // size(batch_axes()) * k >= 2**25 else "gather"
    if pick_form(form, prototypes) == "ring":
        return _ring(student, prototypes, targets, scale, hard)
    if hard:
        targets = constrain_rows(jax.nn.one_hot(targets, k, dtype=wide(prototypes)))
    logits = scale * _products(student, prototypes)
    return -jnp.sum(targets * jax.nn.log_softmax(logits, axis=1), axis=1)


def _ring(
    student: Array,
    table: Array,
    targets: Array,
    scale: Scalar,
    hard: bool,
) -> Array:
    """-Σ t·(l - lse), computed as lse·Σ t - scale·student·(Σ t·prototype); the last sum is
    constant."""
    k, dtype = len(table), wide(student, table)
    student, table = student.astype(dtype), table.astype(dtype)
    pad = -k % size(batch_axes())  # so that each device has the same number of prototypes
    table, columns = jnp.pad(table, ((0, pad), (0, 0))), jnp.arange(k + pad)

    def score(rows: Rows, visitors: Rows, scalars: tuple) -> Array:
        table, columns = visitors.constants
        logits = scalars[0] * product(rows.values, table)
        return jnp.where(columns < k, logits, NEVER)

    def weigh(rows: Rows, visitors: Rows) -> Array:
        if hard:
            return (rows.constants[:, None] == visitors.constants).astype(dtype)
        columns = visitors.constants
        return jnp.take(rows.constants, columns, axis=1, mode="fill", fill_value=0).astype(dtype)

    visitors, scale = Rows((), (table, columns)), jnp.asarray(scale, dtype)
    lse, _ = ring.pairwise_reduce(score, LOG_SUM_EXP, Rows(student), visitors, (scale,))
    expected = ring.mix(weigh, Rows((), targets), Rows(table, columns))
    mass = (targets >= 0) & (targets < k) if hard else jnp.sum(targets, axis=1)
    return mass * lse - scale * jnp.sum(student * expected, axis=1)


def prototype_accuracy(
    student: Float[Array, "b d"], prototypes: Float[Array, "k d"], labels: Int[Array, " b"]
) -> Float[Array, " b"]:
    """1 for each row whose largest product is with the prototype of its label, else 0.

    Of several equal products the first counts as the largest. No gradient flows.
    """
    picked = jnp.argmax(_products(lax.stop_gradient(student), prototypes), axis=1)
    return (picked == labels).astype(jnp.float32)


def _products(rows: Array, table: Array) -> Array:
    """Products [b k] of rows, sharded over the batch axes, with all rows of a replicated table."""
    dtype = wide(rows, table)
    rows, table = constrain_rows(jnp.asarray(rows, dtype)), jnp.asarray(table, dtype)
    highest = lax.Precision.HIGHEST
    return constrain_rows(jnp.einsum("bd,kd->bk", rows, table, precision=highest))
