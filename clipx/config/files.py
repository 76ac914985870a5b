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

from clipx import configs
from clipx.config.binding import nearest, plain, to_lists
from clipx.errors import ConfigError


def variants(name: str | os.PathLike) -> tuple[str, ...]:
    """The variants of a config, "" for one without any. `name` as `find` takes it."""
    return tuple(getattr(_module(find(name)), "VARIANTS", ("",)))


def shipped() -> list[str]:
    """The names of the configs that come with clipx."""
    files = configs.FOLDER.glob("*.py")
    return sorted(f.stem for f in files if "\ndef get_config(" in f.read_text(encoding="utf-8"))


def find(name: str | os.PathLike) -> pathlib.Path:
    """The file of a config. `name` is a path if it ends in .py or has a slash, and else the name of
    a config that comes with clipx."""
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
    found = "{!r}, which is no .py file" if file.is_file() else "no file {!r}"
    raise ConfigError("--config", found.format(text), "a Python file with get_config()", fix)


def _module(file: pathlib.Path) -> types.ModuleType:
    """A config file's code, run."""
    module = _execute(file)
    if not callable(getattr(module, "get_config", None)):
        raise ConfigError("--config", "no get_config", "def get_config(variant='')", file=str(file))
    return module


def load(spec: str) -> dict[str, Any]:
    """The plain dict that `get_config` of a config returns. `spec` is `NAME` or `NAME:variant`,
    with a NAME that `find` takes."""
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
    with _told(file):
        config = module.get_config(variant)
    config = to_lists(plain(config))
    if not isinstance(config, dict):
        found = f"get_config returns {config!r}"
        raise ConfigError("--config", found, "a ConfigDict or a dict", file=str(file))
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
    """The module of a config file, which may import its neighbours, and `clipx.configs`. What it
    imports of these is imported anew for the next config, as that may change shared values."""
    spec = importlib.util.spec_from_file_location(f"clipx_config_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    before, folder = set(sys.modules), file.parent.absolute()
    sys.path.insert(0, str(folder))
    try:
        with _told(file):
            spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            package, _, last = name.rpartition(".")
            if package == configs.__name__:
                delattr(configs, last)
            elif getattr(sys.modules[name], "__file__", None) != str(folder / f"{name}.py"):
                continue
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
