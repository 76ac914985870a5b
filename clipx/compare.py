"""`python -m clipx.compare --config=configs/compare_flickr8k.py --workdir=DIR`: trains the variants
of a config one after another, each in its own folder, prints one table of their evals, and writes
results.csv and a page that compares them. `--seeds=0,1,2` trains each variant with each seed.

The same command, started again, skips finished runs and continues the unfinished one. Two of them
at once share the runs between them.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Sequence

import jax
from absl import flags

from clipx import cli
from clipx.config import files
from clipx.errors import ConfigError, RunError
from clipx.planning import comparing
from clipx.planning.comparing import Planned
from clipx.reporting import comparison, runs_page, runs_table
from clipx.train import train
from clipx.training import compared


@dataclasses.dataclass
class Queue:
    """The runs of one command, trained one after another."""

    root: pathlib.Path
    planned: list[Planned]
    elsewhere: list[Planned] = dataclasses.field(default_factory=list)  # others train these

    def train(self, planned: Planned) -> int:
        """Trains one of the runs, unless it is finished or another process trains it. Returns 0, or
        the exit code of a run that was stopped."""
        name = self.name(planned)
        with comparing.claimed(self.root, planned.folder) as mine:
            if not mine:
                print(f"\n{name}: another process trains it", flush=True)
                self.elsewhere.append(planned)
                return 0
            if comparison.finished(planned.folder, planned.config):
                print(f"\n{name}: already finished", flush=True)
                return 0
            print(f"\n{name}", flush=True)
            started = time.perf_counter()
            code = train(planned.config, str(planned.folder))
            planned.record(time.perf_counter() - started)
        if jax.process_index() == 0 and len(self.planned) > 1:
            runs_table.write(self.root)
            print(f"\n{self.progress(planned)}", flush=True)
        return code

    def name(self, planned: Planned) -> str:
        return planned.folder.relative_to(self.root).as_posix()

    def progress(self, last: Planned) -> str:
        """How many of the runs are done, and how long the others will take. last: in their order,
        the one that was trained last."""
        rest = self.planned[self.planned.index(last) + 1 :]
        done = [compared.read(p.folder) for p in self.planned if p not in rest]
        text = f"{len(done)} of {len(self.planned)} runs done"
        seconds = comparing.left(done, rest)
        return text if not seconds else f"{text}; about {comparing.spelled(seconds)} left"


def compare(
    config: str,
    chosen: tuple[str, ...],
    workdir: str,
    overrides: Sequence[tuple[str, str]],
    seeds: Sequence[int] = (),
) -> int:
    """Trains the unfinished runs of the variants `chosen` (default: all) and prints the table.

    seeds: of the runs of each variant; (): one run, with the config's seed. Returns 0, or the exit
    code of the first run that did not finish.
    """
    known = files.variants(config)
    for name in chosen:
        if name not in known:
            raise ConfigError("--variants", repr(name), "one of " + ", ".join(known))
    root = pathlib.Path(workdir).expanduser()
    planned = []
    for seed in seeds or (None,):
        for name in chosen or known:
            values = cli.load_config(f"{config}:{name}", overrides)
            own = values.get("seed", 0)
            folder = comparing.seed_folder(root, name, seed, own)
            values |= {} if seed is None else {"seed": seed}
            planned.append(Planned(name, folder, values))
    queue = Queue(root, planned)
    for one in planned:
        if code := queue.train(one):
            return code
    _show(queue)
    return 0


def _show(queue: Queue) -> None:
    """Writes results.csv and the page of the queue's finished runs, and prints their table."""
    done = [p for p in queue.planned if p not in queue.elsewhere]
    by_variant: dict[str, list[Planned]] = {}
    for planned in done:
        by_variant.setdefault(planned.variant, []).append(planned)
    out = queue.root / runs_page.FILE
    if jax.process_index() == 0:
        runs_table.write(queue.root)
    try:
        folders, names = [str(p.folder) for p in done], [queue.name(p) for p in done]
        page = runs_page.compare(folders, str(out), print, names)
        print(f"\n{page}: the runs compared; open it in a browser")
    except RunError as error:  # the runs themselves are complete
        print(f"\nno {runs_page.FILE}: {error}")
    rows = {
        f"{name} ({len(of)} seeds)" if len(of) > 1 else name: comparison.cells(
            [planned.folder for planned in of]
        )
        for name, of in by_variant.items()
    }
    print("\n" + "\n".join(comparison.table(rows)))
    for planned in queue.elsewhere:
        print(f"not in the table: {queue.name(planned)}, which another process trains")


def _seeds(values: Sequence[str]) -> list[int]:
    seeds = [value.strip() for value in values if value.strip()]
    if not all(value.isdecimal() for value in seeds) or len({*seeds}) < len(seeds):
        expected = "different whole numbers, such as 0,1,2"
        raise ConfigError("--seeds", ",".join(seeds), expected)
    return [int(value) for value in seeds]


def main(overrides: list[tuple[str, str]]) -> int:
    chosen = tuple(filter(None, (name.strip() for name in flags.FLAGS.variants)))
    seeds = _seeds(flags.FLAGS.seeds)
    if seeds and "seed" in dict(overrides):
        fix = "remove --config.seed, or add its seed to --seeds"
        raise ConfigError("--seeds", "both --seeds and --config.seed", "one of them", fix)
    return compare(flags.FLAGS.config, chosen, flags.FLAGS.workdir, overrides, seeds)


if __name__ == "__main__":
    flags.DEFINE_string("config", None, "Config whose variants are compared: a name, or path.py.")
    flags.DEFINE_list("variants", [], "Variants to compare, separated by commas; default: all.")
    flags.DEFINE_string("workdir", None, "Folder of the runs: a new one, or one to continue.")
    flags.DEFINE_list("seeds", [], "Seeds of each variant, such as 0,1,2; default: the config's.")

    cli.run(main, required=("config", "workdir"))
