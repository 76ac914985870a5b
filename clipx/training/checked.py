"""The sections of a config, bound and checked against one another."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from clipx.config import unknown
from clipx.config.binding import bind
from clipx.config.durations import duration
from clipx.data.config import DataConfig
from clipx.objectives.base import Objective
from clipx.parallel import mesh as meshes
from clipx.parallel.mesh import Mesh
from clipx.training import checks, encoders
from clipx.training.assemble import bind_objective
from clipx.training.schedule import Schedule, make_schedule
from clipx.training.schema import Config, EvalSpec, SourceSpec, data_section
from clipx.types import Device


def total_steps(config: Config, rows: int | None) -> int | None:
    """Steps of a run over `rows` rows; None for a length in epochs if `rows` is None."""
    return duration(dataclasses.asdict(config.train), "total", where="config.train").steps(
        batch_size=config.train.batch_size, rows=rows
    )


class Checked(NamedTuple):
    """The sections of a config, bound and checked against one another. Nothing is traced."""

    config: Config
    mesh: Mesh
    objective: Objective
    sections: dict[str, dict[str, Any]]  # as `bind_objective` returns them
    data: DataConfig
    source: SourceSpec
    evals: tuple[EvalSpec, ...]
    schedule: Schedule


def checked(config: Mapping[str, Any], devices: Sequence[Device] | None = None) -> Checked:
    """The sections of `config`, for `devices` (default: all).

    Raises `ConfigError` for a wrong type, a number outside its range, a missing field and settings
    that exclude each other, and one `UnknownKeys` for the unknown keys of all sections.
    """
    return unknown.together(functools.partial(_checked, devices=devices), config)


def _checked(config: Mapping[str, Any], devices: Sequence[Device] | None) -> Checked:
    """`checked`, up to the first section with unknown keys."""
    config = encoders.resolve(config)
    bound = bind(Config, config)
    mesh = meshes.make_mesh(bound.mesh, devices)
    train = bound.train
    objective, sections = bind_objective(bound)
    checks.check_towers(objective)
    groups = getattr(objective, "groups", 1)
    checks.check_groups(train, groups)
    data, source = data_section(bound.data)
    checks.check_clusters(data, train.batch_size, groups, objective.with_replacement)
    checks.check_episodes(train, data, objective, sections["objective"]["name"])
    evals = tuple(EvalSpec.check(name, section, data) for name, section in bound.evals.items())
    checks.check_train(train, mesh, evals, bound.optimizer.average > 0)
    checks.check_holdout(data, evals)
    schedule = make_schedule(
        bound.optimizer,
        steps=total_steps(bound, None),
        batch_size=train.batch_size,
        rows=None,
        start=train.extended_from,
    )
    return Checked(bound, mesh, objective, sections, data, source, evals, schedule)
