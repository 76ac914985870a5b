"""`python -m clipx.compare --config=configs/compare_flickr8k.py --workdir=DIR`: trains the variants
of a config one after another, each in its own folder, prints one table of their evals, and writes
results.csv, results.md and a page that compares them.

`--seeds=0,1,2` trains each variant with each seed. `--trials=6` first searches the ranges of the
config's `SEARCH` on rows held out of the training data. `--budget` says what is equal: pairs seen,
FLOPs, or seconds of training. The verdicts on the config's `CLAIMS` follow.

The same command, started again, skips finished runs and continues the unfinished one. Two of them
at once share the runs between them.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import time
import typing
from collections.abc import Mapping, Sequence

import jax
from absl import flags

from clipx import cli
from clipx.config import files
from clipx.errors import ConfigError, RunError
from clipx.parallel import processes
from clipx.planning import comparing, lengths, trials
from clipx.planning.comparing import Plan, Planned
from clipx.planning.lengths import Budget
from clipx.reporting import claims, comparison, runs_page, runs_table, trials_table
from clipx.reporting.comparison import Result
from clipx.reporting.templates import write_page
from clipx.reporting.trials_table import Trials
from clipx.train import train
from clipx.training import compared


@dataclasses.dataclass
class Queue:
    """The runs of one command, trained one after another."""

    root: pathlib.Path
    kept: Sequence[Mapping[str, str]] = ()  # lines of results.csv, of runs that have no folder
    planned: list[Planned] = dataclasses.field(default_factory=list)
    elsewhere: list[Planned] = dataclasses.field(default_factory=list)  # others train these

    def train(self, planned: Planned) -> int:
        """Trains one of the runs, unless it is finished or another process trains it. Returns 0, or
        the exit code of a run that was stopped. A trial that cannot go on has failed, which is
        recorded, unless it has the config's own values: raises `RunError` then."""
        name = self.name(planned)
        with comparing.claimed(self.root, planned.folder) as mine:
            if not mine:
                print(f"\n{name}: another process trains it", flush=True)
                self.elsewhere.append(planned)
                return 0
            if self.line(planned):
                print(f"\n{name}: finished, by {runs_table.FILE}", flush=True)
                return 0
            if planned.failed:
                print(f"\n{name}: failed before: {planned.failed}", flush=True)
                return 0
            if comparison.finished(planned.folder, planned.config):
                print(f"\n{name}: already finished", flush=True)
                if "config" not in compared.read(planned.folder):
                    planned.record(0.0)
                return 0
            print(f"\n{name}{planned.described}", flush=True)
            started, failed = time.perf_counter(), ""
            try:
                code = train(planned.config, str(planned.folder))
            except RunError as error:
                own = planned.kind != "trial" or not planned.changes
                if own or type(error) is not RunError:  # such as storage that is gone
                    raise
                code, failed = 0, str(error).splitlines()[0]
                print(f"{name} has failed: {failed}", flush=True)
            planned.record(time.perf_counter() - started, failed)
        if not code and jax.process_index() == 0 and len(self.planned) > 1:
            runs_table.write(self.root)
            print(f"\n{self.progress(planned)}", flush=True)
        return code

    def line(self, planned: Planned) -> Mapping[str, str]:
        """The line of results.csv about this run, finished and no longer here; {} if there is none.
        Raises `ConfigError` for a line of a run of another config, which this one would replace."""
        if (planned.folder / "config.json").exists():
            return {}
        same = {"variant": planned.variant, "kind": planned.kind, "config": planned.digest}
        for line in self.kept:
            if same.items() <= line.items():
                return line if line.get("finished") == "yes" else {}
            if line["folder"] == self.name(planned):
                found = (
                    f"{self.root / runs_table.FILE}, whose run {line['folder']} had other values"
                )
                fix = "another --workdir, or remove that line"
                raise ConfigError("--workdir", found, "a run of the same values", fix)
        return {}

    def result(self, planned: Planned) -> Result:
        """What a run that has been trained has come to."""
        if line := self.line(planned):
            return runs_table.result(line, planned.config["evals"])
        return comparison.result(planned.folder)

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
    chosen: Sequence[str],
    workdir: str,
    overrides: Sequence[tuple[str, str]],
    seeds: Sequence[int] = (),
    count: int = 0,
    budget: Budget = "pairs",
) -> int:
    """Trains the unfinished runs of the variants `chosen` (default: all) and prints the table.

    seeds: of the runs of each variant; (): one run, with the config's seed. count: trials of each
    variant of the config's `SEARCH`. Returns 0, or the exit code of the first run that did not
    finish.
    """
    known = files.variants(config)
    for name in chosen:
        if name not in known:
            raise ConfigError("--variants", repr(name), "one of " + ", ".join(known))
    root, names = pathlib.Path(workdir).expanduser(), tuple(chosen or known)
    found = claims.claims(files.declared(config, "CLAIMS"), known)
    declared = files.declared(config, "SEARCH")
    if count and declared is None:
        raise ConfigError("--trials", f"{count}, and a config without SEARCH", "ranges to search")
    search = trials.search(declared, known) if declared is not None else None
    needed = {*names, *(known[:1] if budget != "pairs" else ())}
    needed |= {source for n in names if search and (source := search.source(n))}
    values = {n: cli.load_config(f"{config}:{n}", overrides) for n in known if n in needed}
    plan = Plan(root, names, values, tuple(seeds), budget, search)
    queue = Queue(root, runs_table.kept(root))
    plan.finals()  # raises for a variant whose name is no folder's
    if code := _match(plan, queue, known[0]) or _search(plan, queue, count):
        return code
    finals = plan.finals()
    queue.planned = [*queue.planned[: -len(finals)], *finals] if count else finals
    for planned in finals:
        if planned.variant in plan.waiting:
            queue.elsewhere.append(planned)
        elif code := queue.train(planned):
            return code
    _show(plan, queue, found)
    return 0


