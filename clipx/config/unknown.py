"""Names that do not exist: what was probably meant, and all unknown keys of a config at once."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from clipx.errors import ConfigError, UnknownKeys

T = TypeVar("T")
# what other codebases call a key, and keys that are looked for in another section
_ALIASES = {
    **dict.fromkeys(("lr", "learning_rate", "base_lr"), "optimizer.learning_rate"),
    **dict.fromkeys(("wd", "weight_decay"), "optimizer.weight_decay"),
    **dict.fromkeys(("batch", "bs", "batch_size"), "train.batch_size"),
    **dict.fromkeys(("epochs", "num_epochs", "total_epochs"), "train.total_epochs"),
    **dict.fromkeys(("steps", "max_steps", "num_steps", "total_steps"), "train.total_steps"),
    **dict.fromkeys(("warmup", "warmup_steps"), "optimizer.warmup_steps"),
    **dict.fromkeys(("workers", "num_workers"), "data.workers"),
    **dict.fromkeys(("grad_clip", "clip_norm", "max_grad_norm"), "optimizer.clip_norm"),
    **dict.fromkeys(("accum_freq", "grad_accum", "microbatches"), "train.microbatches"),
    **dict.fromkeys(("pretrained", "resume", "checkpoint"), "init_from"),
    "image_size": "image.image_size",
}


def nearest(name: str, names: Iterable[str]) -> str:
    """A fix for a misspelt name, "did you mean ...?"; "" if none of `names` is close to it."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else ""


def error(key: str, where: str, known: Sequence[str], elsewhere: bool) -> ConfigError:
    """The error for a key that the section `where` does not have.

    known: the keys that it has. elsewhere: whether other sections set this key.
    """
    alias = _ALIASES.get(key.lower(), "")
    last = alias.rpartition(".")[2]
    if elsewhere:
        fix = f"remove {where}.{key}: other sections set it"
    elif alias and last in known:
        fix = f"did you mean {last!r}?"
    elif alias:
        fix = f"did you mean config.{alias}?"
    else:
        fix = nearest(key, known)
    expected = "one of " + ", ".join(known) if known else "no keys"
    return ConfigError(f"{where}.{key}", f"unknown key {key!r}", expected, fix)


def together(build: Callable[[Mapping[str, Any]], T], config: Mapping[str, Any]) -> T:
    """`build(config)`. Raises one `UnknownKeys` about the unknown keys of all sections, where
    `build` alone raises it about the first section that has any."""
    found: list[ConfigError] = []
    while True:
        try:
            built = build(config)
        except UnknownKeys as error:
            found += error.errors
            rest = config
            for fault in error.errors:
                rest = _without(rest, fault.where.removeprefix("config."))
            if rest == config:  # a key inside of a list: the rest cannot be looked at
                raise UnknownKeys(found) from None
            config = rest
        except ConfigError:
            if found:  # it may be what they cause
                raise UnknownKeys(found) from None
            raise
        else:
            if found:
                raise UnknownKeys(found)
            return built


def _without(config: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """`config` without the key at `path`; keys of it may have dots."""
    if path in config:
        return {key: value for key, value in config.items() if key != path}
    for key, value in config.items():
        if path.startswith(f"{key}.") and isinstance(value, Mapping):
            return {**config, key: _without(value, path.removeprefix(f"{key}."))}
    return config
