"""Trains a tiny objective for some steps, in one process or as one of several:

    python -m support.drift OBJECTIVE DTYPE STEPS FILE [ADDRESS PROCESSES PROCESS]

Process 0 writes what every step logs and the last parameters, as a .npz file.
"""

import sys

import jax
import numpy as np
import optax

from clipx.parallel import mesh as meshes
from clipx.parallel.mesh import MeshConfig, make_mesh, put
from clipx.training.step import make_train_step, new_state
from support import tiny

BATCHES = 4  # different ones, in turn


def train(name, dtype, steps, devices=None):
    """{"loss": [steps], "parameters": one vector} over all devices, the rows sharded over them."""
    module, optimizer = tiny.objective(name, dtype), optax.adamw(1e-3)
    mesh = make_mesh(MeshConfig(), devices)
    variables = tiny.as_dtype(tiny.variables(name), dtype)
    state = jax.eval_shape(lambda: new_state(module, optimizer, variables))
    state = tiny.as_dtype(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state), dtype)
    memory = tiny.as_dtype(jax.tree.map(np.asarray, tiny.memory(module)), dtype)
    state = state.replace(
        params=variables["params"], batch_stats=variables.get("batch_stats", {}), memory=memory
    )
    data = [tiny.batch(module, seed=seed) for seed in range(BATCHES)]
    with jax.set_mesh(mesh):
        state = put(state, meshes.replicated(mesh))
        step = jax.jit(make_train_step(module, optimizer, seed=0))
        batches = [put(batch, meshes.batch_sharding(mesh)) for batch in data]
        losses = []
        for i in range(steps):
            state, metrics = step(state, batches[i % BATCHES])
            losses.append(float(metrics["loss"]))
    leaves = [np.asarray(x.addressable_data(0)).ravel() for x in jax.tree.leaves(state.params)]
    return {"loss": np.array(losses), "parameters": np.concatenate(leaves)}


if __name__ == "__main__":
    name, dtype, steps, file, *several = sys.argv[1:]
    jax.config.update("jax_enable_x64", dtype == "float64")
    if several:
        jax.distributed.initialize(several[0], *map(int, several[1:]))
    result = train(name, dtype, int(steps))
    if jax.process_index() == 0:
        np.savez(file, **result)
