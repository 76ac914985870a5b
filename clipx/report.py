"""`python -m clipx.report --workdir=DIR` writes DIR/report.html: one page that shows a run."""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from clipx import cli
from clipx.errors import ConfigError
from clipx.reporting import page
from clipx.training import run as runs


def main(overrides: Sequence[tuple[str, str]]) -> None:
    """Restores the run of --workdir, encodes its held-out samples and writes the page."""
    if overrides:
        flag = f"--config.{overrides[0][0]}"
        raise ConfigError(
            flag, "an override", "only --workdir: the run has its config", f"remove {flag}"
        )

    run, state = runs.restore(flags.FLAGS.workdir)
    print(page.write_run(flags.FLAGS.workdir, run, run.encode(state)))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of the run.")
    cli.run(main, required=("workdir",))
