"""Config sections bound once, strictly, to frozen dataclasses. Every config error is born here."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import math
import pkgutil
import types
import typing
from collections.abc import Mapping
from typing import Any

from clipx.errors import ConfigError

_MISSING = dataclasses.MISSING


def nearest(name: str, names) -> str:
    """The fix of a misspelt name; "" where none of `names` is like it."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else ""


def fields(cls) -> dict[str, dataclasses.Field]:
    """The keys a config section may set for `cls`, a dataclass or a Linen module."""
    found = {f.name: f for f in dataclasses.fields(cls) if f.init}
    if "parent" in found:  # a Linen module's own two
        del found["parent"], found["name"]
    return found


def plain(value):
    """`value` with ConfigDicts as dicts and lists as tuples."""
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(plain(v) for v in value)
    return value


def _describe(hint) -> str:
    if dataclasses.is_dataclass(hint):
        return "a section with keys " + ", ".join(fields(hint))
    if hint is bool:
        return "true or false"
    simple = isinstance(hint, type) and not typing.get_args(hint)
    return hint.__name__ if simple else str(hint).replace("typing.", "")


def _mend(value, hint, where: str) -> str:
    """How to spell what was probably meant by a value of the wrong type."""
    if hint is int and isinstance(value, float) and value.is_integer():
        return f"{where}={int(value)}"
    if hint is str and isinstance(value, (int, float)):
        return f"""quote it; on a command line, --{where}="'{value}'" """.rstrip()
    return ""


