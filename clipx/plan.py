"""`python -m clipx.plan --config=configs/declip.py --topology=v5e:16x16`: does a run fit hardware
that is not here, what does a step cost there, and how long will the run take?

For TPUs (v4, v5e, v5p, v6e; `2xv5e:16x16` is two slices) the training step itself is compiled,
which takes minutes and needs no TPU. For GPUs (`h100:8x8` is 8 nodes of 8; h200, a100) an analytic
model estimates it. Several configs and topologies, separated by commas, make a table. Exits with 0
if all of them fit, with 1 otherwise; with `--search`, if all fit with some recomputation or number
of micro-batches.
`--losses` prints the memory and time of the losses alone.
"""

from __future__ import annotations

import json
import pathlib
import time
from typing import Any

import jax
from absl import flags

from clipx import cli
from clipx.config import secrets
from clipx.errors import ConfigError
from clipx.parallel import chips
from clipx.planning import losses
from clipx.planning.plans import Row, describe, hours, plan, search, table


def _names(flag: str) -> list[str]:
    text = flags.FLAGS[flag].value
    if not text:
        raise ConfigError(f"--{flag}", "nothing", f"--{flag}=...")
    return [name for name in text.split(",") if name]


def main(overrides: list[tuple[str, str]]) -> int:
    """Prints a plan for each config on each topology; returns 0 if all fit, else 1."""
    jax.config.update("jax_platforms", "cpu")  # plans never use the local accelerators
    # programs compiled for absent hardware must not enter the cache
    jax.config.update("jax_enable_compilation_cache", False)
    if flags.FLAGS.losses:
        return losses.main()
    topologies = [chips.parse(name) for name in _names("topology")]
    configs = [(name, cli.load_config(name, overrides)) for name in _names("config")]
    gpus = max((topology.size for topology in topologies if topology.gpu), default=0)
    if gpus > 1:  # the analytic model reads shapes from a run on that many CPU devices
        jax.config.update("jax_num_cpu_devices", gpus)
    prices = _prices(len(topologies))
    rows, records = [], []
    for name, config in configs:
        for topology, price in zip(topologies, prices):
            started = time.perf_counter()
            run, prediction = plan(config, topology)
            searched = []
            if flags.FLAGS.search:
                run, prediction, line = search(config, topology, run, prediction)
                searched = [line]
            lines = [*describe(name, topology, run, prediction, price), *searched]
            seconds = time.perf_counter() - started
            print("\n".join([*lines, f"({seconds:.0f} s)", ""]), flush=True)
            rows.append(Row(name, topology, run, prediction, price))
            records.append({"config": name, "topology": topology.name, **prediction.as_dict()})
            records[-1] |= {"steps": run.steps, "hours": hours(run, prediction), "report": lines}
            _write(records)
    if len(rows) > 1:
        print("\n".join(table(rows)))
    return int(not all(row.found.fits for row in rows))


def _prices(count: int) -> list[float]:
    """The price of a chip-hour on each of `count` topologies."""
    texts = [text for text in flags.FLAGS.price.split(",") if text]
    try:
        prices = [float(text) for text in texts] or [0.0]
    except ValueError:
        prices = [-1.0]
    if min(prices) < 0 or len(prices) not in (1, count):
        raise ConfigError(
            "--price",
            repr(flags.FLAGS.price),
            f"one price of at least 0, or one for each of the {count} topologies, with commas",
        )
    return prices if len(prices) == count else prices * count


def _write(records: list[dict[str, Any]]) -> None:
    path = flags.FLAGS.json
    if path:
        try:
            pathlib.Path(path).write_text(json.dumps(secrets.cut_all(records), indent=2) + "\n")
        except OSError as error:
            found = f"{path}: {error.strerror}"
            raise ConfigError("--json", found, "a file that can be written") from None


if __name__ == "__main__":
    flags.DEFINE_string("config", None, "Configs, with commas: clip, path.py, clip:small.")
    flags.DEFINE_string("topology", None, "Topologies: v5e:16x16, 2xv5p:4x4x4, h100:8x8. Commas.")
    flags.DEFINE_string("price", "", "Price of a chip-hour, one for all topologies or one each.")
    flags.DEFINE_bool(
        "search",
        False,
        "Also search what a step that does not fit must recompute, or the fewest micro-batches; "
        "for one that fits, the largest batch.",
    )
    flags.DEFINE_string("json", None, "File to write all numbers to.")
    flags.DEFINE_bool(
        "losses", False, "Only compare the losses' memory and time with plain formulations."
    )

    cli.run(main, required=())
