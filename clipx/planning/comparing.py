"""The runs that `clipx.compare` trains: their folders, which of them another process trains, and
how long the rest will take."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import pathlib
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypedDict

import jax

from clipx.config import reading
from clipx.config.binding import to_lists
from clipx.errors import ConfigError, damaged_file
from clipx.planning import lengths, results, trials
from clipx.planning.lengths import Budget
from clipx.planning.trials import Search
from clipx.training import compared
from clipx.training.compared import Record
from clipx.training.run import Run
from clipx.training.workdir import read_json, write_json

_LOCKS = ".running"  # a file for each run that a process trains, or has trained

Kind = Literal["final", "trial", "timing"]


class _Seeded(TypedDict, total=False):
    seed: int


class Planned(NamedTuple):
    """A run that `clipx.compare` trains, or has trained."""

    variant: str
    folder: pathlib.Path
    config: dict[str, Any]
    kind: Kind = "final"
    budget: str = "pairs"
    changes: Mapping[str, Any] = {}  # key of the config -> the value in place of the variant's own
    metric: str = ""  # that scores a trial
    size: float = 1.0  # pairs that it sees, as a share of those of the variant's final runs

    @property
    def failed(self) -> str:
        """Why an earlier command could not train exactly this run to its end; "" if it did not
        fail."""
        known = compared.read(self.folder)
        same = known.get("changes") == to_lists(self.changes)
        return known.get("failed", "") if same else ""

    @property
    def digest(self) -> str:
        """What stands for the values of its config."""
        return compared.digest(self.config)

    @property
    def described(self) -> str:
        """What differs from the variant's own values, for the console."""
        return described(self.changes)

    def record(self, seconds: float, failed: str = "") -> None:
        """Records the run in its folder. seconds: of wall time, added to those of earlier sessions.
        failed: why it could not be trained to its end."""
        if jax.process_index() != 0 or not self.folder.is_dir():
            return  # a run that was refused has no folder
        known: Record = {
            "variant": self.variant,
            "kind": self.kind,
            "budget": self.budget,
            "changes": dict(self.changes),
            "metric": self.metric,
            "size": self.size,
            "config": self.digest,
            "commit": results.commit(pathlib.Path(__file__).parents[2]),
            "seconds": round(compared.read(self.folder).get("seconds", 0.0) + seconds, 1),
            "failed": failed,
        }
        write_json(self.folder / compared.FILE, known)


def seed_folder(root: pathlib.Path, variant: str, seed: int | None, own: int) -> pathlib.Path:
    """The folder of a variant's run. seed: that of the run; None: the config's `own`.

    It is `<variant>/seed_<n>` for a seed that is asked for, and `<variant>` else, unless the other
    of the two holds a run of that seed already. Raises `ConfigError` for a variant whose name is no
    name of a folder.
    """
    try:
        plain = reading.inside(root, variant)
    except ValueError as error:
        raise ConfigError("--variants", str(error), "names of folders in --workdir") from None
    number = own if seed is None else seed
    chosen, other = plain / f"seed_{number}", plain
    if seed is None:
        chosen, other = other, chosen
    return other if _seed_of(chosen) != number == _seed_of(other) else chosen


def _seed_of(folder: pathlib.Path) -> int | None:
    """The seed of the run in a folder; None for a folder without a run."""
    path = folder / "config.json"
    if not path.exists():
        return None
    try:
        return reading.shaped(read_json(path), _Seeded).get("seed", 0)
    except ValueError as error:
        raise damaged_file(path, error) from None


@contextlib.contextmanager
def claimed(root: pathlib.Path, folder: pathlib.Path) -> Iterator[bool]:
    """A context in which this process alone trains the run in `folder`, if it gives True. False:
    another process, on this machine or another that shares the file system, trains it.

    A run of several JAX processes is not claimed, nor is one on a file system without locks.
    """
    if jax.process_count() > 1:
        yield True
        return
    name = urllib.parse.quote(folder.relative_to(root).as_posix(), safe="")
    with contextlib.ExitStack() as stack:
        try:
            (root / _LOCKS).mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(root / _LOCKS / name, "a"))
        except OSError as error:
            expected = "a folder that can be written"
            raise ConfigError("--workdir", f"{root}: {error.strerror}", expected) from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:  # the file system has no locks
            pass
        yield True


