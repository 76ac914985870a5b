"""Loads config files, which are Python, and applies the overrides of a command line."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import os
import pathlib
import sys
import traceback
import types
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from clipx import configs
from clipx.config import durations
from clipx.config.binding import plain, to_lists
from clipx.config.unknown import nearest
from clipx.errors import ConfigError


def variants(name: str | os.PathLike) -> tuple[str, ...]:
    """The names in `VARIANTS` of a config; ("",) for one without variants. `name` as for `find`."""
    return tuple(getattr(_module(find(name)), "VARIANTS", ("",)))


def declared(name: str | os.PathLike, what: str) -> Any:
    """What a config declares beside its values, such as `SEARCH`, as JSON has it; None if it does
    not. `name` as for `find`."""
    return to_lists(plain(getattr(_module(find(name)), what, None)))


def shipped() -> list[str]:
    """The names of the configs that come with clipx."""
    files = configs.FOLDER.glob("*.py")
    return sorted(f.stem for f in files if "\ndef get_config(" in f.read_text(encoding="utf-8"))


def find(name: str | os.PathLike) -> pathlib.Path:
    """The file of a config. `name` is a path if it ends in .py or has a slash, and else the name of
    a config that comes with clipx. Raises `ConfigError` with the nearest names for an unknown one.
    """
    text, file = os.fspath(name), pathlib.Path(name)
    if file.suffix != ".py" and file.name == text:
        if text in shipped():
            return configs.FOLDER / f"{text}.py"
        near = [*shipped(), *(path.name for path in pathlib.Path().glob("*.py"))]
        expected = f"a file, path.py, or one of {', '.join(shipped())}"
        raise ConfigError("--config", f"no config named {text!r}", expected, nearest(text, near))
    if file.is_file() and file.suffix == ".py":
        return file
    near = sorted(str(p) for p in file.parent.glob("*.py")) if file.parent.is_dir() else []
    fix = nearest(str(file), near)
    if not fix and file.stem in shipped():  # such as configs/clip.py, from another folder
        fix = f"did you mean {file.stem!r}, which comes with clipx?"
    kind = "{!r}, which is no .py file" if file.is_file() else "no file {!r}"
    raise ConfigError("--config", kind.format(text), "a Python file with get_config()", fix)


def _module(file: pathlib.Path) -> types.ModuleType:
    """The module of a config file, executed and checked for a `get_config`."""
    module = _execute(file)
    if not callable(getattr(module, "get_config", None)):
        expected = "a function get_config(variant='')"
        raise ConfigError("--config", "no get_config", expected, file=str(file))
    return module


def load(spec: str, objective: str | None = None) -> dict[str, Any]:
    """The config that `spec` names, `NAME` or `NAME:variant`, as a plain dict. NAME is as for
    `find`.

    objective: the objective to train with; None for the config's own. A config may have a section
    `methods`, which maps names of objectives to the values that differ for them. Those of the
    objective are put in place, and the section is taken out.

    Raises `ConfigError` for a file that cannot be read or run, and for an unknown variant.
    """
    name, _, variant = spec.partition(":")
    file = find(name)
    module = _module(file)
    variants = getattr(module, "VARIANTS", ("",))
    if variant not in variants:
        raise ConfigError(
            "--config",
            f"variant {variant!r}",
            "one of " + ", ".join(map(repr, variants)),
            nearest(variant, variants),
            file=str(file),
        )
    with _code_errors(file):
        config = module.get_config(variant)
    config = to_lists(plain(config))
    if not isinstance(config, dict):
        found = f"get_config returns {config!r}"
        expected = "a ConfigDict or a dict from get_config"
        raise ConfigError("--config", found, expected, file=str(file))
    methods = config.pop("methods", None)
    if methods is None:
        return config
    chosen = objective or config["objective"]["name"]
    return _merged(_merged(config, {"objective": {"name": chosen}}), methods.get(chosen, {}))


def _merged(base: Any, changes: Any) -> Any:
    """`base` with the values of `changes` in place of its own, section by section."""
    if not (isinstance(base, dict) and isinstance(changes, dict)):
        return changes
    return {**base, **{key: _merged(base.get(key), value) for key, value in changes.items()}}


@contextlib.contextmanager
def _code_errors(file: pathlib.Path) -> Iterator[None]:
    """Turns an exception of a config file's code into a `ConfigError` that names the line."""
    try:
        yield
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f.lineno for f in frames if f.filename == str(file.absolute())]
        where = f"{file}:{lines[-1]}" if lines else str(file)
        found = f"{type(error).__name__}: {error}"
        raise ConfigError("--config", found, "Python code that runs", file=where) from None


def _execute(file: pathlib.Path) -> types.ModuleType:
    """The module of a config file. The file may import other files of its folder, and
    `clipx.configs`. What it imports of these is imported anew for the next config, because a config
    may change shared values."""
    spec = importlib.util.spec_from_file_location(f"clipx_config_{file.stem}", file)
    assert spec and spec.loader  # the file ends in .py
    module = importlib.util.module_from_spec(spec)
    kept = _without_configs()  # what a notebook or a test has imported stays as it is
    before, folder = set(sys.modules), file.parent.absolute()
    sys.path.insert(0, str(folder))
    try:
        with _code_errors(file):
            spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
        _without_configs()
        for name in set(sys.modules) - before:
            if getattr(sys.modules[name], "__file__", None) == str(folder / f"{name}.py"):
                del sys.modules[name]
        for name, other in kept.items():
            sys.modules[name] = other
            setattr(configs, name.rpartition(".")[2], other)
    return module


def _without_configs() -> dict[str, types.ModuleType]:
    """Forgets the imported modules of `clipx.configs`, and returns them by name."""
    names = [name for name in sys.modules if name.startswith(f"{configs.__name__}.")]
    for name in names:
        delattr(configs, name.rpartition(".")[2])
    return {name: sys.modules.pop(name) for name in names}


def override_all(config: dict[str, Any], overrides: Sequence[tuple[str, str]]) -> None:
    """Applies overrides, pairs of a path and a text as for `override`. One that sets a length, such
    as train.total_steps, clears what the config has of it in other units."""
    for path, text in overrides:
        section = config.get(path.partition(".")[0])
        if parse(text) is None or not isinstance(section, dict):
            continue
        for other in durations.others(path):
            if (key := other.partition(".")[2]) in section:
                section[key] = None
    for path, text in overrides:
        override(config, path, text)


def override(config: dict[str, Any], path: str, text: str) -> None:
    """Sets `config.<path>` to the value that `text` spells.

    The type is checked later, when the section is bound. So an override may set a field that the
    config file leaves out.
    """
    *parents, last = path.split(".")
    node = config
    for depth, key in enumerate(parents):
        node = node.setdefault(key, {})
        if not isinstance(node, dict):
            at = ".".join(["config", *parents[: depth + 1]])
            fix = f"--config.{path} sets a key of {at}, which must be a section"
            raise ConfigError(at, repr(node), "a section", fix)
    node[last] = parse(text)


def parse(text: str) -> Any:
    """The value that a command line's `text` spells: true, false, a Python literal that JSON can
    hold, or else the text itself."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        with warnings.catch_warnings():  # Python warns about text such as 1or2
            warnings.simplefilter("ignore")
            value = to_lists(ast.literal_eval(text))
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text
    return (
        value if value is None or isinstance(value, (bool, int, float, str, list, dict)) else text
    )
