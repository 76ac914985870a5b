"""Measures this machine's devices: the error of their losses against float64, and the time of a
training step."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from clipx import losses
from clipx.parallel import mesh as meshes
from clipx.training.initial import init
from clipx.training.run import Run
from clipx.types import Batch


def _lse(x: np.ndarray, axis: int) -> np.ndarray:
    peak = x.max(axis, keepdims=True)
    return (np.log(np.exp(x - peak).sum(axis, keepdims=True)) + peak).squeeze(axis)


def dense_info_nce(a: np.ndarray, b: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """(InfoNCE of each row, gradient of its mean with respect to `a`), in the dtype of `a` and
    `b`."""
    logits = scale * a @ b.T
    rows, columns = _lse(logits, 1), _lse(logits, 0)
    value = 0.5 * (rows + columns) - np.diag(logits)
    share = 0.5 * (np.exp(logits - rows[:, None]) + np.exp(logits - columns[None]))
    return value, scale * (share - np.eye(len(a))) @ b / len(a)


def check_losses(mesh: meshes.Mesh, rows: int = 1024, width: int = 512) -> float:
    """The largest error of InfoNCE's float32 values and gradients on the mesh, relative to the
    largest value and the largest gradient of `dense_info_nce` in float64."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, rows, width))
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    value, gradient = dense_info_nce(a, b, 14.3)

    def mean(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        each = losses.info_nce(a, b, scale=14.3)
        return jnp.mean(each), each

    with jax.set_mesh(mesh):
        a, b = meshes.put((np.float32(a), np.float32(b)), meshes.batch_sharding(mesh))
        device_gradient, each = jax.jit(jax.grad(mean, has_aux=True))(a, b)
    errors = [
        np.abs(np.asarray(x, np.float64) - y).max() / np.abs(y).max()
        for x, y in ((each, value), (device_gradient, gradient))
    ]
    return max(errors)


def random_batch(run: Run) -> Batch:
    """A batch of noise in the shapes that the run trains on. Every text ends with the end mark and
    contains no other."""
    rng = np.random.default_rng(0)
    words, end = run.objective.text.vocab_size - 1, run.objective.text.eot_id

    def leaf(x: jax.ShapeDtypeStruct) -> np.ndarray:
        top = 256 if x.dtype == jnp.uint8 else words
        return rng.integers(0, top, x.shape).astype(x.dtype)

    batch = jax.tree.map(leaf, run.batch)
    batch.text[...] += batch.text >= end  # skips the id of the end mark
    batch.text[..., -1] = end
    return meshes.put(batch, meshes.batch_sharding(run.mesh))


def train_steps(run: Run) -> Iterator[float]:
    """Trains on noise without end; yields the seconds of each step."""
    batch, state = random_batch(run), init(run)
    while True:
        start = time.perf_counter()
        state, metrics = run.train_step(state, batch)
        jax.block_until_ready(metrics)
        yield time.perf_counter() - start


def time_steps(run: Run, steps: int) -> list[float]:
    """Seconds of each of `steps` training steps on noise, after two steps to warm up."""
    return list(itertools.islice(train_steps(run), 2, steps + 2))
