"""`python benchmarks/kmeans.py`: k-means beside faiss-cpu's, and its compiled memory.

Speed: clipx and faiss take turns with the same rows, k, iterations, restarts and cores, each with
its last assignment. Seconds are those of the best turn. CPU seconds, of all threads, are more
reliable if other programs use the cores too, and most reliable with `--cores 1`, where no thread
waits for another. Memory: arguments, results and temporaries per device, as compiled for 8 CPU
devices; nothing is executed.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
os.environ["JAX_PLATFORMS"] = "cpu"

DEVICES = 8
MIB = 2**20


def features(n: int, d: int):
    """Unit rows around 200 centres, with variances that fall like those of a network's features.

    No fit converges on them, and so stops, before its last iteration.
    """
    import numpy as np

    rng = np.random.default_rng(0)
    rows = rng.standard_normal((200, d), np.float32)[rng.integers(0, 200, n)]
    rows = (rows + rng.standard_normal((n, d), np.float32)) / np.sqrt(np.arange(1, d + 1))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float32)


def ours(x, args):
    import jax

    from clipx.ops import kmeans

    options = dict(iterations=args.iterations, restarts=args.restarts)

    def fit(x, key):
        return kmeans.fit(x, args.clusters, key=key, **options).inertia

    x, key = jax.device_put(x), jax.random.key(0)
    fit = jax.jit(fit).lower(x, key).compile()
    return lambda: float(fit(x, key))


def theirs(x, args):
    import faiss

    def fit():
        options = dict(niter=args.iterations, nredo=args.restarts, min_points_per_centroid=1)
        model = faiss.Kmeans(x.shape[1], args.clusters, max_points_per_centroid=len(x), **options)
        model.train(x)
        if len(model.obj) < args.iterations * args.restarts:
            print(f"faiss stopped after {len(model.obj)} iterations", file=sys.stderr)
        return float(model.index.search(x, 1)[0].sum())

    return fit


def turn(fit) -> tuple[float, float, float]:
    """(seconds, CPU seconds, inertia) of one fit."""
    start = time.perf_counter(), time.process_time()
    inertia = fit()
    return time.perf_counter() - start[0], time.process_time() - start[1], inertia


def speed(args) -> None:
    cores = sorted(os.sched_getaffinity(0))[: args.cores]
    os.sched_setaffinity(0, cores)
    os.environ["OMP_NUM_THREADS"] = str(len(cores))
    import jax

    print(
        f"\nn={args.rows:,}, k={args.clusters:,}, {args.iterations} iterations, {args.restarts} "
        f"restart(s), {len(cores)} core(s), jax {jax.__version__}\n"
    )
    print("| d | | seconds | ratio | CPU seconds | ratio | GFLOP/s | inertia |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for d in args.widths:
        x = features(args.rows, d)
        fits = {"clipx": ours(x, args)}
        try:
            fits["faiss"] = theirs(x, args)
        except ImportError:
            print("faiss is not installed: pip install faiss-cpu")
        turns = {name: [] for name in fits}
        for _ in range(args.repeats):
            for name, fit in fits.items():
                turns[name].append(turn(fit))
        best = {name: [min(column) for column in zip(*rows)] for name, rows in turns.items()}
        work = 2 * args.rows * args.clusters * d * (args.iterations * args.restarts + 1)
        for name, (seconds, cpu, inertia) in best.items():
            base = best.get("faiss", best["clipx"])
            print(
                f"| {d} | {name} | {seconds:.2f} | {seconds / base[0]:.2f} | {cpu:.2f} | "
                f"{cpu / base[1]:.2f} | {work / seconds / 1e9:.0f} | {inertia:.6g} |",
                flush=True,
            )


def memory(args) -> None:
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", nargs="?", choices=("all", "speed", "memory"), default="all")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--clusters", type=int, default=2_000)
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--restarts", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--cores", type=int, help="number of cores to use; default: all")
    args = parser.parse_args()
    if args.part in ("all", "speed"):
        speed(args)
    if args.part == "memory":
        memory(args)
    elif args.part == "all":  # a new process, because jax fixes the number of devices at its start
        flags = (
            f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
        )
        command = [sys.executable, __file__, "memory"]
        return subprocess.run(command, env=os.environ | {"XLA_FLAGS": flags}).returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
