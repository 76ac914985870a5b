"""`python -m clipx.bench --config=configs/clip.py`: does this device compute correctly, and how
fast is it?

First compares a loss on the devices with a dense float64 computation on the host. Then times the
training step itself, on random pictures. No data is opened.

`python -m clipx.bench --against=torch,open_clip,faiss` measures clipx beside what else could be
used, in turns: training steps, the loss alone, k-means, loading, the start of a run, and growth.
`--only=step,loss` picks; `--write` puts the table into the docs of a checkout. A peer that is not
installed gets an empty column.
"""

from __future__ import annotations

import json
import pathlib
import statistics
import sys
import time
from collections.abc import Collection

import jax
from absl import flags

from clipx import cli
from clipx.errors import ConfigError, RunError
from clipx.planning import estimate, results, rows, suite
from clipx.planning.measure import check_losses, time_steps
from clipx.training import fit
from clipx.training.run import assemble


def chosen(flag: str, text: str, names: Collection[str]) -> tuple[str, ...]:
    """The names of a flag's value, `a,b`. Raises `ConfigError` for others than `names`."""
    given = tuple(filter(None, text.split(",")))
    if strange := [name for name in given if name not in names]:
        raise ConfigError(flag, ", ".join(strange), f"some of {', '.join(names)}")
    return given


def compare(against: str, only: str, size: str, file: str, write: bool) -> None:
    """Measures clipx beside the peers `against`, and prints a table.

    only: the sections to measure; "": all. size: full or tiny. file: for the numbers as JSON, or
    "". write: put the numbers into the checkout, too.
    """
    root = suite.BENCHMARKS.parent
    if write and not suite.BENCHMARKS.is_dir():
        raise ConfigError("--write", "an installed clipx", "a checkout", "use --json=FILE")
    peers = chosen("--against", against, suite.PEERS)
    measured = {}
    for name in chosen("--only", only, suite.SECTIONS) or suite.SECTIONS:
        begun, measured[name] = time.perf_counter(), []
        for row in suite.SECTIONS[name](rows.SIZES[size], peers):
            measured[name].append(row)
            print(f"{name}: {row.name} ...", file=sys.stderr)
        print(f"{name}: {time.perf_counter() - begun:.0f} s", file=sys.stderr)
    report = results.report({name: found for name, found in measured.items() if found}, root)
    print("\n".join(results.table(report)))
    if file:
        pathlib.Path(file).write_text(json.dumps(report, indent=1) + "\n")
    if write and report:
        print(f"written: {', '.join(map(str, results.write(report, root)))}", file=sys.stderr)


def check(overrides: list[tuple[str, str]]) -> None:
    """Prints the error of the losses on these devices, and the time of a step."""
    run = assemble(cli.load_config(flags.FLAGS.config, overrides))
    device = run.mesh.devices.flat[0]
    print(f"{run.mesh.devices.size} x {device.device_kind}, JAX {jax.__version__}")
    print(f"InfoNCE, 1,024 rows, value and gradient: error {check_losses(run.mesh):.1e} of float64")
    start = time.perf_counter()
    run = fit.fitted(run)
    prediction = estimate.predict(run)
    if prediction.refused:
        raise RunError(
            f"the step does not fit these devices: {fit.describe_memory(prediction)}. "
            "config.train.microbatches=auto finds the fewest micro-batches that fit"
        )
    print(f"step compiled in {time.perf_counter() - start:.1f} s")
    print("\n".join(estimate.short(prediction)))
    seconds = time_steps(run, flags.FLAGS.steps)
    median = statistics.median(seconds)
    print(
        f"batch {run.batch_size:,}: {median * 1e3:.1f} ms a step (median of {len(seconds)}, "
        f"{min(seconds) * 1e3:.1f} to {max(seconds) * 1e3:.1f}), "
        f"{run.batch_size / median:,.0f} images/s"
    )
    measured = fit.measured(device, prediction, median)
    if "memory_gib" in measured:
        print(f"memory in use: at most {measured['memory_gib']:.2f} GiB")
    if "mfu" in measured and prediction.chip:
        print(f"MFU {measured['mfu']:.1%} of {prediction.chip.tflops:,.0f} TFLOP/s")


def main(overrides: list[tuple[str, str]]) -> None:
    values = flags.FLAGS
    if values.against is not None:
        if overrides or values.config:
            found = "--config with --against, which has configs of its own"
            raise ConfigError("--config", found, "one of the two")
        return compare(values.against, values.only, values.size, values.json, values.write)
    if not values.config:
        raise ConfigError("--config", "nothing", "--config=..., or --against=PEERS")
    check(overrides)


if __name__ == "__main__":
    flags.DEFINE_string("config", None, "Config: clip, path.py, or either with :variant.")
    flags.DEFINE_integer("steps", 10, "Steps to time.", lower_bound=1)
    flags.DEFINE_string("against", None, "Peers to compare with: torch,open_clip,faiss.")
    flags.DEFINE_string("only", "", "Sections: step,loss,kmeans,feed,start,growth.")
    flags.DEFINE_enum("size", "full", list(rows.SIZES), "How much is measured.")
    flags.DEFINE_string("json", "", "A file for the numbers.")
    flags.DEFINE_bool("write", False, "Put the numbers into the checkout's docs and history.")
    cli.run(main, required=())
