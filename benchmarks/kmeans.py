"""`python benchmarks/kmeans.py`: the memory that k-means is compiled to for 8 CPU devices.

Arguments, results and temporaries per device; nothing is executed. Its speed beside faiss is among
what `python -m clipx.bench --against=faiss --only=kmeans` measures.
"""

from __future__ import annotations

import os
import pathlib
import sys

DEVICES = 8
MIB = 2**20
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
)


def main() -> None:
    import jax
    import jax.numpy as jnp

    from clipx.ops import kmeans
    from clipx.parallel import mesh as meshes

    mesh = meshes.make_mesh(meshes.MeshConfig(), jax.devices()[:DEVICES])
    print(f"\nMiB, d=128, float32, {DEVICES} devices\n")
    print("| n | k | compiled, per device | (n/8)d + kd | n d + k d | n k |")
    print("|---|---|---|---|---|---|", flush=True)
    with jax.set_mesh(mesh):
        for n, k, d in ((50_000, 5_000, 128), (100_000, 10_000, 128), (200_000, 20_000, 128)):
            x = jax.ShapeDtypeStruct((n, d), jnp.float32, sharding=meshes.batch_sharding(mesh))
            key = jax.eval_shape(lambda: jax.random.key(0))

            def fit(x, key, k=k):
                return kmeans.fit(x, k, key=key, restarts=3)

            need = jax.jit(fit).lower(x, key).compile().memory_analysis()
            used = need.argument_size_in_bytes, need.output_size_in_bytes, need.temp_size_in_bytes
            sizes = sum(used), 4 * d * (n / DEVICES + k), 4 * d * (n + k), 4 * n * k
            print(f"| {n:,} | {k:,} | " + " | ".join(f"{s / MIB:,.0f}" for s in sizes) + " |")


if __name__ == "__main__":
    main()
