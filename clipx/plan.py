"""`python -m clipx.plan --config=configs/declip.py --topology=v5e:16x16`: does a run fit hardware
that is not here, what does a step cost there, and how long will it take?

TPUs (v4, v5e, v5p, v6e; `2xv5e:16x16` is two slices): the very step that training runs is compiled
for them, which takes minutes and no TPU. GPUs (`h100:8x8` is 8 nodes of 8; h200, a100): an analytic
model. Several configs and topologies, with commas, make a table. Exits 0 if all fit, 1 if one does
not. `--losses` prints what the losses alone need.
"""

from __future__ import annotations

import json
import pathlib
import time
from typing import Any

import jax
from absl import flags

from clipx import cli
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
    """Prints a plan for each config on each topology, and returns 1 if one does not fit."""
    jax.config.update("jax_platforms", "cpu")  # what is here has no part in it
    jax.config.update("jax_enable_compilation_cache", False)  # what is not here reads none
    if flags.FLAGS.losses:
        return losses.main()
    topologies = [chips.parse(name) for name in _names("topology")]
    configs = [(name, cli.load_config(name, overrides)) for name in _names("config")]
    gpus = max((where.size for where in topologies if where.gpu), default=0)
    if gpus > 1:
        jax.config.update("jax_num_cpu_devices", gpus)
    prices = _prices(len(topologies))
    rows, told = [], []
    for name, config in configs:
        for where, price in zip(topologies, prices):
            started = time.perf_counter()
            run, found = plan(config, where)
            lines = describe(name, where, run, found, price)
            if flags.FLAGS.search:
                lines.append(search(config, where, run, found))
            seconds = time.perf_counter() - started
            print("\n".join([*lines, f"({seconds:.0f} s)", ""]), flush=True)
            rows.append(Row(name, where, run, found, price))
            told.append({"config": name, "topology": where.name, **found.as_dict()})
            told[-1] |= {"steps": run.steps, "hours": hours(run, found), "report": lines}
            _write(told)
    if len(rows) > 1:
        print("\n".join(table(rows)))
    return int(not all(row.found.fits for row in rows))


def _prices(count: int) -> list[float]:
    """One for each topology."""
    texts = [text for text in flags.FLAGS.price.split(",") if text]
    try:
        prices = [float(text) for text in texts] or [0.0]
    except ValueError:
        prices = [-1.0]
    if min(prices) < 0 or len(prices) not in (1, count):
        raise ConfigError(
            "--price", repr(flags.FLAGS.price), f"a number, or one for each of {count} topologies"
        )
    return prices if len(prices) == count else prices * count


def _write(told: list[dict[str, Any]]) -> None:
    if flags.FLAGS.json:
        try:
            pathlib.Path(flags.FLAGS.json).write_text(json.dumps(told, indent=2) + "\n")
        except OSError as error:
            raise ConfigError("--json", f"{flags.FLAGS.json}: {error.strerror}", "a file") from None


if __name__ == "__main__":
    flags.DEFINE_string("config", None, "Configs, with commas: clip, path.py, clip:small.")
    flags.DEFINE_string("topology", None, "Such as v5e:16x16, 2xv5p:4x4x4, h100:8x8; with commas.")
    flags.DEFINE_string("price", "", "Of a chip-hour, in any currency; or one for each topology.")
    flags.DEFINE_bool("search", False, "Compile for the fewest micro-batches or largest batch.")
    flags.DEFINE_string("json", None, "File for all numbers.")
    flags.DEFINE_bool("losses", False, "What the losses alone need, beside plain formulations.")
    cli.run(main, required=())
