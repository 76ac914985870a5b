"""Class names and templates of zero-shot data sets: reads them and checks them.

The lists of known sets are OpenAI's (github.com/openai/CLIP). ImageNet's are read from an installed
open_clip, the others from a copy of OpenAI's data/prompts.md. All are checked by their counts and
hashes, which are those of ProtoCLIP's ten sets (its zero_shot.py).
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
from clipx.evaluators.lists import entries, text_of

# Names of lists in a config, and their names in open_clip.
_OPEN_CLIP = {
    "classes": {"openai_imagenet": "IMAGENET_CLASSNAMES"},
    "templates": {
        "openai_imagenet": "OPENAI_IMAGENET_TEMPLATES",
        "simple": "SIMPLE_IMAGENET_TEMPLATES",
    },
}
_SOURCE = "github.com/openai/CLIP/blob/main/data/prompts.md"


class Known(NamedTuple):
    """Of each list: its count, and the first digits of the SHA-1 of its newline-joined entries."""

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


def check(preset: str, kind: str, listed: tuple[str, ...], where: str) -> None:
    """Raises `ConfigError` unless `listed` are the `classes` or `templates` of a known set."""
    count, expected = getattr(SETS[preset], kind)
    digest = hashlib.sha1("\n".join(listed).encode()).hexdigest()[:12]
    if (len(listed), digest) != (count, expected):
        raise ConfigError(
            f"{where}.{kind}",
            f"{len(listed)} {kind}, SHA-1 {digest}",
            f"the {count} of {preset}, SHA-1 {expected}",
            f"leave {kind} out to use open_clip's"
            if preset == "imagenet"
            else f"set lists to a copy of {_SOURCE}, or leave preset out",
        )


def published(preset: str, kind: str, lists: str, where: str) -> tuple[str, ...]:
    """The `classes` or `templates` of a known set. ImageNet's come from an installed open_clip, the
    others from `lists`, a copy of OpenAI's data/prompts.md. () if neither has them."""
    if preset == "imagenet":
        return names("openai_imagenet", kind, where)
    if not lists:
        return ()
    if (preset, kind) == ("birdsnap", "classes"):  # ProtoCLIP's own selection, not in prompts.md
        return ()
    return tuple(_section(lists, preset, f"{where}.lists")[kind])


def _section(path: str, preset: str, where: str) -> dict[str, list[str]]:
    """Both lists of a set in prompts.md. The file has a heading for each set, and below it the
    lists as Python code in a fence."""
    wanted = f"OpenAI's prompts.md ({_SOURCE})"
    text = text_of(path, where, wanted)
    for heading, code in re.findall(r"^## *(\S+)\s*^```\w*$(.*?)^```", text, re.M | re.S):
        if heading.lower() == preset.replace("_", ""):
            try:
                body = ast.parse(code).body
                lists = {line.targets[0].id: ast.literal_eval(line.value) for line in body}
                return {kind: lists[kind] for kind in ("classes", "templates")}
            except (SyntaxError, ValueError, AttributeError, KeyError):
                raise ConfigError(
                    where, f"{path!r} without two lists under {heading!r}", wanted
                ) from None
    raise ConfigError(where, f"{path!r} without a section of {preset}", wanted)


def names(value: tuple[str, ...] | str, kind: str, where: str) -> tuple[str, ...]:
    """The `classes` or `templates` that `value` stands for: the tuple itself, a list of open_clip's
    by name, or the entries of a text or JSON file. Templates have {} where the class name goes."""
    where, known = f"{where}.{kind}", _OPEN_CLIP[kind]
    if not isinstance(value, str):
        listed = tuple(value)
    elif value in known:
        listed = _from_open_clip(where, known[value])
    else:
        wanted = "a list, a file of one entry a line or of a JSON list, or one of "
        listed = entries(value, where, wanted + ", ".join(known))
    return tuple(map(braces, listed)) if kind == "templates" else listed


def braces(template: str) -> str:
    """A template with {} where the class name goes; CLIP_benchmark writes {c}."""
    return template.replace("{c}", "{}")


def _from_open_clip(where: str, name: str) -> tuple[str, ...]:
    # This runs only the file that holds the lists: importing open_clip would import torch.
    package = importlib.util.find_spec("open_clip")
    folders = (package and package.submodule_search_locations) or ()
    files = [pathlib.Path(folder, "zero_shot_metadata.py") for folder in folders]
    metadata = next((file for file in files if file.is_file()), None)
    if metadata is None:
        raise ConfigError(
            where,
            "no open_clip in this environment",
            "the package that carries OpenAI's ImageNet names and templates",
            f"pip install open_clip_torch, or {install_hint('interop')}",
        )
    listed = runpy.run_path(str(metadata))[name]
    return tuple(entry if isinstance(entry, str) else entry("{}") for entry in listed)
