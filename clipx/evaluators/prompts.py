"""Class names and templates of known zero-shot sets: where they are read, and which they are.

The lists are OpenAI's (github.com/openai/CLIP). None is kept here: ImageNet's are read from an
installed open_clip, the others from a copy of OpenAI's data/prompts.md, and all are known by their
counts and hashes, which are those of ProtoCLIP's ten sets (its zero_shot.py).
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import pathlib
import re
import runpy
from typing import NamedTuple

from clipx.errors import ConfigError, install_hint

# Lists that are asked for by name, and what open_clip calls them.
_OPEN_CLIP = {
    "classes": {"openai_imagenet": "IMAGENET_CLASSNAMES"},
    "templates": {
        "openai_imagenet": "OPENAI_IMAGENET_TEMPLATES",
        "simple": "SIMPLE_IMAGENET_TEMPLATES",
    },
}
_SOURCE = "github.com/openai/CLIP/blob/main/data/prompts.md"


class Known(NamedTuple):
    """Counts, and how the SHA-1 of the entries, joined by newlines, begins."""

    classes: tuple[int, str]
    templates: tuple[int, str]


_CIFAR = (18, "a284b446d3a9")
SETS = {
    "imagenet": Known((1000, "b0592a5053f0"), (80, "ac25554d7f83")),
    "cifar10": Known((10, "9e5321bb62ab"), _CIFAR),
    "cifar100": Known((100, "edd79994ea09"), _CIFAR),
    "stl10": Known((10, "fc8ba087863e"), (2, "7c8940d05663")),
    "birdsnap": Known((491, "2202fbe22a3f"), (1, "ba34502d990d")),
    "country211": Known((211, "34feabe9abb2"), (5, "5aa9c2eb1690")),
    "flowers102": Known((102, "323fb2d3541b"), (1, "d8fa805e7451")),
    "gtsrb": Known((43, "d666b0f9c777"), (3, "21b897736e5a")),
    "ucf101": Known((101, "4ca7460aaeec"), (48, "10fef0d2a36c")),
    "stanford_cars": Known((196, "9f62194b3541"), (8, "cd8fdd6ac5dd")),
}


def check(preset: str, kind: str, entries: tuple[str, ...], where: str) -> None:
    """Raises `ConfigError` unless `entries` are the `classes` or `templates` of a known set."""
    count, digest = getattr(SETS[preset], kind)
    found = hashlib.sha1("\n".join(entries).encode()).hexdigest()[:12]
    if (len(entries), found) != (count, digest):
        raise ConfigError(
            f"{where}.{kind}",
            f"{len(entries)} {kind}, SHA-1 {found}",
            f"the {count} of {preset}, SHA-1 {digest}",
            "leave them out, and open_clip's are taken"
            if preset == "imagenet"
            else f"set lists to a copy of {_SOURCE}, or leave preset out",
        )


def published(preset: str, kind: str, lists: str, where: str) -> tuple[str, ...]:
    """The `classes` or `templates` of a known set: ImageNet's from an installed open_clip, others'
    from `lists`, a copy of OpenAI's data/prompts.md; () where there is none."""
    if preset == "imagenet":
        return names("openai_imagenet", kind, where)
    if not lists:
        return ()
    if (preset, kind) == ("birdsnap", "classes"):  # ProtoCLIP's own selection
        return ()
    return tuple(_section(lists, preset, f"{where}.lists")[kind])


def _section(path: str, preset: str, where: str) -> dict[str, list[str]]:
    """Both lists of a set in prompts.md, which has a heading for each set and its lists as Python
    in a fence below it."""
    wanted = f"OpenAI's prompts.md ({_SOURCE})"
    text = _text(path, where, wanted)
    for heading, code in re.findall(r"^## *(\S+)\s*^```\w*$(.*?)^```", text, re.M | re.S):
        if heading.lower() == preset.replace("_", ""):
            try:
                body = ast.parse(code).body
                found = {line.targets[0].id: ast.literal_eval(line.value) for line in body}
                return {kind: found[kind] for kind in ("classes", "templates")}
            except (SyntaxError, ValueError, AttributeError, KeyError):
                raise ConfigError(
                    where, f"{path!r} without two lists under {heading!r}", wanted
                ) from None
    raise ConfigError(where, f"{path!r} without a section of {preset}", wanted)


def names(value: tuple[str, ...] | str, kind: str, where: str) -> tuple[str, ...]:
    """The `classes` or `templates` that `value` is or names: itself, a known list of open_clip's,
    or a file's lines."""
    if not isinstance(value, str):
        return tuple(value)
    where, known = f"{where}.{kind}", _OPEN_CLIP[kind]
    if value in known:
        return _from_open_clip(where, known[value])
    wanted = "a list, a text file with one entry a line, or one of " + ", ".join(known)
    lines = (line.strip() for line in _text(value, where, wanted).splitlines())
    entries = tuple(filter(None, lines))
    if not entries:
        raise ConfigError(where, f"no line in {value!r}", "one entry a line")
    return entries


def _text(path: str, where: str, wanted: str) -> str:
    try:
        return pathlib.Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(where, f"{path!r} ({reason})", wanted) from None


def _from_open_clip(where: str, name: str) -> tuple[str, ...]:
    # Its one file of plain lists is run by itself: importing the package would import torch.
    package = importlib.util.find_spec("open_clip")
    folders = package.submodule_search_locations if package else ()
    files = [pathlib.Path(folder, "zero_shot_metadata.py") for folder in folders]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise ConfigError(
            where,
            "no open_clip in this environment",
            "the package that carries OpenAI's ImageNet names and templates",
            f"pip install open_clip_torch, or {install_hint('interop')}",
        )
    entries = runpy.run_path(str(found))[name]
    return tuple(entry if isinstance(entry, str) else entry("{}") for entry in entries)
