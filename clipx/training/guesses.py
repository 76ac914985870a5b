"""What sources guessed: said when a run starts, saved, and held to when it goes on.

A source takes the settings that its section leaves open from its files (`Source.guesses`).
config.json holds the values that were taken, and guesses.json says which of them were guessed.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

from clipx.config import reading
from clipx.config.binding import to_lists
from clipx.data.base import Guess, Source
from clipx.errors import ConfigError, damaged_file, readable
from clipx.evaluators.base import Evaluator
from clipx.training.schema import EVAL_SOURCES

FILE = "guesses.json"
_OPEN = (None, "", "auto", [])  # what a section holds for a setting that it leaves open

Guesses = dict[str, Guess]  # by path, such as "data.image" or "evals.retrieval.data.image"


def sources(data: Source | None, evaluators: Mapping[str, Evaluator]) -> dict[str, Source]:
    """The open sources of a run, by the path of their section: "data", "evals.retrieval.data"."""
    opened = {} if data is None else {"data": data}
    for name, evaluator in evaluators.items():
        for field, key in EVAL_SOURCES.items():
            examples = getattr(evaluator, field, None)
            if examples is not None:
                opened[f"evals.{name}.{key}"] = examples.source
    return opened


def made(opened: Mapping[str, Source]) -> Guesses:
    """What the open sources guessed. `opened`: as `sources` gives them."""
    return {
        f"{where}.{guess.field}": guess
        for where, source in opened.items()
        for guess in source.guesses()
    }


def lines(where: str, source: Source) -> list[str]:
    """What a source guessed, a line each, and the account of its files if something was left out.

    where: the path of its section.
    """
    said = [f"{path} = {g.value!r}: {g.reason}" for path, g in made({where: source}).items()]
    account = source.account()
    for i, line in enumerate(account.lines() if account else []):
        said.append(line if i else f"{where}: {line}")
    return [readable(line) for line in said]  # names of columns may be anything


class _Saved(TypedDict):
    """A guess as JSON."""

    value: Any
    reason: str


def read(workdir: pathlib.Path) -> Guesses:
    """The guesses of the run in a workdir; none if its file does not exist.

    Raises `ConfigError` for a damaged file.
    """
    file = workdir / FILE
    try:
        saved: dict[str, _Saved] = reading.read_json(file, dict[str, _Saved])
        return {path: Guess(path, one["value"], one["reason"]) for path, one in saved.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise damaged_file(file, error) from None


def dump(guesses: Guesses) -> dict[str, Any]:
    """`guesses` as JSON, in the format that `read` reads."""
    return {
        path: {"value": to_lists(guess.value), "reason": guess.reason}
        for path, guess in guesses.items()
    }


def put(complete: Mapping[str, Any], guesses: Guesses) -> dict[str, Any]:
    """A copy of a complete config with the guessed values at their paths."""
    copy = to_lists(complete)
    for path, guess in guesses.items():
        section, key = _find(copy, path)  # an open `source` may become one with other keys
        section[key] = to_lists(guess.value)
    return copy


def fill(complete: Mapping[str, Any], saved: Guesses) -> dict[str, Any]:
    """A copy of a complete config with the saved values in the settings that it leaves open."""
    return put(complete, {path: g for path, g in saved.items() if _is_open(complete, path)})


def still(saved: Guesses, complete: Mapping[str, Any], before: Mapping[str, Any]) -> Guesses:
    """The guesses of `saved` that hold for a run that goes on: an eval may have changed since.

    complete: the config that the run goes on with. before: the workdir's config.json.
    """
    evals, kept = fill(complete, saved)["evals"], {}
    for path, guess in saved.items():
        name = next((name for name in evals if path.startswith(f"evals.{name}.")), None)
        changed = name is None or evals[name] != before["evals"].get(name)
        if not path.startswith("evals.") or not changed:
            kept[path] = guess
    return kept


def refuse_other(complete: Mapping[str, Any], saved: Guesses, now: Guesses) -> None:
    """Raises `ConfigError` for a setting that the config leaves open, and that is now guessed
    otherwise than before."""
    for path, guess in saved.items():
        if not _is_open(complete, path):
            continue
        other = now.get(path)
        if other is None or to_lists(other.value) != guess.value:
            found = f"{other.value!r}, guessed now: {other.reason}" if other else "no guess now"
            raise ConfigError(
                f"config.{path}",
                found,
                f"{guess.value!r}, guessed when this run started: {guess.reason}",
                f"set config.{path} to {guess.value!r} to go on as before, or use another "
                "--workdir for a new run",
            )


def _is_open(config: Mapping[str, Any], path: str) -> bool:
    """Whether the config has the section on a path, and leaves the setting open there."""
    section, key = _find(config, path)
    return "source" in section and to_lists(section.get(key)) in _OPEN


def _find(config: Mapping[str, Any], path: str) -> tuple[Any, str]:
    """(the innermost section of `config` on a path, the rest of the path). The names of evals and
    of a mixture's parts may have dots."""
    section: Any = config
    while inner := _longest(key for key in section if path.startswith(f"{key}.")):
        if not isinstance(section[inner], Mapping):
            break
        section, path = section[inner], path[len(inner) + 1 :]
    return section, path


def _longest(keys: Iterable[str]) -> str:
    return max(keys, key=len, default="")
