"""`python -m clipx.bench --config=configs/clip.py`: is this device right, and how fast is it?

First the losses on the devices that are there against a dense float64 twin on the host, then the
very step that training runs, on random pictures. No data is opened.
"""

from __future__ import annotations

import statistics
import time

import jax
from absl import flags

from clipx import cli
from clipx.errors import RunError
from clipx.planning import estimate
from clipx.planning.measure import check_losses, time_steps
from clipx.training import fit
from clipx.training.run import assemble


def main(overrides: list[tuple[str, str]]) -> None:
    """Prints how right the losses are here, and how fast a step is."""
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
    flags.DEFINE_string("config", None, "Config: clip, path.py, or either with :variant.")
    flags.DEFINE_integer("steps", 10, "Steps to time.", lower_bound=1)
    cli.run(main, required=("config",))
