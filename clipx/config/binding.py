"""Binds config sections, once and strictly, to frozen dataclasses; finds classes by file name.

A number's range is declared in the type of its field, as `ranges` describes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import pkgutil
import types
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Annotated, Any, TypeVar

from clipx.config import ranges, unknown
from clipx.config.unknown import nearest
from clipx.errors import ConfigError, UnknownKeys

_MISSING = dataclasses.MISSING
_UNIONS = (types.UnionType, typing.Union)
T = TypeVar("T")


def fields(cls: type[Any]) -> dict[str, dataclasses.Field[Any]]:
    """The keys that a config section may set for `cls`, a dataclass or a Linen module."""
    keys = {f.name: f for f in dataclasses.fields(cls) if f.init}
    if "parent" in keys:  # Linen adds these two to every module
        del keys["parent"], keys["name"]
    return keys


@functools.cache
def types_of(cls: type[Any]) -> dict[str, Any]:
    """The type of each field of `cls`, with its range."""
    return typing.get_type_hints(cls, include_extras=True)


def plain(value: Any) -> Any:
    """`value` with ConfigDicts as dicts, and lists as tuples."""
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(plain(v) for v in value)
    return value


class _OutOfRange(ConfigError):
    """A value of the right type outside the range of its field."""


def _describe(hint: Any) -> str:
    """What a value of type `hint` looks like, for an error message."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return "a section with keys " + ", ".join(fields(hint))
    return "true or false" if hint is bool else _spelled(hint)


def _spelled(hint: Any) -> str:
    """The type `hint` as Python spells it, without ranges."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _spelled(args[0])
    if origin in _UNIONS:
        return " | ".join(map(_spelled, args))
    if origin in (tuple, dict):
        inner = ("..." if arg is Ellipsis else _spelled(arg) for arg in args)
        return f"{origin.__name__}[{', '.join(inner)}]"
    if hint is type(None):
        return "None"
    simple = isinstance(hint, type) and not args
    return hint.__name__ if simple else str(hint).replace("typing.", "")


def _shown(value: Any) -> str:
    """`value` as it is printed, except for numbers of more digits than anybody reads."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    return repr(value)


def _respelled(value: Any, hint: Any, where: str) -> str:
    """A fix for a value of the wrong type that was probably meant as `hint`; "" if none is."""
    if hint is int and isinstance(value, float) and value.is_integer():
        return f"{where}={int(value)}"
    if hint is str and isinstance(value, (int, float)):
        return f"""quote it; on a command line, --{where}="'{value}'" """.rstrip()
    return ""


