"""Towers that start from encoders which others trained: `config.image.init_from` and
`config.text.init_from`."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from clipx.config import binding
from clipx.data.base import expand_user
from clipx.data.text import tokenizers
from clipx.data.text.tokenizers import Tokenizer, TokenizerConfig
from clipx.errors import ConfigError, DataError
from clipx.models.base import Tower
from clipx.objectives.base import Objective
from clipx.training.schema import Config
from clipx.types import PyTree

if TYPE_CHECKING:  # clipx.interop imports every tower: only runs that read files load it
    from clipx.interop.encoders.base import Encoder

AUTO = "auto"
_MARKS = ("pad_id", "sot_id", "eot_id", "mask_id")


def describe(side: str, path: str) -> Encoder:
    """The encoder at `path`. side: "image" or "text". Raises `ConfigError`."""
    from clipx.interop.encoders import image, text

    where, module = f"config.{side}.init_from", {"image": image, "text": text}[side]
    try:
        full = expand_user(path)
    except DataError as error:
        raise ConfigError(where, str(error), "the folder or file of a pretrained encoder") from None
    return _unexpanded(module.describe(full, where), pathlib.Path(full), pathlib.Path(path))


def _unexpanded(encoder: Encoder, full: pathlib.Path, path: pathlib.Path) -> Encoder:
    """The encoder with a tokenizer's path as the config spells it: configs keep `$NAME`."""
    found = pathlib.Path(encoder.tokenizer.get("path") or "")
    for folder, spelled in ((full, path), (full.parent, path.parent)):
        if found != pathlib.Path() and found.is_relative_to(folder):
            section = {**encoder.tokenizer, "path": str(spelled / found.relative_to(folder))}
            return dataclasses.replace(encoder, tokenizer=section)
    return encoder


