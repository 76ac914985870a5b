"""The keys of a config, with their defaults and what they mean, for `--help`."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from clipx.config import binding, reference
from clipx.data.base import Source
from clipx.data.config import DataConfig
from clipx.data.text.tokenizer_config import TokenizerConfig
from clipx.errors import ConfigError
from clipx.evaluators.base import Evaluator
from clipx.models.base import Tower
from clipx.objectives.base import Objective
from clipx.parallel.mesh import MeshConfig
from clipx.training.optimizer import OptimizerConfig
from clipx.training.schema import Config, EvalConfig, TrainConfig

_PLAIN = {"train": TrainConfig, "optimizer": OptimizerConfig, "tokenizer": TokenizerConfig}
_PLAIN |= {"mesh": MeshConfig}
# sections whose class a key names: its base, its package, and that key
_NAMED: dict[str, tuple[type, str, str]] = {
    "objective": (Objective, "objectives", "name"),
    "image": (Tower, "models", "name"),
    "text": (Tower, "models", "name"),
}


class Key(NamedTuple):
    """One key of a config."""

    path: str
    value: str  # of the config that is shown, else the default; "" for a key that has to be set
    meaning: str  # one sentence


def keys(config: Mapping[str, Any] | None = None, sections: Sequence[str] = ()) -> list[Key]:
    """The keys of a config, section by section.

    config: gives the values, and the classes whose keys are listed; without it a section lists what
    all its classes have. sections: the names of those to list; (): all.
    """
    given = dict(config or {})
    found = []
    if not sections:
        found += _of(Config, "", {k: v for k, v in given.items() if k in ("seed", "init_from")})
        found = [key for key in found if key.path not in {*_PLAIN, *_NAMED, "data", "evals"}]
    for name, section in _sections(given):
        if not sections or name.partition(".")[0] in sections:
            found += section
    return found


def _sections(given: Mapping[str, Any]) -> Iterator[tuple[str, list[Key]]]:
    for name, (base, package, key) in _NAMED.items():
        own = _section(given, name)
        cls = _found(package, own.get(key, ""), base)
        names = ", ".join(_names(package, base))
        named = Key(f"{name}.{key}", str(own.get(key, "")), f"one of {names}")
        yield name, [named, *_of(cls or base, f"{name}.", own, _given(cls or base))]
    data = _section(given, "data")
    source = _found("data.sources", data.get("source", ""), Source)
    own = [key for cls in (DataConfig, source) if cls for key in _of(cls, "data.", data)]
    yield "data", own
    for name, cls in _PLAIN.items():
        yield name, _of(cls, f"{name}.", _section(given, name))
    evals = _section(given, "evals") or {"NAME": {}}
    for name, section in evals.items():
        values = section if isinstance(section, Mapping) else {}
        evaluator = _found("evaluators", values.get("evaluator") or name, Evaluator)
        classes = [EvalConfig, *([evaluator] if evaluator else [])]
        where = f"evals.{name}."
        yield where, [key for cls in classes for key in _of(cls, where, values, _given(cls))]


def _section(given: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = given.get(name)
    return section if isinstance(section, Mapping) else {}


def _found(package: str, name: str, base: type) -> type[Any] | None:
    """The class that a section names; None if it names none, or one that is not there."""
    try:
        return binding.find(package, name, base) if name else None
    except (ConfigError, ImportError):
        return None


def _names(package: str, base: type) -> list[str]:
    """The names of the classes of a package."""
    parent = importlib.import_module(f"clipx.{package}")
    files = sorted(module.name for module in pkgutil.iter_modules(parent.__path__))
    return [name for name in files if _found(package, name, base)]


def _given(cls: type[Any]) -> set[str]:
    """The fields of a class that the run fills, and a config does not set."""
    names = {"image", "text", "locked", "locked_features"} if issubclass(cls, Objective) else set()
    if Evaluator in cls.__mro__:
        names |= {"examples", "train_examples", "pictures"}
    for declared in ("from_tokenizer", "filled"):
        names |= set(getattr(cls, declared, ()) or ())
    return names


def _of(
    cls: type[Any], prefix: str, values: Mapping[str, Any], given: set[str] | None = None
) -> list[Key]:
    """The keys of a class. values: those that the config sets."""
    said = _meanings(cls)
    found = []
    for name, field in binding.fields(cls).items():
        if name in (given or ()) or name.startswith("_"):
            continue
        meaning = re.split(r"\.(?:\s|$)", said.get(name, ""), maxsplit=1)[0]
        value = _spelled(values[name]) if name in values else _default(field)
        found.append(Key(f"{prefix}{name}", value, meaning))
    return found


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return _spelled(field.default)
    factory = field.default_factory
    return "" if factory is dataclasses.MISSING else _spelled(factory())


def _spelled(value: Any) -> str:
    """A value in a few words: sections and long lists are left out."""
    if dataclasses.is_dataclass(value) or isinstance(value, Mapping):
        return "{...}" if value else "{}"
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:36]} ..."


def _meanings(cls: type[Any]) -> dict[str, str]:
    """What the fields of a class mean, those that it inherits included."""
    said: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        module = sys.modules.get(base.__module__)
        if module is None or not base.__module__.startswith("clipx.") or "<" in base.__qualname__:
            continue
        own = reference.meanings(inspect.getsource(module), base.__name__)
        said |= {name: text for name, text in own.items() if text or name not in said}
    return said


def lines(found: Sequence[Key]) -> list[str]:
    """The keys in lines: `--config.<path>=<value>` and its meaning."""
    heads = [f"  --config.{key.path}={key.value}" for key in found]
    width = min(max(map(len, heads), default=0), 56)
    return [f"{head:{width}}  {key.meaning}".rstrip() for head, key in zip(heads, found)]
