"""Checks between the sections of a config. No data is opened."""

from __future__ import annotations

import math

import jax

from clipx.data.config import DataConfig
from clipx.errors import ConfigError
from clipx.objectives import base
from clipx.objectives.base import Objective
from clipx.parallel.mesh import Mesh
from clipx.training.schema import EvalSpec, TrainConfig


def check_towers(objective: Objective) -> None:
    """Raises `ConfigError` for towers of two widths whose outputs are compared, for float64 where
    JAX would replace it by float32, and for heads that cannot start together."""
    for name in ("image", "text"):
        if getattr(objective, name).dtype == "float64" and not jax.config.read("jax_enable_x64"):
            raise ConfigError(
                f"config.{name}.dtype",
                "'float64', which JAX has not enabled",
                "'float32' or 'bfloat16'",
                "set the environment variable JAX_ENABLE_X64=1",
            )
    image, text = objective.image.output_width, objective.text.output_width
    if objective.shares_space and image != text:
        raise ConfigError(
            "config.text.embed_dim",
            f"{text}, and {image} for the image tower",
            "the same width for both towers",
            f"config.text.embed_dim={image}",
        )
    _check_heads(objective)


def _check_heads(objective: Objective) -> None:
    """Raises `ConfigError` for a canonical correlation analysis of one tower alone, or of more
    dimensions than the narrower tower has."""
    towers = {"image": objective.image, "text": objective.text}
    start = {name: tower for name, tower in towers.items() if tower.head_init == "cca"}
    if not start:
        return
    if len(start) == 1:
        (given,) = start
        other = "text" if given == "image" else "image"
        raise ConfigError(
            f"config.{other}.head_init",
            f"{towers[other].head_init}, and cca for the {given} tower",
            "cca for both towers, as it compares them",
            f"config.{other}.head_init=cca",
        )
    widths = {name: tower.embed_dim for name, tower in towers.items()}
    if widths["image"] != widths["text"]:
        raise ConfigError(
            "config.text.embed_dim",
            f"{widths['text']}, and {widths['image']} for the image tower, with head_init=cca",
            "the same width for both towers",
            f"config.text.embed_dim={widths['image']}",
        )
    narrower = min(towers, key=lambda name: towers[name].backbone_width)
    most = towers[narrower].backbone_width
    if widths["image"] > most:
        raise ConfigError(
            "config.image.embed_dim",
            f"{widths['image']}, with head_init=cca and {most} features of the {narrower} tower",
            "no more dimensions than the narrower tower has features",
            f"config.image.embed_dim={most} and config.text.embed_dim={most}",
        )


def check_groups(train: TrainConfig, groups: int) -> None:
    """Raises `ConfigError` unless `groups` divides the batch into groups of at least two rows."""
    base.check_groups(groups, train.batch_size)
    if train.batch_size < 2 * groups:
        raise ConfigError(
            "config.train.batch_size",
            f"{train.batch_size} row(s) in {groups} group(s)",
            "at least two rows in each group: a loss compares each row with others",
            f"config.train.batch_size={2 * groups}",
        )


def check_clusters(data: DataConfig, batch: int, groups: int, with_replacement: bool) -> None:
    """Raises `ConfigError` if `data.clusters` is set and pairs of rows of one cluster cannot stay
    together: in a group of the batch, and in the order of the rows."""
    if data.clusters is None:
        return
    if batch % (2 * groups):
        raise ConfigError(
            "config.train.batch_size",
            f"{batch} rows in {groups} group(s), with config.data.clusters",
            f"a multiple of {2 * groups}, so that each group has whole pairs of rows",
            f"config.train.batch_size={max(batch // (2 * groups), 1) * 2 * groups}",
        )
    if with_replacement:
        raise ConfigError(
            "config.data.clusters",
            repr(data.clusters),
            "None: with replacement, every row is sampled on its own",
            "config.objective.with_replacement=false, or config.data.clusters=None",
        )


def check_episodes(train: TrainConfig, data: DataConfig, objective: Objective, name: str) -> None:
    """Raises `ConfigError` for a teacher that the objective does not read, a missing teacher, and
    `train.episode_pictures` for an objective without episodes."""
    if train.episode_pictures and objective.episode_steps is None:
        raise ConfigError(
            "config.train.episode_pictures",
            "true",
            f"false: {name} has no episodes",
            "config.train.episode_pictures=false, or an objective with episodes (protoclip)",
        )
    width = objective.external_width
    if width is None and data.teacher is not None:
        raise ConfigError(
            "config.data.teacher",
            repr(data.teacher),
            f"None: the objective {name} does not read a teacher",
            "config.data.teacher=None"
            + ", or config.objective.external_weight=1" * hasattr(objective, "external_weight"),
        )
    if width is not None and data.teacher is None:
        raise ConfigError(
            "config.data.teacher",
            "nothing",
            f"the file of the external teacher that {name} reads",
            "write one with `python -m clipx.teacher`, or set config.objective.external_weight=0",
        )


def check_train(
    train: TrainConfig, mesh: Mesh, evals: tuple[EvalSpec, ...], averages: bool = False
) -> None:
    """Raises `ConfigError` for a batch that devices and micro-batches do not divide, a `best` that
    names no eval, and `patience` without it. averages: whether the run averages its parameters."""
    where = "config.train"
    devices, slices = _divisors(train, mesh)
    unit = devices * slices
    if train.batch_size % unit:
        up, down = -(-train.batch_size // unit) * unit, train.batch_size // unit * unit
        raise ConfigError(
            f"{where}.batch_size",
            str(train.batch_size),
            f"a multiple of {devices} device(s) x {slices} micro-batch(es) = {unit}",
            f"{where}.batch_size={down or up}",
        )
    if train.patience is not None and not train.best:
        found = f"{train.patience}, while config.train.best names no metric"
        raise ConfigError(
            f"{where}.patience", found, "a metric that gets better or does not",
            f"{where}.best=<eval>/<metric>",
        )  # fmt: skip
    if train.best:
        names = [spec.name for spec in evals]
        names += [f"{name}@average" for name in names if averages]
        if train.best.split("/")[0] not in names:
            raise ConfigError(
                f"{where}.best",
                repr(train.best),
                "<eval>/<metric> of config.evals" + (f": {', '.join(names)}" if names else ""),
                "set config.evals or leave train.best empty",
            )


def check_holdout(data: DataConfig, evals: tuple[EvalSpec, ...]) -> None:
    """Raises `ConfigError` for an eval that names no data while nothing is held out."""
    for spec in evals:
        if spec.held_out and data.holdout == 0:
            raise ConfigError(
                f"config.evals.{spec.name}.data",
                "nothing, with config.data.holdout=0",
                "a source, or rows of the training data to hold out",
                f"set config.evals.{spec.name}.data.source, or config.data.holdout=auto",
            )


def check_rows(train: TrainConfig, mesh: Mesh, rows: int) -> None:
    """Raises `ConfigError` for data of less than one batch."""
    if rows < train.batch_size:
        unit = math.prod(_divisors(train, mesh))
        raise ConfigError(
            "config.train.batch_size",
            f"{rows} rows of data for a batch of {train.batch_size}",
            "at least one batch of rows",
            f"config.train.batch_size={max(rows // unit * unit, unit)} or more data",
        )


def _divisors(train: TrainConfig, mesh: Mesh) -> tuple[int, int]:
    """(devices that hold different rows, micro-batches): what must divide the batch."""

    slices = 1 if train.microbatches == "auto" else train.microbatches
    return mesh.shape["data"] * mesh.shape["fsdp"], slices