@dataclasses.dataclass
class Plan:
    """The runs of one command."""

    root: pathlib.Path
    names: tuple[str, ...]  # of the variants that are compared
    values: Mapping[str, dict[str, Any]]  # their configs, and those that they depend on
    seeds: tuple[int, ...] = ()  # (): the config's own
    budget: Budget = "pairs"
    search: Search | None = None
    lengths: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    chosen: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)  # by the search
    waiting: set[str] = dataclasses.field(default_factory=set)  # for trials of another process

    @property
    def sources(self) -> list[str]:
        """The variants that are searched for those that are compared."""
        if self.search is None:
            return []
        found = [self.search.source(name) for name in self.names]
        return list(dict.fromkeys(name for name in found if name is not None))

    def finals(self) -> list[Planned]:
        """All variants with the first seed, then with the second, and so on."""
        made = []
        for seed in self.seeds or (None,):
            for name in self.names:
                source = self.search.source(name) if self.search else None
                changes = {**self.lengths.get(name, {}), **self.chosen.get(source or "", {})}
                config = trials.changed(self.values[name], changes)
                folder = seed_folder(self.root, name, seed, config.get("seed", 0))
                config |= {} if seed is None else {"seed": seed}
                made.append(Planned(name, folder, config, "final", self.budget, changes))
        return made

    def trials(self, source: str, count: int) -> list[Planned]:
        """The trials of a variant, of which the first has the config's own values."""
        assert self.search is not None  # it has named `source`
        config = trials.changed(self.values[source], self.lengths.get(source, {}))
        drawn = trials.draw(self.search.ranges[source], count)
        return [
            Planned(
                *(source, folder, trials.trial(config, changes, self.search)),
                *("trial", self.budget, changes, self.search.metric, self.search.share),
            )
            for folder, changes in zip(self.trial_folders(source, count), drawn)
        ]

    def trial_folders(self, source: str, count: int) -> list[pathlib.Path]:
        folder = reading.inside(self.root, source) / "trials"
        return [folder / f"{number:02d}" for number in range(count)]

    def timing(self, name: str, run: Run) -> Planned:
        """The run that times the steps of a variant, whose `run` is given."""
        folder = reading.inside(self.root, name) / "timing"
        return Planned(name, folder, lengths.timing(self.values[name], run), "timing", self.budget)

    def refuse_another_choice(self, count: int) -> None:
        """Raises `ConfigError` if a final run has begun without a search of `count` trials."""
        for name in self.names:
            source = self.search.source(name) if self.search else None
            plain = reading.inside(self.root, name)
            begun = [f for f in (plain, *plain.glob("seed_*")) if _seed_of(f) is not None]
            known = trials.read_chosen(self.root / source) if source else None
            if source is None or not begun or (known and known["trials"] == count):
                continue
            had, fix = "no search", "another --workdir"
            if known:
                had = f"a search of {known['trials']} trials"
                fix += f", or --trials={known['trials']}"
            raise ConfigError(
                "--trials",
                f"{count}, and {begun[0]}, a final run that began after {had}",
                "the search before the final runs",
                fix,
            )


def left(done: Iterable[Record], rest: Sequence[Planned]) -> float | None:
    """Seconds that the runs `rest` will take, from those that others took: for a variant without
    any, from those of all variants. None if nothing is known."""
    sums: dict[str, tuple[float, float]] = {}
    for known in done:
        if (seconds := known.get("seconds", 0.0)) and not known.get("failed"):
            for name in (known.get("variant", ""), ""):
                before = sums.get(name, (0.0, 0.0))
                sums[name] = (before[0] + seconds, before[1] + known.get("size", 1.0))
    if "" not in sums:
        return None
    rates = {name: seconds / size for name, (seconds, size) in sums.items()}
    return sum(planned.size * rates.get(planned.variant, rates[""]) for planned in rest)


def described(changes: Mapping[str, Any]) -> str:
    """Changes of a config as its flags spell them."""
    return "".join(f" {key}={value}" for key, value in changes.items())


def spelled(seconds: float) -> str:
    """A time as a person says it: 50 s, 40 min, 2.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
