"""`python benchmarks/loss_forms.py`: compares the forms of the pairwise losses for small batches.

Value and gradients are computed on 1 and on 8 CPU devices, in float32 and bfloat16. All forms run
one after the other, turn by turn. The columns of a form: milliseconds (median over turns); its time
over that of `gather` (median over turns); MiB of temporaries per device, as compiled; the share of
numbers in value and gradients whose bits differ from those of `gather`. On one device an assembly
is a ring.

Could one form serve all sizes? These are medians (least to most) on two cores that other programs
used too, with jax 0.10.2, for 16 to 2048 rows of width 64 and 512 (`late_interaction`: 16 and 64
rows of width 64):

    in place of gather          time over gather's     temporaries over gather's
    ring, 1 device, <= 512      0.96 (0.25 to 1.27)    0.80
    ring, 1 device, 2048        1.13 (0.36 to 1.38)    0.29
    assembly, 8, <= 512         0.91 (0.51 to 1.55)    0.99
    assembly, 8, 2048           0.95 (0.84 to 1.44)    0.90
    ring, 8, <= 512             2.86 (0.90 to 6.00)    0.33
    ring, 8, 2048               1.18 (0.66 to 1.83)    0.21

    numbers with other bits: float32 InfoNCE 27-71 %, SigLIP 0-22 %, NT-Xent 39-72 %, FILIP
    76-81 %; bfloat16 InfoNCE 0-7 %, SigLIP below 0.5 %, NT-Xent 31-43 %, FILIP 36-40 %; R@1, whose
    values are 0 and 1, below 0.5 %

No, because the bits differ: runs of small batches would not resume in their own bits. Hand-written
gradients, such as exp(x - lse), round otherwise than autodiff's. Speed alone would allow an
assembly on several devices; a ring on one device loses an eighth at 2048 rows; memory would
shrink. If a release may change these bits, "gather" can go. Until then InfoNCE and SigLIP are
written once for all forms. NT-Xent, FILIP and R@1 add up or compare in another order when gathered,
and have a gathered version beside the other.
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

DEVICES = (1, 8)
ROWS = (16, 128, 512, 2048)
WIDTHS = ((64, "float32"), (512, "float32"), (512, "bfloat16"))
TOKENS = (50, 32)  # of a picture and of a text, for late_interaction, which gets fewer rows
TOKEN_ROWS, TOKEN_WIDTHS = (16, 64), ((64, "float32"), (64, "bfloat16"))
LOSSES = ("info_nce", "sigmoid", "nt_xent", "recall_at_1", "late_interaction")


def unit(shape, dtype, seed):
    import jax.numpy as jnp
    import numpy as np

    x = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True), dtype)


def step(name: str, form: str):
    """A function (a, b) -> value and gradients of the loss's mean; for recall_at_1 the values."""
    import jax

    from clipx import losses

    loss = getattr(losses, name)
    scalars = {
        "sigmoid": {"scale": 10.0, "bias": -10.0},
        "info_nce": {"scale": 14.0},
        "late_interaction": {"scale": 14.0},
    }
    options = {"form": form} | scalars.get(name, {})
    if name == "recall_at_1":
        return jax.jit(lambda a, b: loss(a, b, **options))
    return jax.jit(jax.value_and_grad(lambda a, b: loss(a, b, **options).mean(), (0, 1)))


def differ(ours, theirs) -> float:
    """The share of numbers that differ."""
    import jax
    import numpy as np

    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs))
    pairs = [(np.asarray(x), np.asarray(y)) for x, y in pairs]
    return sum(np.sum(x != y) for x, y in pairs) / sum(x.size for x, _ in pairs)


def measure(name: str, a, b, forms, budget: float) -> list[str]:
    """The cells of one row of the table."""
    import jax
    import numpy as np

    steps = {form: step(name, form).lower(a, b).compile() for form in forms}
    results = {form: jax.block_until_ready(run(a, b)) for form, run in steps.items()}
    turns, end = [], time.perf_counter() + budget
    while len(turns) < 7 or time.perf_counter() < end:
        turn = []
        for run in steps.values():
            start = time.perf_counter()
            jax.block_until_ready(run(a, b))
            turn.append(time.perf_counter() - start)
        turns.append(turn)
    turns = np.array(turns)
    cells = []
    for i, (form, run) in enumerate(steps.items()):
        need = run.memory_analysis().temp_size_in_bytes / 2**20
        cells += [f"{1e3 * np.median(turns[:, i]):.2f}"]
        cells += [f"{np.median(turns[:, i] / turns[:, 0]):.2f}"] if i else []
        cells += [f"{need:.2f}"]
        share = differ(results[form], results["gather"])
        cells += [f"{share:.1%}" if share else "0"] if i else []
    return cells + [str(len(turns))]


def table(args, devices: int) -> None:
    import jax

    from clipx.parallel import mesh as meshes

    forms = ("gather", "ring") if devices == 1 else ("gather", "assembly", "ring")
    columns = ["loss", "rows", "width", "dtype", "gather ms", "MiB"]
    for form in forms[1:]:
        columns += [f"{form} ms", "ratio", "MiB", "differ"]
    print(f"\n{devices} device(s), {os.cpu_count()} cores, jax {jax.__version__}\n")
    print("| " + " | ".join([*columns, "turns"]) + " |")
    print("|" + "---|" * (len(columns) + 1), flush=True)
    mesh = meshes.make_mesh(meshes.MeshConfig(), jax.devices()[:devices])
    rows = meshes.batch_sharding(mesh)
    with jax.set_mesh(mesh):
        for name in args.losses:
            tokens = name == "late_interaction"
            for d, dtype in TOKEN_WIDTHS if tokens else WIDTHS:
                for b in TOKEN_ROWS if tokens else ROWS:
                    shapes = [(b, n, d) if tokens else (b, d) for n in TOKENS]
                    pair = (unit(shape, dtype, seed) for seed, shape in enumerate(shapes))
                    pair = [jax.device_put(x, rows) for x in pair]
                    cells = measure(name, *pair, forms, args.seconds)
                    print(
                        f"| {name} | {b} | {d} | {dtype} | " + " | ".join(cells) + " |", flush=True
                    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--seconds", type=float, default=2.0, help="duration of each row's turns")
    parser.add_argument("--devices", type=int, help="only the table for this number of devices")
    args = parser.parse_args()
    if args.devices:
        table(args, args.devices)
        return 0
    for devices in DEVICES:  # new processes, because jax fixes their number at its start
        flags = (
            f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        )
        options = ["--devices", str(devices), *sys.argv[1:]]
        environment = os.environ | {"XLA_FLAGS": flags}
        code = subprocess.run([sys.executable, __file__, *options], env=environment).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
