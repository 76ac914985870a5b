"""`python -m clipx.bench --config=configs/clip.py`: is this device right, and how fast is it?

First the losses on the devices that are there against a dense float64 twin on the host, then the
very step that training runs, on random pictures. No data is opened.
"""

from __future__ import annotations

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from clipx import cli, losses
from clipx.errors import RunError
from clipx.parallel import mesh as meshes
from clipx.planning import estimate
from clipx.training import fit
from clipx.training.run import Run, assemble
from clipx.types import Batch


def _lse(x, axis):
    peak = x.max(axis, keepdims=True)
    return (np.log(np.exp(x - peak).sum(axis, keepdims=True)) + peak).squeeze(axis)


def dense_info_nce(a: np.ndarray, b: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """InfoNCE of each row and the gradient of its mean with respect to `a`, in float64."""
    logits = scale * a @ b.T
    rows, columns = _lse(logits, 1), _lse(logits, 0)
    value = 0.5 * (rows + columns) - np.diag(logits)
    share = 0.5 * (np.exp(logits - rows[:, None]) + np.exp(logits - columns[None]))
    return value, scale * (share - np.eye(len(a))) @ b / len(a)


def check_losses(mesh, rows: int = 1024, width: int = 512) -> float:
    """The largest error of InfoNCE's values and gradients on this mesh, relative to the largest
    value and the largest gradient of the float64 twin."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, rows, width))
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    value, gradient = dense_info_nce(a, b, 14.3)

    def mean(a, b):
        each = losses.info_nce(a, b, scale=14.3)
        return jnp.mean(each), each

    with jax.set_mesh(mesh):
        a, b = meshes.put((np.float32(a), np.float32(b)), meshes.batch_sharding(mesh))
        got, each = jax.jit(jax.grad(mean, has_aux=True))(a, b)
    errors = [
        np.abs(np.asarray(x, np.float64) - y).max() / np.abs(y).max()
        for x, y in ((each, value), (got, gradient))
    ]
    return max(errors)


def random_batch(run: Run) -> Batch:
    """Rows of noise in the shapes that the run trains on."""
    rng = np.random.default_rng(0)
    words, end = run.objective.text.vocab_size - 1, run.objective.text.eot_id

    def leaf(x):
        top = 256 if x.dtype == jnp.uint8 else words
        return rng.integers(0, top, x.shape).astype(x.dtype)

    batch = jax.tree.map(leaf, run.batch)
    batch.text[...] += batch.text >= end  # any but the end mark, which stands last
    batch.text[..., -1] = end
    return meshes.put(batch, meshes.batch_sharding(run.mesh))


def time_steps(run: Run, steps: int) -> list[float]:
    """Seconds of each of `steps` training steps, after two to warm up."""
    batch, state = random_batch(run), run.init()
    seconds = []
    for _ in range(steps + 2):
        start = time.perf_counter()
        state, metrics = run.train_step(state, batch)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - start)
    return seconds[2:]


def main(overrides: list[tuple[str, str]]) -> None:
    run = assemble(cli.load_config(flags.FLAGS.config, overrides))
    device = run.mesh.devices.flat[0]
    print(f"{run.mesh.devices.size} x {device.device_kind}, JAX {jax.__version__}")
    print(f"InfoNCE, 1,024 rows, value and gradient: error {check_losses(run.mesh):.1e} of float64")
    start = time.perf_counter()
    run = fit.fitted(run)
    found = estimate.predict(run)
    if found.refused:
        raise RunError(f"the step does not fit: {fit.describe_memory(found)}")
    print(f"step compiled in {time.perf_counter() - start:.1f} s")
    print("\n".join(estimate.short(found)))
    seconds = time_steps(run, flags.FLAGS.steps)
    median = statistics.median(seconds)
    print(
        f"batch {run.batch_size:,}: {median * 1e3:.1f} ms a step (median of {len(seconds)}, "
        f"{min(seconds) * 1e3:.1f} to {max(seconds) * 1e3:.1f}), "
        f"{run.batch_size / median:,.0f} images/s"
    )
    beside = fit.measured(device, found, median)
    if "memory_gib" in beside:
        print(f"memory in use: at most {beside['memory_gib']:.2f} GiB")
    if "mfu" in beside:
        print(f"MFU {beside['mfu']:.1%} of {found.chip.tflops:,.0f} TFLOP/s")


if __name__ == "__main__":
    flags.DEFINE_string("config", None, "Config file, path.py or path.py:variant.")
    flags.DEFINE_integer("steps", 10, "Steps to time.", lower_bound=1)
    cli.run(main, required=("config",))
