"""A run that goes on for longer than it was planned: `clipx.train --extend`."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from clipx.errors import ConfigError
from clipx.training import guesses
from clipx.training.workdir import EXTENSION, other_settings, read_config

KEY = "extended_from"  # of config.train


def applied(
    config: Mapping[str, Any],
    complete: Mapping[str, Any],
    folder: pathlib.Path,
    start: int | None,
    *,
    extend: bool,
) -> dict[str, Any]:
    """`config` with the step from which its schedule counts: that of the run in the workdir, or,
    for a longer run and if `extend`, the step of the checkpoint that it goes on from.

    complete: the config with all defaults. folder: the workdir, whose config.json is whole. start:
    that step; None: a new run. Raises `ConfigError` for `extend` without a run.
    """
    if start is None:
        if extend:
            found = f"no checkpoint in {folder}"
            raise ConfigError("--extend", found, "a run to extend", "leave --extend out")
        return dict(config)
    saved = read_config(folder)
    begun = saved["train"].get(KEY, 0)
    train: dict[str, Any] = {**config["train"], KEY: begun}
    same = {**complete, "train": {**complete["train"], KEY: begun}}
    lines = other_settings(saved, guesses.fill(same, guesses.read(folder)))
    if extend and any(line.startswith(EXTENSION) for line in lines):
        train[KEY] = start
    return {**config, "train": train}
