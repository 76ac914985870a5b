"""`python benchmarks/loss_memory.py`: temporary memory of DeCLIP's and FILIP's losses per device.

The batch sizes are those of large runs on 8 devices. Temporaries are what value and gradients need
beside their inputs and results. The programs are compiled for 8 CPU devices and not executed, so
any machine will do. Each loss is compared with its plain formulation: a few lines of array code
under the same mesh, which hold blocks of all pairs of rows; the partitioner may shard these as it
likes. Everything is float32. Exits 1 if one of the losses needs 1 GiB or more.
"""

from __future__ import annotations

import os
import pathlib
import sys
import time

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " ".join(
    [" --xla_force_host_platform_device_count=8", "--xla_llvm_disable_expensive_passes=true"]
)
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import jax.numpy as jnp

from clipx import losses
from clipx.parallel import mesh as meshes

DEVICES = 8
LIMIT = 2**30
F32 = jnp.float32


def cross_entropy(logits):
    return jax.nn.logsumexp(logits, axis=1) - jnp.diagonal(logits)


def masked_lm(states, kernel, bias, targets, selected):
    total, count = losses.masked_lm(states, kernel, bias, targets, selected)
    return jnp.sum(total) / jnp.maximum(jnp.sum(count), 1)


def plain_masked_lm(states, kernel, bias, targets, selected):
    logits = states @ kernel + bias
    match = jnp.take_along_axis(logits, targets[..., None], axis=2)[..., 0]
    each = jnp.where(selected, jax.nn.logsumexp(logits, axis=2) - match, 0)
    return jnp.sum(each) / jnp.maximum(jnp.sum(selected), 1)


def filip(image, text, scale):
    return jnp.mean(losses.late_interaction(image, text, scale=scale, top_k=16))


def plain_filip(image, text, scale):
    def toward(x, y):
        return scale * jnp.max(jnp.einsum("ind,tmd->intm", x, y), axis=3).mean(axis=1)

    def kept(x, y):
        score = jnp.einsum("bnd,bmd->bnm", x, y).sum(axis=2)
        return jnp.take_along_axis(x, jax.lax.top_k(score, 16)[1][..., None], axis=1)

    halves = toward(image, kept(text, image)), toward(text, kept(image, text))
    return jnp.mean(0.5 * cross_entropy(halves[0]) + 0.5 * cross_entropy(halves[1]))


def declip(info_nce, toward, nearest):
    """DeCLIP's pairwise losses: four pairings, and two views with the neighbours of two texts."""

    def loss(images, texts, scale, queue):
        neighbours = [nearest(text, queue) for text in texts]
        pairs = [info_nce(i, t, scale) for i in images for t in texts]
        neighbour_pairs = [toward(i, n, scale) for i in images for n in neighbours]
        return jnp.mean(0.1 * sum(pairs) + 0.05 * sum(neighbour_pairs))

    return loss


tiled_declip = declip(
    lambda a, b, scale: losses.info_nce(a, b, scale=scale),
    lambda a, b, scale: losses.info_nce(a, b, scale=scale, symmetric=False),
    losses.nearest,
)
plain_declip = declip(
    lambda a, b, scale: 0.5 * (cross_entropy(scale * a @ b.T) + cross_entropy(scale * b @ a.T)),
    lambda a, b, scale: cross_entropy(scale * a @ b.T),
    lambda query, queue: jax.lax.stop_gradient(queue[jnp.argmax(query @ queue.T, axis=1)]),
)


def cases(mesh):
    """(name, clipx's loss, the plain loss, their arguments, how many of these get a gradient)."""

    def rows(*shape, dtype=F32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=meshes.batch_sharding(mesh))

    def replicated(*shape):
        return jax.ShapeDtypeStruct(shape, F32, sharding=meshes.replicated(mesh))

    b, n, c, v = 4096, 77, 512, 49409
    marks = rows(b, n, dtype=jnp.int32), rows(b, n, dtype=jnp.bool_)
    head = (rows(b, n, c), replicated(c, v), replicated(v), *marks)
    yield f"DeCLIP's MLM head, {b} x {n} tokens, {c} -> {v}", masked_lm, plain_masked_lm, head, 3
    tokens = rows(b, 49, 256), rows(b, n, 256), replicated()
    yield f"FILIP, {b} rows, 49 x {n} tokens, 256-d, top-k 16", filip, plain_filip, tokens, 3
    b, queue = 32768, 65536
    views = (rows(b, c),) * 2, (rows(b, c),) * 2, replicated(), replicated(queue, c)
    name = f"DeCLIP's pairings and neighbours, {b} rows, {c}-d, queue {queue}"
    yield name, tiled_declip, plain_declip, views, 3


def temporaries(loss, arguments, slopes: int) -> int:
    """Bytes of temporaries per device; the first `slopes` arguments get a gradient."""
    step = jax.jit(jax.value_and_grad(loss, tuple(range(slopes))))
    return step.lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def main() -> int:
    mesh = meshes.make_mesh(meshes.MeshConfig(), jax.devices()[:DEVICES])
    print(f"temporaries per device, {DEVICES} devices, jax {jax.__version__}")
    worst = 0
    with jax.set_mesh(mesh):
        for name, ours, plain, arguments, slopes in cases(mesh):
            start = time.perf_counter()
            need, beside = (temporaries(loss, arguments, slopes) for loss in (ours, plain))
            took = time.perf_counter() - start
            print(
                f"{name}: {need / 2**20:,.0f} MiB, plain {beside / 2**20:,.0f} MiB "
                f"(compiled in {took:.0f} s)",
                flush=True,
            )
            worst = max(worst, need)
    return int(worst >= LIMIT)


if __name__ == "__main__":
    sys.exit(main())