def resolve(
    config: Mapping[str, Any],
    saved: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """A copy of a config in which every tower named `auto` is the tower of its `init_from`.

    Keys that the config types stand; the file gives the others, and with them `objective.mean` and
    `objective.std` of images and the tokenizer of texts, unless these are typed. `say` gets a line
    about each tower, and one about each guess.

    saved: the complete config of the run that goes on; None for a new one. It gives what the file
    gave, so that the file may be gone. Raises `ConfigError` for a file that cannot be read.
    """
    out = dict(config)
    for side in ("image", "text"):
        section = config.get(side)
        if isinstance(section, Mapping) and section.get("name") == AUTO:
            _resolve(out, side, dict(section), dict((saved or {}).get(side) or {}), saved, say)
    if isinstance(out.get("tokenizer"), Mapping) and out["tokenizer"].get("name") == AUTO:
        raise ConfigError(
            "config.tokenizer.name", "'auto'", "the name of a tokenizer",
            "set config.text.name=auto too, to take tower and tokenizer from config.text.init_from",
        )  # fmt: skip
    return out


def _resolve(
    out: dict[str, Any],
    side: str,
    section: dict[str, Any],
    before: dict[str, Any],
    saved: Mapping[str, Any] | None,
    say: Callable[[str], None],
) -> None:
    """Replaces in `out` the tower `side`, and what belongs to it."""
    path, where = section.get("init_from"), f"config.{side}.init_from"
    own = out.get("tokenizer") or {}
    if not path or not isinstance(path, str):
        found = "nothing" if not path else repr(path)
        expected = f"a folder or file of a pretrained {side} encoder, as config.{side}.name is auto"
        raise ConfigError(where, found, expected, f"--{where}=FOLDER, or name a tower of clipx")
    if saved is not None and before.get("init_from") == path:
        given: dict[str, Any] = before
        preprocessing = {k: saved["objective"].get(k) for k in ("mean", "std")}
        tokenizer = saved.get("tokenizer") or {}
    else:
        encoder = describe(side, path)
        given = _section(encoder.tower)
        preprocessing, tokenizer = encoder.preprocessing, encoder.tokenizer
        say(f"config.{side}: {given['name']} from {path}, in the layout of {encoder.layout}")
        for note in (*encoder.notes, *_cut(encoder, own)):
            say(f"  {note}")
    typed = {k: v for k, v in section.items() if k != "name"}
    out[side] = {**given, **typed}
    if side == "image" and isinstance(out.get("objective"), Mapping):
        kept = {k: v for k, v in preprocessing.items() if v is not None}
        out["objective"] = {**kept, **out["objective"]}
    if side == "text" and own.get("name", AUTO) == AUTO:
        if not tokenizer:
            raise ConfigError(
                "config.tokenizer", "nothing", f"a tokenizer, as {path} has none that clipx reads"
            )
        out["tokenizer"] = {**tokenizer, **{k: v for k, v in own.items() if k != "name"}}


def _cut(encoder: Encoder, tokenizer: Mapping[str, Any]) -> list[str]:
    """A note for texts that are cut although nobody asked for it."""
    context = getattr(encoder.tower, "context", 0)
    if "context" in tokenizer or context >= encoder.longest:
        return []
    return [
        f"texts are cut to {context} tokens, marks included (the model takes {encoder.longest}): "
        "config.tokenizer.context changes it"
    ]


def _section(tower: Tower) -> dict[str, Any]:
    """The keys of a config's section that describe a file's tower: those of its own class."""
    general = {*binding.fields(Tower), *tower.from_tokenizer}
    name = type(tower).__module__.rpartition(".")[2]
    return {"name": name, **binding.dump(tower, general)}


def entries(
    objective: Objective,
    config: Config,
    tokenizer: Tokenizer | None,
    resized: list[str] | None = None,
) -> dict[str, dict[str, PyTree]]:
    """The parts of a run's `params` and `batch_stats` that the towers' own files give.

    tokenizer: the run's; None if it is not known yet. resized: as for `load.fit`. Raises
    one `ConfigError` for a tower that lists what differs between file and config and that
    `config.init_ignore` does not name.
    """
    parts: dict[str, dict[str, PyTree]] = {"params": {}, "batch_stats": {}}
    for side in ("image", "text"):
        tower: Tower = getattr(objective, side)
        if not tower.init_from:
            continue
        from clipx.interop import load

        encoder = describe(side, tower.init_from)
        if encoder.adapt is not None:
            encoder = encoder.adapt(tower)
        faults = [*encoder.differences, *_faults(encoder, objective, config, tokenizer)]
        params, statistics = encoder.read()
        params = _first_blocks(params, encoder.tower, tower)
        plain = tower.headless
        ignore = config.init_ignore
        fitted = load.fit_tower(side, encoder.tower, params, plain, ignore, faults, resized)
        load.refuse(faults, ignore, f"config.{side}.init_from={tower.init_from}")
        if fitted is not None:
            parts["params"][side] = fitted
            if statistics:
                parts["batch_stats"][side] = statistics
    return {kind: part for kind, part in parts.items() if part}


def _first_blocks(params: PyTree, given: Tower, tower: Tower) -> PyTree:
    """`params` without the blocks of `given` above those of a `tower` that is less deep."""
    depth = getattr(tower, "depth", None)
    if depth is None or type(given) is not type(tower):
        return params

    def kept(name: str) -> bool:
        number = name.removeprefix("block_")
        return name == number or not number.isdigit() or int(number) < depth

    if not isinstance(params, Mapping):
        return params
    return {k: _first_blocks(v, given, tower) for k, v in params.items() if kept(k)}


def _faults(
    encoder: Encoder, objective: Objective, config: Config, tokenizer: Tokenizer | None
) -> list[str]:
    """What differs between a file and a config beside the tower itself, as "name: description"."""
    faults = []
    for name, a in encoder.preprocessing.items():
        b = getattr(objective, name)
        if not np.allclose(a, b, rtol=0, atol=1e-3):
            faults.append(f"{name}: {tuple(a)} in the file, {tuple(b)} in config.objective")
    if not encoder.tokenizer:
        return faults
    # captions may be cleaned otherwise: what the config says is typed, or the file's
    theirs = TokenizerConfig(**{**encoder.tokenizer, "cleaning": config.tokenizer.cleaning})
    for name in _MARKS:
        a, b = getattr(theirs, name), getattr(config.tokenizer, name)
        if a != b:
            faults.append(f"tokenizer.{name}: {a} in the file, {b} in the config")
    if tokenizer is not None and not faults:
        from clipx.interop import verify

        given = tokenizers.build(theirs)
        if any(given.body(text) != tokenizer.body(text) for text in verify.CAPTIONS):
            faults.append("tokenizer: the file's and the run's split captions into other tokens")
    return faults
