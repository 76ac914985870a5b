"""`python -m clipx.train --config=configs/clip.py --workdir=DIR`: trains, evaluates and saves.

The same command, started again, continues from the last checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from absl import flags

from clipx import cli
from clipx.errors import RunError
from clipx.reporting import page
from clipx.training.feed import quarantine_file
from clipx.training.session import open_session, tell
from clipx.training.stop import Stop
from clipx.types import Device


def train(
    config: dict[str, Any],
    workdir: str,
    devices: Sequence[Device] | None = None,
    *,
    stop: Stop | None = None,
    extend: bool = False,
) -> int:
    """Trains `config` in `workdir` on `devices` (default: all) and returns the exit code.

    stop: asked at every step whether to stop; None listens to SIGTERM and SIGINT. extend: as for
    `open_session`.
    """
    started = time.perf_counter()
    session = open_session(config, workdir, devices, extend=extend)
    state, finished = session.train(stop)
    if not finished:
        steps = session.checkpoints.steps
        saved = f"saved step {steps[-1]:,}" if steps else "no step"
        tell(f"stopped on request, {saved}; run the same command to continue")
        return cli.EXIT_PREEMPTED
    try:
        encode = session.run.encode(state)
        page.write_run(session.folder, session.run, encode, session.data.held_out)
        report = "  report.html      open it in a browser"
    except RunError as error:  # the run itself is complete
        report = f"  no report.html: {error}"
    tell(
        "\n".join(
            (
                f"done in {time.perf_counter() - started:.0f} s; in {session.folder}:",
                "  metrics.jsonl    one line for every logged step",
                "  config.json      the complete config, with defaults",
                "  checkpoints/     " + ", ".join(map(str, session.checkpoints.steps)),
                report,
            )
        )
    )
    if (file := quarantine_file(session.folder)).exists():
        tell(f"  {file.name} rows that could not be used, with reasons")
    return 0


def main(overrides: list[tuple[str, str]]) -> int:
    config = cli.load_config(flags.FLAGS.config, overrides)
    extend = flags.FLAGS.extend
    return train(config, flags.FLAGS.workdir, stop=Stop(kill=True), extend=extend)


if __name__ == "__main__":
    flags.DEFINE_string("config", None, "Config: clip, path.py, or either with :variant.")
    flags.DEFINE_string("workdir", None, "Folder of the run: a new one, or one to continue.")
    flags.DEFINE_bool(
        "extend", False, "Train a finished run on: longer, with a new schedule from its last step."
    )
    flags.DEFINE_bool("deterministic", False, "The same bits each time on a GPU too; slower.")

    cli.run(main, required=("config", "workdir"))
