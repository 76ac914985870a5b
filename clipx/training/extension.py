"""A run that goes on for longer than it was planned: `clipx.train --extend`."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from clipx.errors import ConfigError
from clipx.training import guesses
from clipx.training.checkpoint import Checkpoints
from clipx.training.recovery import run_config
from clipx.training.workdir import EXTENSION, other_settings

KEY = "extended_from"  # of config.train


def applied(
    config: Mapping[str, Any], complete: Mapping[str, Any], workdir: str, *, extend: bool
) -> dict[str, Any]:
    """`config` with the step from which its schedule counts: that of the run in the workdir, or,
    for a longer run and if `extend`, the run's last checkpoint.

    complete: the config with all defaults. Raises `ConfigError` for `extend` without a run.
    """
    folder = pathlib.Path(workdir).expanduser().absolute()
    steps = Checkpoints(folder).steps
    if not steps:
        if extend:
            found = f"no checkpoint in {folder}"
            raise ConfigError("--extend", found, "a run to extend", "leave --extend out")
        return dict(config)
    saved = run_config(folder)
    begun = saved["train"].get(KEY, 0)
    train: dict[str, Any] = {**config["train"], KEY: begun}
    same = {**complete, "train": {**complete["train"], KEY: begun}}
    lines = other_settings(saved, guesses.fill(same, guesses.read(folder)))
    if extend and any(line.startswith(EXTENSION) for line in lines):
        train[KEY] = steps[-1]
    return {**config, "train": train}
