"""The sections of a config file, bound and checked against each other, with no data open."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from clipx import config as configs
from clipx import mesh as meshes
from clipx.config import ConfigError, bind, find
from clipx.data import pipeline, tokenizers
from clipx.data.base import Source
from clipx.evaluators.base import Evaluator
from clipx.mesh import MeshConfig
from clipx.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    batch_size: int  # global: over all devices and micro-batches
    total_steps: int | None = None
    total_epochs: float | None = None
    total_examples: int | None = None
    microbatches: int = 1
    log_every_steps: int = 10
    save_every_steps: int = 1000
    eval_every_steps: int | None = None  # None: at the end alone
    keep: int = 2  # the last so many checkpoints
    best: str = ""  # a metric, such as "retrieval/mean_recall": its best checkpoint is kept too
    max_skipped_steps: int = 5  # so many steps without a finite gradient in a row stop the run
    tensorboard: bool = False


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The keys of `config.data` beside its source's own."""

    source: str
    workers: int = 0  # processes that decode; 0: threads of this one
    flip: bool = True  # mirror half of the pictures
    caption: Literal["random", "first"] = "random"  # of a picture with several
    max_bad_fraction: float = 0.01  # of the rows read; more stop the run


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """The keys of one of `config.evals` beside its evaluator's own."""

    data: dict[str, Any]
    evaluator: str | None = None  # None: the name of the section
    limit: int | None = None  # so many examples at most


@dataclasses.dataclass(frozen=True)
class Config:
    """The sections of a config file."""

    objective: dict[str, Any]
    image: dict[str, Any]
    text: dict[str, Any]
    tokenizer: tokenizers.TokenizerConfig
    data: dict[str, Any]
    train: TrainConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    evals: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    seed: int = 0


def named(package: str, base: type, section: Mapping, where: str, default: str = ""):
    """The class that a section's `name` stands for, and the section without it."""
    section = dict(section)
    name = section.pop("name", default)
    if not name:
        raise ConfigError(f"{where}.name", "nothing", f"the name of a file in clipx/{package}/")
    try:
        return find(package, name, base), name, section
    except ConfigError as error:
        error.where = f"{where}.name"
        raise


def split(section: Mapping, own: type, where: str) -> tuple[Any, dict]:
    """`section` as the dataclass `own` and the keys that `own` does not have."""
    names = configs.fields(own)
    return (
        bind(own, {k: v for k, v in section.items() if k in names}, where=where),
        {k: v for k, v in section.items() if k not in names},
    )


@dataclasses.dataclass(frozen=True)
class SourceSpec:
    """A source: its section checked, nothing opened."""

    cls: type
    values: dict[str, Any]

    @classmethod
    def check(cls, section: Mapping, name: str, where: str, beside=()) -> SourceSpec:
        try:
            source = find("data", name, Source)
        except ConfigError as error:
            error.where = f"{where}.source"
            raise
        return cls(source, configs.check(source, section, where=where, beside=beside))

    def open(self) -> Source:
        return self.cls(**self.values)

    def dump(self) -> dict[str, Any]:
        return configs.dump_values(self.cls, self.values)


@dataclasses.dataclass(frozen=True)
class EvalSpec:
    """An eval: its section checked, its data not opened."""

    name: str
    config: EvalConfig
    evaluator: type
    values: dict[str, Any]
    source: SourceSpec

    @classmethod
    def check(cls, name: str, section: Mapping) -> EvalSpec:
        where = f"config.evals.{name}"
        config, rest = split(section, EvalConfig, where)
        evaluator, _, rest = named(
            "evaluators", Evaluator, {**rest, "name": config.evaluator or name}, where
        )
        values = configs.check(
            evaluator, rest, where=where, given=("examples",), beside=configs.fields(EvalConfig)
        )
        try:
            evaluator(examples=None, **values)  # its own checks, now rather than after an epoch
        except ConfigError as error:
            error.where = f"{where}.{error.where.rpartition('.')[2]}"
            raise
        data = dict(config.data)
        source = SourceSpec.check(data, data.pop("source", ""), f"{where}.data")
        return cls(name, config, evaluator, values, source)

    def dump(self) -> dict[str, Any]:
        """The complete section, as config.json keeps it."""
        source = {"source": self.config.data["source"], **self.source.dump()}
        rest = configs.dump_values(self.evaluator, self.values, given=("examples",))
        return configs.dump(self.config) | rest | {"data": source}

    def examples(self, image_size: int) -> pipeline.EvaluationSet:
        return pipeline.EvaluationSet(self.source.open(), image_size, limit=self.config.limit)

    def open(self, image_size: int) -> Evaluator:
        return self.evaluator(examples=self.examples(image_size), **self.values)


def check_train(
    train: TrainConfig, mesh: meshes.Mesh, evals: tuple[EvalSpec, ...], rows: int | None
) -> None:
    """Raises `ConfigError` for counts that cannot be, a batch that does not divide over devices and
    micro-batches, data of less than a batch, and a `best` that names no eval."""
    where = "config.train"
    for name in (
        "batch_size",
        "microbatches",
        "log_every_steps",
        "save_every_steps",
        "eval_every_steps",
        "keep",
        "max_skipped_steps",
    ):
        value = getattr(train, name)
        if value is not None and value < 1:
            raise ConfigError(f"{where}.{name}", str(value), "at least 1")
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    unit = devices * train.microbatches
    if train.batch_size % unit:
        up, down = -(-train.batch_size // unit) * unit, train.batch_size // unit * unit
        raise ConfigError(
            f"{where}.batch_size",
            str(train.batch_size),
            f"a multiple of {devices} device(s) x {train.microbatches} micro-batch(es) = {unit}",
            f"{where}.batch_size={down or up}",
        )
    if rows is not None and rows < train.batch_size:
        raise ConfigError(
            f"{where}.batch_size",
            f"{rows} rows of data for a batch of {train.batch_size}",
            "at least one whole batch",
            f"{where}.batch_size={max(rows // unit * unit, unit)} or more data",
        )
    if train.best:
        names = [spec.name for spec in evals]
        if train.best.split("/")[0] not in names:
            raise ConfigError(
                f"{where}.best",
                repr(train.best),
                "<eval>/<metric> of config.evals" + (f": {', '.join(names)}" if names else ""),
                "set config.evals or leave train.best empty",
            )
