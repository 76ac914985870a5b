"""Estimates the memory and time of a training step on GPUs by arithmetic. Nothing is compiled.

Memory of one GPU is the sum of

- its shards of the parameters, optimizer state, gradients and batch;
- activations: the bytes that autodiff keeps of one row between the forward and the backward pass
  (as traced; a GPU's compiler keeps less), times the rows of a micro-batch on the GPU;
- the gathered features of all rows, and their gradients.

Time of a step is the sum of

- every matrix product and convolution of the traced step, recomputation included: its FLOPs at 60 %
  of the published peak, or its operands and result at 80 % of the published bandwidth, whichever
  takes longer. Other operations count as fused and free;
- the optimizer, which reads and writes parameters and its state once;
- the collectives of gradients and sharded parameters, at 80 % of the slowest network's bandwidth,
  with no overlap with the backward pass.
"""

from __future__ import annotations

import math

import jax

from clipx.ops import flops
from clipx.parallel.chips import Topology
from clipx.parallel.mesh import bytes_whole
from clipx.planning.estimate import Prediction
from clipx.training.fit import held
from clipx.training.run import Run
from clipx.training.step import embed_rows, row_keys
from clipx.types import Batch, Features, PyTree, TrainState

PEAK, BANDWIDTH = 0.6, 0.8  # fractions of the published values that are reached
SHARE = 0.75  # fraction of a GPU's memory that JAX takes by default


def predict(run: Run, where: Topology) -> Prediction:
    """Predicts the memory and time of the run's step on a topology of GPUs. The run must be
    assembled on as many devices, of any kind."""
    chip, devices = where.chip, where.size
    assert chip and chip.memory and chip.bandwidth and chip.link and chip.network
    rows = run.batch_size // math.prod(run.mesh.shape[a] for a in ("data", "fsdp"))
    kept, features = _row(run)
    memory = held(run)
    memory["gradients"] = memory["parameters"]
    memory["activations"] = kept * rows // run.microbatches // run.mesh.shape["tensor"]
    memory["features"] = 2 * features * run.batch_size
    step = list(flops.products(run.traced.jaxpr))
    rates = PEAK * chip.tflops * 1e12, BANDWIDTH * chip.bandwidth * 1e9
    seconds = sum(p.times * max(p.flops / rates[0], p.bytes / rates[1]) for p in step) / devices
    seconds += 2 * (memory["parameters"] + memory["optimizer state"]) / rates[1]
    joined = {"data": memory["parameters"], "fsdp": bytes_whole(run.state.params)}
    traffic = []
    for axis, size in joined.items():
        group = run.mesh.shape[axis]
        if group > 1:
            kind, times = ("all-reduce", 1) if axis == "data" else ("all-gather and -scatter", 3)
            traffic.append((kind, group, times, times * size))
            nodes, gpus = map(int, where.layout.split("x"))
            # all network adapters of a node work at the same time
            wire = min(chip.link, chip.network * gpus) if nodes > 1 else chip.link
            factor = 2 * (group - 1) / group if axis == "data" else 3 * (group - 1) / group
            seconds += factor * size / (BANDWIDTH * wire * 1e9)
    return Prediction(
        devices=devices,
        device_kind=where.device_kind,
        batch=run.batch_size,
        microbatches=run.microbatches,
        memory=memory,
        peak=sum(memory.values()),
        limit=int(SHARE * chip.memory * 2**30),
        flops=run.model_flops,
        step_flops=flops.total(step),
        seconds=seconds,
        collectives=tuple(traffic),
        analytic=True,
        notes=(
            f"JAX uses {SHARE:.0%} of {chip.memory:g} GiB, unless XLA_PYTHON_CLIENT_MEM_FRACTION "
            "is set",
            f"assumes products at {PEAK:.0%} of peak or {BANDWIDTH:.0%} of bandwidth; not "
            "validated",
        ),
    )


def _row(run: Run) -> tuple[int, int]:
    """(bytes that autodiff keeps of one row of a batch, bytes of the row's features)."""

    def kept(rows: int) -> tuple[int, int]:
        batch, state = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (run.batch, run.state)
        )
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), batch)

        def residuals(state: TrainState, batch: Batch) -> tuple[Features, PyTree]:
            def embed(params: PyTree) -> Features:
                keys = row_keys(run.config.seed, state.step, rows)
                features, _ = embed_rows(
                    run.objective, params, state.batch_stats, batch, keys, microbatches=1
                )
                return features

            return jax.vjp(embed, state.params)

        features, pullback = jax.eval_shape(residuals, state, batch)
        return bytes_whole(pullback), bytes_whole(features)

    two, four = kept(2), kept(4)  # the difference leaves out what does not grow with the rows
    return (four[0] - two[0]) // 2, (four[1] - two[1]) // 2
