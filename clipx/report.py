"""`python -m clipx.report --workdir=DIR` writes DIR/report.html: one page that shows a run.

With several, `--workdir=A --workdir=B`, it writes one page that compares the runs, `--out`. With
`--follow` it writes a run's page again whenever there are new metrics, until the run has written
its own at its end; a browser that shows it opens it anew.
"""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable, Sequence

from absl import flags

from clipx import cli
from clipx.errors import ConfigError
from clipx.reporting import page, runs_page
from clipx.training import metrics
from clipx.training import run as runs
from clipx.training.stop import Stop


def follow(workdir: str, stop: Callable[[], bool], *, seconds: float = 10.0) -> pathlib.Path:
    """Writes report.html of a run that trains, without pictures, whenever its metrics have changed,
    until the run has written the report itself, or `stop()` is true. Returns its path."""
    folder = pathlib.Path(workdir).expanduser().absolute()
    log, path, size = folder / metrics.FILE, folder / page.FILE, -1
    while not stop():
        if size >= 0 and "http-equiv" not in path.read_text(encoding="utf-8")[:500]:
            return path  # the run's own
        now = log.stat().st_size if log.is_file() else 0
        if now != size and now:
            path, size = page.write(folder, refresh=max(1, round(seconds))), now
            print(f"{path}: step {metrics.read(folder)[-1]['step']:,}", flush=True)
        end = time.monotonic() + seconds
        while time.monotonic() < end and not stop():
            time.sleep(min(0.2, seconds))
    return page.write(folder)


def main(overrides: Sequence[tuple[str, str]]) -> None:
    """Restores the run of --workdir, encodes its held-out samples and writes the page."""
    if overrides:
        flag = f"--config.{overrides[0][0]}"
        raise ConfigError(
            flag, "an override", "only --workdir: the run has its config", f"remove {flag}"
        )
    workdirs = flags.FLAGS.workdir
    if len(workdirs) > 1:
        print(runs_page.compare(workdirs, flags.FLAGS.out, print))
        return
    if flags.FLAGS.follow:
        with Stop() as stop:
            print(follow(workdirs[0], stop))
        return
    run, state = runs.restore(workdirs[0])
    print(page.write_run(workdirs[0], run, run.encode(state)))


if __name__ == "__main__":
    flags.DEFINE_multi_string("workdir", None, "Folder of the run; several are compared.")
    flags.DEFINE_string("out", runs_page.FILE, "Of several runs: the page to write.")
    flags.DEFINE_bool("follow", False, "Write the page again and again while the run trains.")
    cli.run(main, required=("workdir",))
