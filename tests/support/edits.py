"""Configs edited at random: any key of any section, with any value."""

import copy
import dataclasses
import functools
import math
import typing
from typing import Annotated, Any

import numpy as np

from clipx.config import ranges
from clipx.config.binding import fields, find, types_of
from clipx.data.base import Source
from clipx.data.config import DataConfig
from clipx.errors import ConfigError
from clipx.evaluators.base import Evaluator
from clipx.models.base import Tower
from clipx.objectives.base import Objective
from clipx.training.schema import Config, EvalConfig

INF = float("inf")
JUNK: tuple[Any, ...] = (
    *(None, True, False, "", "x", "auto", "\0", "no/such/file", "ä" * 40, "{}", "1", "nan"),
    *(0, 1, -1, 2, 3, 7, 10**4, 2**31 - 1, 2**31, 2**32, 2**63, 2**64, 10**400, -(10**30)),
    *(0.0, -0.0, 0.5, 1.0, 1.5, -1e-9, 1e-320, 1e30, 1e308, INF, -INF, math.nan),
    *([], [1], [1.0, 0.1], [0, 0, 0], [None], ["x"], [[]], [0.5, 2.0], [INF, 1.0, 1.0]),
    *({}, {"x": 1}, {"name": "x"}, {"source": "x"}, {1: 2}, {"a/b": {}}, {"": {}}),
)
# Tracing takes time in proportion to these: they are bound at any value, and traced at a small one.
DEEP = ("depth", "blocks", "projection_layers")


find = functools.cache(find)


def sections(config: dict[str, Any]) -> list[tuple[tuple, type]]:
    """(path, class) of every section that the config has or could have."""
    found: list[tuple[tuple, type]] = [((), Config), (("data",), DataConfig)]

    def add(path: tuple, package: str, base: type, section: Any, name: Any) -> None:
        if isinstance(section, dict) and isinstance(name, str):
            found.append((path, find(package, name, base)))

    def source(path: tuple, section: Any) -> None:
        if isinstance(section, dict):
            add(path, "data.sources", Source, section, section.get("source"))

    objective, image, text = (config[k] for k in ("objective", "image", "text"))
    add(("objective",), "objectives", Objective, objective, objective["name"])
    add(("image",), "models", Tower, image, image["name"])
    add(("text",), "models", Tower, text, text["name"])
    source(("data",), config["data"])
    for name, section in config.get("evals", {}).items():
        path = ("evals", name)
        found.append((path, EvalConfig))
        add(path, "evaluators", Evaluator, section, section.get("evaluator") or name)
        source((*path, "data"), section.get("data"))
    return found


@functools.cache
def keys(path: tuple, cls: type) -> list[tuple[tuple, Any]]:
    """(path, type) of every key of a section, and of the sections in it."""
    hints, found = types_of(cls), []
    for name in fields(cls):
        found.append(((*path, name), hints[name]))
        for part in (hints[name], *typing.get_args(hints[name])):
            if isinstance(part, type) and dataclasses.is_dataclass(part):
                found += keys((*path, name), part)
    return found


def meant(hint: Any, rng: np.random.Generator) -> Any:
    """A value of the type `hint`, often at an end of its range and sometimes beyond it."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        rule = ranges.rules(hint)[0]
        if isinstance(rule, ranges.Range):
            return number(rule, args[0], rng)
        return meant(args[0], rng)
    if origin is typing.Literal:
        return args[rng.integers(len(args))]
    if origin is tuple:
        count = int(rng.integers(4)) if args[-1] is Ellipsis else len(args)
        return [meant(args[0], rng) for _ in range(count)]
    if args and origin is not dict:
        return meant(args[rng.integers(len(args))], rng)
    if hint is bool:
        return bool(rng.integers(2))
    return JUNK[rng.integers(len(JUNK))]


def number(rule: ranges.Range, kind: type, rng: np.random.Generator) -> Any:
    """A number in or around a range."""
    low, high = rule.least, rule.most
    small = [x for x in (1, 2, 3, 4, 8, 12, 16, 32, 64, 0.01, 0.1, 0.25, 0.5, 0.9) if x in rule]
    ends = [low, high, low - 1, high + 1, low - 1e-6, high * (1 + 1e-9), *rule.also]
    value = [*ends, *small, *small, *small][rng.integers(len(ends) + 3 * len(small))]
    return int(value) if kind is int else float(value)


def edited(config: dict[str, Any], rng: np.random.Generator) -> tuple[dict[str, Any], list[str]]:
    """A copy of the config with one to three edits, and what they are."""
    config, done = copy.deepcopy(config), []
    places = [place for path, cls in sections(config) for place in keys(path, cls)]
    for _ in range(int(rng.choice([1, 1, 1, 2, 3]))):
        path, hint = places[rng.integers(len(places))]
        kind = rng.random()
        value = meant(hint, rng) if kind < 0.65 else JUNK[rng.integers(len(JUNK))]
        if kind > 0.97:  # a misspelt key
            path = (*path[:-1], path[-1] + "s")
        node: Any = config
        for key in path[:-1]:
            below = node.get(key)
            if not isinstance(below, dict):
                below = node[key] = {}
            node = below
        if 0.94 < kind < 0.97:
            node.pop(path[-1], None)
            done.append(f"without {'.'.join(map(str, path))}")
        else:
            node[path[-1]] = copy.deepcopy(value)
            done.append(f"{'.'.join(map(str, path))}={str(value)[:60] if kind else value}")
    return config, done


def shallow(config: dict[str, Any]) -> dict[str, Any]:
    """The config with few layers, so that it is traced fast."""
    for section in ("image", "text", "objective"):
        for key in DEEP:
            value = config[section].get(key)
            if isinstance(value, int) and value > 2:
                config[section][key] = 2
            elif isinstance(value, (list, tuple)):
                config[section][key] = [min(v, 2) for v in value]
    return config


def is_dull(edit: str) -> bool:
    """Whether an edit changes nothing that is traced."""
    path = edit.removeprefix("without ")
    return path.startswith(("data.", "evals", "train.log", "train.save", "train.keep", "train.max"))


def one_block(error: ConfigError) -> bool:
    """Whether the error is a block of a place, what was found and what is expected there."""
    lines = str(error).splitlines()
    heads = [line[:12].strip() for line in lines[1:]]
    return (
        lines[0] == f"config error at {error.where}"
        and error.where.startswith("config")
        and heads[:2] == ["found:", "expected:"]
        and len(lines) <= 4
        and all(line[12:].strip() for line in lines[1:])
    )
