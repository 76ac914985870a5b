"""A config's values: what the code of its file returns, and what a command line says instead."""

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
from typing import Any

from clipx.config.binding import nearest, plain, to_lists
from clipx.errors import ConfigError


def variants(path: str | os.PathLike) -> tuple[str, ...]:
    """The variants of a config file, "" for one without any."""
    return tuple(getattr(_module(path), "VARIANTS", ("",)))


def _module(path: str | os.PathLike) -> types.ModuleType:
    """A config file's code, run."""
    file = pathlib.Path(path)
    if not file.is_file() or file.suffix != ".py":
        near = sorted(str(p) for p in file.parent.glob("*.py")) if file.parent.is_dir() else []
        kind = "{!r}, which is no .py file" if file.is_file() else "no file {!r}"
        found = kind.format(str(path))
        raise ConfigError(
            "--config", found, "a Python file with get_config()", nearest(str(file), near)
        )
    module = _execute(file)
    if not callable(getattr(module, "get_config", None)):
        raise ConfigError("--config", "no get_config", "def get_config(variant='')", file=str(file))
    return module


def load(spec: str) -> dict[str, Any]:
    """The plain dict that `get_config` of a config file returns. `spec` is `path.py` or
    `path.py:variant`."""
    path, _, variant = spec.partition(":")
    module = _module(path)
    variants = getattr(module, "VARIANTS", ("",))
    if variant not in variants:
        raise ConfigError(
            "--config",
            f"variant {variant!r}",
            "one of " + ", ".join(map(repr, variants)),
            nearest(variant, variants),
            file=path,
        )
    with _told(pathlib.Path(path)):
        config = module.get_config(variant)
    config = to_lists(plain(config))
    if not isinstance(config, dict):
        found = f"get_config returns {config!r}"
        raise ConfigError("--config", found, "a ConfigDict or a dict", file=path)
    return config


@contextlib.contextmanager
def _told(file: pathlib.Path):
    """What the code of a config file raises becomes a `ConfigError` with its line."""
    try:
        yield
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f.lineno for f in frames if f.filename == str(file.absolute())]
        where = f"{file}:{lines[-1]}" if lines else str(file)
        found = f"{type(error).__name__}: {error}"
        raise ConfigError("--config", found, "Python that runs", file=where) from None


def _execute(file: pathlib.Path) -> types.ModuleType:
    """The module of a config file, which may import its neighbours."""
    spec = importlib.util.spec_from_file_location(f"clipx_config_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    before, folder = set(sys.modules), file.parent.absolute()
    sys.path.insert(0, str(folder))
    try:
        with _told(file):
            spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:  # the next config may have another neighbour
            if getattr(sys.modules[name], "__file__", None) == str(folder / f"{name}.py"):
                del sys.modules[name]
    return module


def override(config: dict[str, Any], path: str, text: str) -> None:
    """Sets `config.<path>` to the value that `text` spells. The type is checked when the section
    is bound, so a field may be set that the file leaves at its default, None included."""
    *parents, last = path.split(".")
    node = config
    for depth, key in enumerate(parents):
        node = node.setdefault(key, {})
        if not isinstance(node, dict):
            at = ".".join(["config", *parents[: depth + 1]])
            raise ConfigError(at, repr(node), "a section", f"--config.{path} needs one")
    node[last] = parse(text)


def parse(text: str) -> Any:
    """The value that a command line's `text` spells: a Python literal that JSON could hold,
    true/false, or the text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        with warnings.catch_warnings():  # such as that of 1or2, which is a name here
            warnings.simplefilter("ignore")
            value = to_lists(ast.literal_eval(text))
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text
    return (
        value if value is None or isinstance(value, (bool, int, float, str, list, dict)) else text
    )
