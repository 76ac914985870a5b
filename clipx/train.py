"""`python -m clipx.train --config=configs/clip.py --workdir=DIR`: trains, evaluates, saves, and
goes on where it stopped when started again."""

from __future__ import annotations

import time
from typing import Any

from absl import flags

from clipx import cli
from clipx.errors import RunError
from clipx.reporting import page
from clipx.training.session import open_session, quarantine_file, tell
from clipx.training.stop import Stop


def train(config: dict[str, Any], workdir: str, devices=None, *, stop: Stop | None = None) -> int:
    """Trains `config` in `workdir` on `devices` (default: all) and returns the exit code. `stop`:
    who tells the run to stop; None: signals."""
    started = time.perf_counter()
    session = open_session(config, workdir, devices)
    state, finished = session.train(stop)
    if not finished:
        tell(f"told to stop; saved step {int(state.step):,}; start again to go on")
        return cli.EXIT_PREEMPTED
    try:
        page.write_run(session.folder, session.run, session.run.encode(state))
        shown = "  report.html      open it in a browser"
    except RunError as error:  # the run itself is whole
        shown = f"  no report.html: {error}"
    tell(
        "\n".join(
            (
                f"done in {time.perf_counter() - started:.0f} s; in {session.folder}:",
                "  metrics.jsonl    a line for every logged step",
                "  config.json      the whole config, defaults included",
                "  checkpoints/     " + ", ".join(map(str, session.checkpoints.steps)),
                shown,
            )
        )
    )
    if (file := quarantine_file(session.folder)).exists():
        tell(f"  {file.name} rows that could not be used, and why")
    return 0


def main(overrides: list[tuple[str, str]]) -> int:
    return train(cli.load_config(flags.FLAGS.config, overrides), flags.FLAGS.workdir)


if __name__ == "__main__":
    flags.DEFINE_string("config", None, "Config: clip, path.py, or either with :variant.")
    flags.DEFINE_string("workdir", None, "Folder of the run: new, or one to go on with.")
    cli.run(main, required=("config", "workdir"))