def _convert(value, hint, where):
    """`value` as `hint` wants it: int to float, list to tuple, mapping to dataclass; else error."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    said = "None" if value is None else f"{value!r} ({type(value).__name__})"
    wrong = ConfigError(where, said, _describe(hint), _mend(value, hint, where))
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        errors = []
        for option in args:
            try:
                return _convert(value, option, where)
            except ConfigError as error:
                errors.append(error)
        for error in errors:
            if error.where != where:  # a fault inside says more
                raise error
        wrong.fix = next((error.fix for error in errors if error.fix), "")
        raise wrong
    if origin is typing.Literal:
        if any(value == option and type(value) is type(option) for option in args):
            return value
        fix = (
            nearest(value, [a for a in args if isinstance(a, str)])
            if isinstance(value, str)
            else ""
        )
        raise ConfigError(where, repr(value), "one of " + ", ".join(map(repr, args)), fix)
    if hint in (None, type(None)):
        if value is None:
            return None
        raise wrong
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        if not isinstance(value, Mapping):
            raise wrong
        return bind(hint, value, where=where)
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            raise wrong
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_convert(v, args[0], f"{where}[{i}]") for i, v in enumerate(value))
        if len(args) != len(value):
            raise wrong
        return tuple(_convert(v, a, f"{where}[{i}]") for i, (v, a) in enumerate(zip(value, args)))
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise wrong
        return {k: _convert(v, args[1], f"{where}.{k}") for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and not isinstance(value, hint):
        raise wrong
    if hint is int and isinstance(value, bool):
        raise wrong
    return value


def check(cls, section, *, where: str = "config", given=(), beside=()) -> dict[str, Any]:
    """The typed values of one config section, without building `cls`.

    `cls` is a dataclass or a Linen module; its annotated fields, less those `given`, are the keys.
    Raises `ConfigError` for a key that `cls` does not have (with the nearest name), a value of the
    wrong type, and a field without default that is not there. `beside` are the section's keys that
    someone else has taken out: an unknown key may be one of them misspelt.
    """
    section = plain(section)
    if not isinstance(section, Mapping):
        raise ConfigError(where, repr(section), _describe(cls))
    allowed = {k: f for k, f in fields(cls).items() if k not in given}
    for key in section:
        if key not in allowed:
            known = [*allowed, *beside]
            raise ConfigError(
                f"{where}.{key}",
                f"unknown key {key!r}",
                "one of " + ", ".join(known) if known else "no keys",
                "drop it: other sections say it" if key in given else nearest(str(key), known),
            )
    hints = typing.get_type_hints(cls)
    values = {k: _convert(v, hints.get(k, Any), f"{where}.{k}") for k, v in section.items()}
    for key, field in allowed.items():
        if key not in values and field.default is _MISSING and field.default_factory is _MISSING:
            raise ConfigError(
                f"{where}.{key}", "nothing", _describe(hints.get(key, Any)), f"set {where}.{key}"
            )
    return values


def bind(cls, section, *, where: str = "config", **given):
    """An instance of `cls` from one config section, checked by `check`. `given` holds the fields
    that the caller sets and a config may not. What `cls` itself raises about `<cls>.<field>` is
    told of `<where>.<field>`."""
    values = check(cls, section, where=where, given=given)
    try:
        return cls(**values, **given)
    except ConfigError as error:
        owner, _, field = error.where.partition(".")
        if owner == cls.__name__:
            error.where = f"{where}.{field}"
        raise


def dump(bound, given=()) -> dict[str, Any]:
    """The complete section of a bound object, defaults included, as JSON keeps it."""
    return {k: _leaf(getattr(bound, k)) for k in fields(type(bound)) if k not in given}


def dump_values(cls, values: Mapping[str, Any], given=()) -> dict[str, Any]:
    """The complete section of a class that is not built yet: `values` over its defaults."""
    out = {}
    for key, field in fields(cls).items():
        if key in values:
            out[key] = _leaf(values[key])
        elif key not in given:
            factory = field.default_factory
            out[key] = _leaf(field.default if factory is _MISSING else factory())
    return out


def _leaf(value):
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dump(value)
    if isinstance(value, Mapping):
        return {k: _leaf(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_leaf(v) for v in value]
    return value


def _subclasses(package: str, name: str, base: type) -> list[type]:
    module = importlib.import_module(f"clipx.{package}.{name}")
    return [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and base in value.__mro__[1:]
        and value.__module__ == module.__name__
    ]


def find(package: str, name: str, base: type) -> type:
    """The one subclass of `base` in the file `name` of a folder, such as "data.sources". Files are
    the registry."""
    folder = f"clipx/{package.replace('.', '/')}"
    parent = importlib.import_module(f"clipx.{package}")
    files = sorted(m.name for m in pkgutil.iter_modules(parent.__path__))
    found = _subclasses(package, name, base) if name in files else []
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(
            f"{folder}/{name}.py",
            f"{len(found)} subclasses of {base.__name__}",
            f"exactly one {base.__name__}",
        )
    names = []
    for other in files:
        with contextlib.suppress(ImportError):  # needs a package that is not installed
            names += [other] * (len(_subclasses(package, other, base)) == 1)
    raise ConfigError(
        folder,
        repr(name),
        "one of " + ", ".join(names),
        nearest(str(name), names),
    )


@dataclasses.dataclass(frozen=True)
class Duration:
    """A length of training in exactly one unit. `steps()` needs `rows` when the unit is epochs."""

    unit: str
    amount: float
    where: str

    def steps(self, *, batch_size: int, rows: int | None) -> int | None:
        """Whole steps; None while the unit is epochs and `rows` is not known yet. An epoch is
        rows // batch_size steps: the rows that do not fill a batch wait for another epoch."""
        if self.unit == "steps":
            return int(self.amount)
        if self.unit == "examples":
            if 0 < self.amount < batch_size:
                raise ConfigError(
                    self.where, str(self.amount), f"at least one batch of {batch_size}, or 0"
                )
            return int(self.amount // batch_size)
        if rows is None:
            return None
        if rows < batch_size:
            raise ConfigError(
                self.where,
                f"{rows} rows of data",
                f"at least one batch of {batch_size}",
                "a smaller train.batch_size or more data",
            )
        return int(round(self.amount * (rows // batch_size)))


def duration(values: Mapping[str, Any], name: str, *, where: str, optional: bool = False):
    """The `Duration` among `<name>_steps`, `<name>_epochs`, `<name>_examples` of `values`.

    Raises `ConfigError` unless exactly one is set; with `optional`, None when none is set.
    """
    units = ("steps", "epochs", "examples")
    keys = [f"{name}_{unit}" for unit in units]
    found = {u: values.get(k) for u, k in zip(units, keys) if values.get(k) is not None}
    if optional and not found:
        return None
    if len(found) != 1:
        said = ", ".join(f"{name}_{u}={v}" for u, v in found.items()) or "none of them"
        raise ConfigError(
            f"{where}.{name}_*", said, "exactly one of " + ", ".join(keys), "keep one of them"
        )
    ((unit, amount),) = found.items()
    number = isinstance(amount, (int, float)) and not isinstance(amount, bool)
    if not number or not math.isfinite(amount) or amount < 0:
        raise ConfigError(f"{where}.{name}_{unit}", repr(amount), "a number of at least 0")
    return Duration(unit, amount, f"{where}.{name}_{unit}")


def to_lists(value):
    """`value` with tuples as lists, as JSON keeps them."""
    if isinstance(value, Mapping):
        return {k: to_lists(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_lists(v) for v in value]
    return value


def difference(old: Mapping, new: Mapping, prefix: str = "config") -> list[str]:
    """One line per leaf in which two configs differ: path, old value, new value."""
    lines = []
    for key in sorted({*old, *new}, key=str):
        a, b, where = old.get(key, "(absent)"), new.get(key, "(absent)"), f"{prefix}.{key}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += difference(a, b, where)
        elif _sections(a) and _sections(b) and len(a) == len(b):
            lines += difference(dict(enumerate(a)), dict(enumerate(b)), where)
        elif a != b:
            lines.append(f"{where}: {a!r} -> {b!r}")
    return lines


def _sections(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value)