def _match(plan: Plan, queue: Queue, first: str) -> int:
    """Sets the lengths of the plan's runs by its budget: each variant spends what `first` does.
    Returns as `Queue.train` does."""
    if plan.budget == "pairs":
        return 0
    names = [first, *(name for name in plan.names if name != first)]
    opened = {name: lengths.opened(plan.values[name], plan.root / name) for name in names}
    if plan.budget == "flops":
        cost = {name: run.pair_flops for name, run in opened.items()}
    else:
        queue.planned = [plan.timing(name, opened[name]) for name in names]
        for planned in queue.planned:
            if code := queue.train(planned):
                return code
        if queue.elsewhere:
            raise RunError("the steps are being timed by another process: start again after it")
        timed = zip(opened.items(), queue.planned)
        cost = {n: lengths.seconds_per_pair(p.folder, run) for (n, run), p in timed}
    total = lengths.pairs(opened[first]) * cost[first]
    print(f"\nof equal {plan.budget}:", flush=True)
    for name, run in opened.items():
        plan.lengths[name] = lengths.matched(plan.values[name], run, round(total / cost[name]))
        examples = plan.lengths[name].get("train.total_examples", lengths.pairs(run))
        print(f"  {name}: {examples:,} pairs at {cost[name]:.3g} {plan.budget} a pair", flush=True)
    return 0


def _search(plan: Plan, queue: Queue, count: int) -> int:
    """Trains `count` trials of each variant that is searched, and takes their best values; 0: those
    that an earlier command has chosen. Returns as `Queue.train` does."""
    if count and plan.search:
        plan.refuse_another_choice(count)
        if code := _try(plan, plan.search, queue, count):
            return code
    for source in plan.sources:
        if found := trials.read_chosen(plan.root / source):
            plan.chosen[source] = found["changes"]
            shown = comparing.described(found["changes"]) or " the config's own values"
            best = f"trial {found['trial']} of {found['trials']}, score {found['score']:.4g}"
            print(f"\n{source}: chosen by the search ({best}):{shown}", flush=True)
    return 0


def _try(plan: Plan, search: trials.Search, queue: Queue, count: int) -> int:
    """Trains `count` trials of each variant that is searched, and writes its best values. Returns
    as `Queue.train` does."""
    if rest := [name for name in plan.names if search.source(name) is None]:
        print(f"\nnot searched, as SEARCH has no ranges for it: {', '.join(rest)}", flush=True)
    runs = {source: plan.trials(source, count) for source in plan.sources}
    queue.planned = [*(t for of in runs.values() for t in of), *plan.finals()]
    for planned in queue.planned[: count * len(runs)]:
        if code := queue.train(planned):
            return code
    for source, of in runs.items():
        if any(planned in queue.elsewhere for planned in of):
            plan.waiting |= {n for n in plan.names if search.source(n) == source}
        elif jax.process_index() == 0:
            trials.write_chosen(plan.root / source, _best(of, queue, search))
    processes.barrier("chosen")  # all read what the first one writes
    return 0


