"""`python -m clipx.compare --config=configs/compare_flickr8k.py --workdir=DIR`: trains the variants
of a config one after another, each in a folder of its own, and prints one table of their evals.

Started again it goes on where it stopped; what is finished is not trained again.
"""

from __future__ import annotations

import pathlib

from absl import flags

from clipx import cli
from clipx.config import files
from clipx.errors import ConfigError
from clipx.reporting import comparison
from clipx.train import train


def compare(config: str, chosen: tuple[str, ...], workdir: str, overrides) -> int:
    """Trains what is not finished and prints the table; the exit code is that of a run that did
    not end, or 0."""
    known = files.variants(config)
    for name in chosen:
        if name not in known:
            raise ConfigError("--variants", repr(name), "one of " + ", ".join(known))
    rows: dict[str, dict[str, str]] = {}
    for name in chosen or known:
        folder = pathlib.Path(workdir, name)
        values = cli.load_config(f"{config}:{name}", overrides)
        done = comparison.finished(folder, values)
        print(f"\n{name}{': done before' if done else ''}", flush=True)
        if not done and (code := train(values, str(folder))):
            return code
        rows[name] = comparison.cells(folder)
    print("\n" + "\n".join(comparison.table(rows)))
    return 0


def main(overrides: list[tuple[str, str]]) -> int:
    chosen = tuple(filter(None, (name.strip() for name in flags.FLAGS.variants)))
    return compare(flags.FLAGS.config, chosen, flags.FLAGS.workdir, overrides)


if __name__ == "__main__":
    flags.DEFINE_string("config", None, "Config whose variants are compared: a name, or path.py.")
    flags.DEFINE_list("variants", [], "Some of them, separated by commas; all by default.")
    flags.DEFINE_string("workdir", None, "Folder of the runs: new, or one to go on with.")
    cli.run(main, required=("config", "workdir"))
