"""`python -m clipx.doctor [--config=FILE] [--workdir=DIR]`: is this host, are all hosts of a run,
fit to train; and what to mend. Started as training is started, on one host or on all.

A line for every check; it ends with 0, or with 2 when something has to be mended first.
"""

from __future__ import annotations

import jax
from absl import flags

from clipx import cli
from clipx.errors import ConfigError
from clipx.planning.host import examine


def main(overrides: list[tuple[str, str]]) -> int:
    config = cli.load_config(flags.FLAGS.config, overrides) if flags.FLAGS.config else None
    if config is None and overrides:
        raise ConfigError(f"--config.{overrides[0][0]}", "no --config", "--config=FILE with it")
    first, ill = jax.process_index() == 0, 0
    own = "" if first else f"process {jax.process_index()}: "
    for finding in examine(config, flags.FLAGS.workdir):
        ill += bool(finding.mend and finding.fatal)
        mark = "ok  " if not finding.mend else "MEND" if finding.fatal else "see "
        if first or finding.mend:  # the others speak of what is wrong alone
            print(f"{own}{mark} {finding.what}: {finding.found}", flush=True)
        if finding.mend:
            print(f"{own}     -> {finding.mend}", flush=True)
    if first or ill:
        print(f"{own}{f'{ill} to mend' if ill else 'fit to train'}", flush=True)
    return cli.EXIT_CONFIG if ill else 0


if __name__ == "__main__":
    flags.DEFINE_string("config", None, "Config whose data is looked at too.")
    flags.DEFINE_string("workdir", "", "Folder of a run, that all hosts have to share.")
    cli.run(main, required=())
