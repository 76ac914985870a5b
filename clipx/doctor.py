"""`python -m clipx.doctor [--config=FILE] [--workdir=DIR]`: checks whether a host can train, or all
hosts of a run, and says what to fix. Start it the way training is started, on one host or on all.

Prints a line for every check. Exits with 0, or with 2 if something has to be fixed first.
"""

from __future__ import annotations

import jax
from absl import flags

from clipx import cli
from clipx.errors import ConfigError
from clipx.planning.host import examine


def main(overrides: list[tuple[str, str]]) -> int:
    """Prints the findings of `planning.host.examine`; returns the exit code."""
    config = cli.load_config(flags.FLAGS.config, overrides) if flags.FLAGS.config else None
    if config is None and overrides:
        raise ConfigError(
            f"--config.{overrides[0][0]}", "no --config", "--config=FILE beside the override"
        )
    first, faults = jax.process_index() == 0, 0
    prefix = "" if first else f"process {jax.process_index()}: "
    for finding in examine(config, flags.FLAGS.workdir):
        faults += bool(finding.mend and finding.fatal)
        mark = "ok  " if not finding.mend else "FIX " if finding.fatal else "see "
        if first or finding.mend:  # the other processes print only what is wrong
            print(f"{prefix}{mark} {finding.what}: {finding.found}", flush=True)
        if finding.mend:
            print(f"{prefix}     -> {finding.mend}", flush=True)
    if first or faults:
        print(f"{prefix}{f'{faults} to fix' if faults else 'fit to train'}", flush=True)
    return cli.EXIT_CONFIG if faults else 0


if __name__ == "__main__":
    flags.DEFINE_string("config", None, "Config whose data is checked too: a name, or path.py.")
    flags.DEFINE_string("workdir", "", "Folder of a run, which all hosts have to share.")

    cli.run(main, required=())
