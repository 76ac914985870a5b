"""Checks of laws 1 to 3 and 5 for an objective, given by the name that `tiny` builds it from."""

import jax
import jax.numpy as jnp
import numpy as np

from clipx.training.step import row_keys
from support import tiny

LAYOUTS = {  # mesh and number of micro-batches to compare with one device and one micro-batch
    "float32": ({"data": 4, "fsdp": 2}, 2),
    "float64": ({"data": 2, "fsdp": 2, "tensor": 2}, 4),
}


def assert_same(got, expected, tolerance):
    """Differences are at most `tolerance` times the largest element of each array."""
    for (path, x), y in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected)):
        bound = tolerance * max(1.0, np.abs(y).max(initial=0.0))
        np.testing.assert_allclose(x, y, rtol=0, atol=bound, err_msg=jax.tree_util.keystr(path))


def check_topology_and_slices(name, dtype, tolerance):
    """Laws 1 and 2: the value and every gradient do not depend on the mesh or the micro-batches."""
    with jax.enable_x64(dtype == "float64"):
        expected = tiny.value_and_grads(name, dtype=dtype)
        assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(expected[1])), "a dead parameter"
        mesh, microbatches = LAYOUTS[dtype]
        got = tiny.value_and_grads(name, dtype=dtype, mesh=mesh, microbatches=microbatches)
        assert_same(got, expected, tolerance)


def check_rows(name):
    """Law 3: a row's features depend on that row and its key alone, to the bit."""
    module, variables = tiny.objective(name), jax.tree.map(jnp.asarray, tiny.variables(name))
    batch, keys = tiny.batch(module), row_keys(0, jnp.int32(5), tiny.ROWS)

    @jax.jit
    def embed(batch, keys):
        return module.apply(
            variables, batch, keys, train=True, method="embed", mutable=["batch_stats"]
        )[0]

    complete = embed(batch, keys)
    other = tiny.batch(module, seed=1)
    changed = jax.tree.map(lambda x, y: np.concatenate([x[:7], y[7:8], x[8:]]), batch, other)
    after = embed(changed, keys)
    rows = slice(4, 12)
    slice_alone = embed(jax.tree.map(lambda x: x[rows], batch), keys[rows])
    for x, y, z in zip(*map(jax.tree.leaves, (complete, after, slice_alone))):
        assert np.any(x[7] != y[7])
        np.testing.assert_array_equal(np.delete(x, 7, axis=0), np.delete(y, 7, axis=0))
        np.testing.assert_allclose(x[rows], z, rtol=1e-5, atol=1e-6)


def check_edge(name):
    """Law 5: everything is finite in bfloat16 at scale 100 with one row per device, also for
    identical rows."""
    module = tiny.objective(name, "bfloat16")
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: np.float32(np.log(100.0)) if "logit_scale" in str(path[-1]) else x,
        tiny.variables(name)["params"],
    )
    batch = tiny.batch(module, rows=8)
    same = jax.tree.map(lambda x: np.repeat(x[:1], 8, axis=0), batch)
    for data in (batch, same):
        got = tiny.value_and_grads(
            name, dtype="bfloat16", mesh={"data": 8}, data=data, params=params
        )
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(got))