def _convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as type `hint`: an int becomes a float, a list a tuple, a mapping a dataclass.

    Raises `ConfigError` for any other value that is not of the type, or not in its range.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _in_range(_convert(value, args[0], where), hint, where)
    if hint is Any:
        return value
    if origin in _UNIONS:
        return _any_of(value, hint, where)
    if origin is typing.Literal:
        return _one_of(value, args, where)
    if hint in (None, type(None)):
        if value is None:
            return None
        raise _wrong(value, hint, where)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if isinstance(value, hint):  # a config file may build it
            check(hint, {name: getattr(value, name) for name in fields(hint)}, where=where)
            return value
        if not isinstance(value, Mapping):
            raise _wrong(value, hint, where)
        return bind(hint, value, where=where)
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            raise _wrong(value, hint, where)
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_convert(v, args[0], f"{where}[{i}]") for i, v in enumerate(value))
        if len(args) != len(value):
            raise _wrong(value, hint, where)
        return tuple(_convert(v, a, f"{where}[{i}]") for i, (v, a) in enumerate(zip(value, args)))
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise _wrong(value, hint, where)
        return {k: _convert(v, args[1], f"{where}.{k}") for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise _wrong(value, hint, where) from None
    if isinstance(hint, type) and not isinstance(value, hint):
        raise _wrong(value, hint, where)
    if isinstance(value, str) and "\0" in value:  # no path, name or text has one
        raise ConfigError(where, repr(value), "a text without null characters")
    if hint is int and isinstance(value, bool):
        raise _wrong(value, hint, where)
    return value


def _wrong(value: Any, hint: Any, where: str) -> ConfigError:
    """The error about a value that is not of type `hint`."""
    shown = "None" if value is None else f"{_shown(value)} ({type(value).__name__})"
    return ConfigError(where, shown, _describe(hint), _respelled(value, hint, where))


def _any_of(value: Any, hint: Any, where: str) -> Any:
    """`value` as the first of the types of the union `hint` that it has. Raises `ConfigError` if it
    has none."""
    errors = []
    for option in typing.get_args(hint):
        try:
            return _convert(value, option, where)
        except ConfigError as error:
            errors.append(error)
    for error in errors:
        if error.where != where or isinstance(error, _OutOfRange):  # they say more
            raise error
    wrong = _wrong(value, hint, where)
    wrong.fix = next((error.fix for error in errors if error.fix), "")
    raise wrong


def _one_of(value: Any, options: Sequence[Any], where: str) -> Any:
    """`value`. Raises `ConfigError` if it is not one of the values `options`."""
    if any(value == option and type(value) is type(option) for option in options):
        return value
    names = [option for option in options if isinstance(option, str)]
    fix = nearest(value, names) if isinstance(value, str) else ""
    raise ConfigError(where, repr(value), "one of " + ", ".join(map(repr, options)), fix)


def _in_range(value: Any, hint: Any, where: str) -> Any:
    """`value`. Raises `ConfigError` if it is not in the ranges of the `Annotated` type `hint`."""
    for rule in ranges.rules(hint):
        if expected := rule.refuses(value):
            raise _OutOfRange(where, _shown(value), expected)
    return value


def check(
    cls: type[Any],
    section: Any,
    *,
    where: str = "config",
    given: Collection[str] = (),
    beside: Iterable[str] = (),
) -> dict[str, Any]:
    """The typed values of one config section. Does not build `cls`.

    cls: a dataclass or a Linen module, whose annotated fields are the keys. where: the section's
    path, for messages. given: fields that the caller sets and a config may not. beside: keys of the
    section that the caller has taken out before; an unknown key may be one of them, misspelt.
    Raises `UnknownKeys` for keys that do not exist (with the nearest names), and `ConfigError` for
    a value of the wrong type or outside its range, and a missing key without a default.
    """
    section = plain(section)
    if not isinstance(section, Mapping):
        raise ConfigError(where, repr(section), _describe(cls))
    allowed = {k: f for k, f in fields(cls).items() if k not in given}
    if strange := [key for key in section if key not in allowed]:
        known = [*allowed, *beside]
        raise UnknownKeys([unknown.error(str(key), where, known, key in given) for key in strange])
    hints = types_of(cls)
    values = {k: _convert(v, hints.get(k, Any), f"{where}.{k}") for k, v in section.items()}
    for key, field in allowed.items():
        if key not in values and field.default is _MISSING and field.default_factory is _MISSING:
            raise ConfigError(
                f"{where}.{key}", "nothing", _describe(hints.get(key, Any)), f"set {where}.{key}"
            )
    return values


def bind(cls: type[T], section: Any, *, where: str = "config", **given: Any) -> T:
    """An instance of `cls` from one config section, checked by `check`.

    given: values of the fields that the caller sets and a config may not. A `ConfigError` that
    `cls` raises about `<cls>.<field>` is raised about `<where>.<field>`.
    """
    values = check(cls, section, where=where, given=given)
    try:
        return cls(**values, **given)
    except ConfigError as error:
        owner, _, field = error.where.partition(".")
        if owner == cls.__name__:
            error.where = f"{where}.{field}"
        raise


def dump(bound: Any, given: Collection[str] = ()) -> dict[str, Any]:
    """The complete section of a bound object as JSON holds it: defaults included, `given` not."""
    return {k: _leaf(getattr(bound, k)) for k in fields(type(bound)) if k not in given}


def dump_values(
    cls: type[Any], values: Mapping[str, Any], given: Collection[str] = ()
) -> dict[str, Any]:
    """The complete section of a class that is not built yet: `values` over its defaults, without
    the keys of `given` that have no value."""
    out = {}
    for key, field in fields(cls).items():
        if key in values:
            out[key] = _leaf(values[key])
        elif key not in given:
            factory = field.default_factory
            out[key] = _leaf(field.default if factory is _MISSING else factory())
    return out


def _leaf(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dump(value)
    if isinstance(value, Mapping):
        return {k: _leaf(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_leaf(v) for v in value]
    return value


def _subclasses(package: str, name: str, base: type) -> list[type[Any]]:
    """The subclasses of `base` that the file defines itself."""
    module = importlib.import_module(f"clipx.{package}.{name}")
    return [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and base in value.__mro__[1:]
        and value.__module__ == module.__name__
    ]


@functools.cache
def _files(folders: tuple[str, ...]) -> list[str]:
    """The names of the modules in `folders`, in order."""
    return sorted(module.name for module in pkgutil.iter_modules(folders))


def find(package: str, name: str, base: type) -> type[Any]:
    """The only subclass of `base` in the file `name` of a package, such as "data.sources".

    The files of the package are the registry. Raises `ConfigError` for any other name.
    """
    folder = f"clipx/{package.replace('.', '/')}"
    parent = importlib.import_module(f"clipx.{package}")
    files = _files(tuple(parent.__path__))
    classes = _subclasses(package, name, base) if name in files else []
    if len(classes) == 1:
        return classes[0]
    if classes:
        raise ConfigError(
            f"{folder}/{name}.py",
            f"{len(classes)} subclasses of {base.__name__}",
            f"exactly one {base.__name__}",
        )
    names = []
    for other in files:
        with contextlib.suppress(ImportError):  # the file needs a package that is not installed
            names += [other] * (len(_subclasses(package, other, base)) == 1)
    raise ConfigError(folder, repr(name), "one of " + ", ".join(names), nearest(str(name), names))


def to_lists(value: Any) -> Any:
    """`value` with tuples as lists, as JSON holds them."""
    if isinstance(value, Mapping):
        return {k: to_lists(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_lists(v) for v in value]
    return value


def difference(old: Mapping, new: Mapping, prefix: str = "config") -> list[str]:
    """One line for each leaf in which two configs differ: "path: old value -> new value"."""
    lines = []
    for key in sorted({*old, *new}, key=str):
        a, b, where = old.get(key, "(absent)"), new.get(key, "(absent)"), f"{prefix}.{key}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += difference(a, b, where)
        elif _has_sections(a) and _has_sections(b) and len(a) == len(b):
            lines += difference(dict(enumerate(a)), dict(enumerate(b)), where)
        elif a != b:
            lines.append(f"{where}: {a!r} -> {b!r}")
    return lines


def _has_sections(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value)
