"""`python -m clipx.compare --config=configs/compare_flickr8k.py --workdir=DIR`: trains the variants
of a config one after another, each in its own folder, prints one table of their evals, and writes
a page that compares them.

The same command, started again, skips finished variants and continues the unfinished one.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from absl import flags

from clipx import cli
from clipx.config import files, reading
from clipx.errors import ConfigError, RunError
from clipx.reporting import comparison, runs_page
from clipx.train import train


def compare(
    config: str, chosen: tuple[str, ...], workdir: str, overrides: Sequence[tuple[str, str]]
) -> int:
    """Trains the unfinished ones of the variants `chosen` (default: all) and prints the table.

    Returns 0, or the exit code of the first run that did not finish.
    """
    known = files.variants(config)
    for name in chosen:
        if name not in known:
            raise ConfigError("--variants", repr(name), "one of " + ", ".join(known))
    rows: dict[str, dict[str, str]] = {}
    for name in chosen or known:
        try:
            folder = reading.inside(pathlib.Path(workdir), name)
        except ValueError as error:
            raise ConfigError("--variants", str(error), "names of folders in --workdir") from None
        values = cli.load_config(f"{config}:{name}", overrides)
        done = comparison.finished(folder, values)
        print(f"\n{name}{': already finished' if done else ''}", flush=True)
        if not done and (code := train(values, str(folder))):
            return code
        rows[name] = comparison.cells(folder)
    folders = [str(pathlib.Path(workdir, name)) for name in rows]
    try:
        out = str(pathlib.Path(workdir, runs_page.FILE))
        page = runs_page.compare(folders, out, print, list(rows))
        print(f"\n{page}: the runs compared; open it in a browser")
    except RunError as error:  # the runs themselves are complete
        print(f"\nno {runs_page.FILE}: {error}")
    print("\n" + "\n".join(comparison.table(rows)))
    return 0


def main(overrides: list[tuple[str, str]]) -> int:
    chosen = tuple(filter(None, (name.strip() for name in flags.FLAGS.variants)))
    return compare(flags.FLAGS.config, chosen, flags.FLAGS.workdir, overrides)


if __name__ == "__main__":
    flags.DEFINE_string("config", None, "Config whose variants are compared: a name, or path.py.")
    flags.DEFINE_list("variants", [], "Variants to compare, separated by commas; default: all.")
    flags.DEFINE_string("workdir", None, "Folder of the runs: a new one, or one to continue.")

    cli.run(main, required=("config", "workdir"))