def _best(runs: Sequence[Planned], queue: Queue, search: trials.Search) -> trials.Chosen:
    """The best of the trials of a variant. The first of equal ones."""
    best, score, evals = 0, math.nan, runs[0].config["evals"]
    for number, planned in enumerate(runs):
        if planned.failed:
            continue
        found = queue.result(planned).scores.get(search.metric, math.nan)
        if math.isnan(score) or search.better(evals, found, score):
            best, score = number, found
    changes = dict(runs[best].changes)
    return {"trials": len(runs), "trial": best, "score": score, "changes": changes}


def _show(plan: Plan, queue: Queue, found: Sequence[claims.Claim]) -> None:
    """Writes results.csv, results.md and the page of the finished runs, and prints the tables."""
    done = [p for p in queue.planned if p.kind == "final" and p not in queue.elsewhere]
    runs: dict[str, list[Result]] = {}
    for planned in done:
        runs.setdefault(planned.variant, []).append(queue.result(planned))
    for planned in queue.elsewhere:
        print(f"\nnot in the table: {queue.name(planned)}, as another process is at work on it")
    if not done:
        return
    rows = {
        f"{name} ({len(of)} seeds)" if len(of) > 1 else name: comparison.cells(of, plan.budget)
        for name, of in runs.items()
    }
    named = [claim for claim in found if {claim.better, claim.worse} <= {*plan.names}]
    verdicts = claims.verdicts(named, runs)
    text = "\n".join(
        [*comparison.table(rows), *([""] if verdicts else []), *claims.table(verdicts)]
    )
    if jax.process_index() == 0:
        runs_table.write(queue.root)
        write_page(queue.root / "results.md", text + "\n")
    here = [planned for planned in done if not queue.line(planned)]
    if gone := len(done) - len(here):
        print(f"\nnot on the page: {gone} runs that only {runs_table.FILE} has")
    if here:
        _write_page(plan, queue, here, verdicts)
    print("\n" + text)


def _write_page(
    plan: Plan, queue: Queue, runs: Sequence[Planned], verdicts: Sequence[claims.Verdict]
) -> None:
    """Writes the page of some finished runs."""
    out = queue.root / runs_page.FILE
    print(f"\n{out.name}: opening a model of each variant", flush=True)
    try:
        page = runs_page.compare(
            [str(p.folder) for p in runs],
            str(out),
            print,
            [queue.name(p) for p in runs],
            [p.variant for p in runs],
            verdicts,
            _searches(plan),
        )
        print(f"{page}: the runs compared; open it in a browser")
    except RunError as error:  # the runs themselves are complete
        print(f"no {runs_page.FILE}: {error}")


def _searches(plan: Plan) -> list[Trials]:
    """The trials that have chosen for the plan's variants."""
    shown = []
    for source in plan.sources:
        if found := trials.read_chosen(plan.root / source):
            folders = plan.trial_folders(source, found["trials"])
            shown.append(trials_table.read(source, folders, found["trial"]))
    return shown


def _seeds(values: Sequence[str]) -> list[int]:
    seeds = [value.strip() for value in values if value.strip()]
    if not all(value.isdecimal() for value in seeds) or len({*seeds}) < len(seeds):
        expected = "different whole numbers, such as 0,1,2"
        raise ConfigError("--seeds", ",".join(seeds), expected)
    return [int(value) for value in seeds]


def main(overrides: list[tuple[str, str]]) -> int:
    values = flags.FLAGS
    chosen = tuple(filter(None, (name.strip() for name in values.variants)))
    seeds = _seeds(values.seeds)
    if seeds and "seed" in dict(overrides):
        fix = "remove --config.seed, or add its seed to --seeds"
        raise ConfigError("--seeds", "both --seeds and --config.seed", "one of them", fix)
    return compare(
        values.config, chosen, values.workdir, overrides, seeds, values.trials, values.budget
    )


if __name__ == "__main__":
    flags.DEFINE_string("config", None, "Config whose variants are compared: a name, or path.py.")
    flags.DEFINE_list("variants", [], "Variants to compare, separated by commas; default: all.")
    flags.DEFINE_string("workdir", None, "Folder of the runs: a new one, or one to continue.")
    flags.DEFINE_list("seeds", [], "Seeds of each variant, such as 0,1,2; default: the config's.")
    flags.DEFINE_integer("trials", 0, "Trials of each variant of the config's SEARCH.", 0)
    flags.DEFINE_enum(
        "budget", "pairs", typing.get_args(Budget), "What the variants spend equally."
    )

    cli.run(main, required=("config", "workdir"))
