"""The sections of a config file, bound and checked against each other, with no data open."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from clipx.config import binding as configs
from clipx.config.binding import bind, find
from clipx.data.base import Source
from clipx.data.config import DataConfig
from clipx.data.evaluation import EvaluationSet
from clipx.data.pictures import Pictures
from clipx.data.text import tokenizers
from clipx.errors import ConfigError
from clipx.evaluators.base import Evaluator
from clipx.models.layers import Tower
from clipx.parallel.mesh import MeshConfig
from clipx.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    batch_size: int  # global: over all devices and micro-batches
    total_steps: int | None = None
    total_epochs: float | None = None
    total_examples: int | None = None
    microbatches: int | Literal["auto"] = 1  # auto: the fewest that fit the devices' memory
    log_every_steps: int = 10
    save_every_steps: int = 1000
    eval_every_steps: int | None = None  # None: at the end alone
    keep: int = 2  # the last so many checkpoints
    best: str = ""  # a metric, such as "retrieval/mean_recall": its best checkpoint is kept too
    max_skipped_steps: int = 5  # so many steps without a finite gradient in a row stop the run
    tensorboard: bool = False
    episode_pictures: bool = False  # of each episode, a map and some prototypes in report.html


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """The keys of one of `config.evals` beside its evaluator's own."""

    data: dict[str, Any] | None = None  # a source; some evaluators read folders of their own
    train_data: dict[str, Any] | None = None  # a source, for evaluators that train a probe
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
    # what step 0 starts from: a workdir, one of its checkpoints, or a folder or file of open_clip's
    # or transformers'; where it differs from the config it is refused, but for what is named
    init_from: str = ""
    init_ignore: tuple[str, ...] = ()  # such as ("image.activation", "text.*", "logit_bias")


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

    name: str
    cls: type
    values: dict[str, Any]

    @classmethod
    def check(cls, section: Mapping, name: str, where: str, beside=()) -> SourceSpec:
        try:
            source = find("data.sources", name, Source)
        except ConfigError as error:
            error.where = f"{where}.source"
            raise
        values = configs.check(source, section, where=where, beside=beside)
        if hasattr(source, "check_section"):
            source.check_section(values, where)
        return cls(name, source, values)

    def open(self) -> Source:
        return self.cls(**self.values)

    def parts(self, where: str) -> Iterator[tuple[str, SourceSpec]]:
        """The sources that files stand behind, each with its place in the config: this one, or
        those of a mixture."""
        if self.name != "mixture":
            yield where, self
            return
        for name, section in self.values["parts"].items():
            own, section = f"{where}.parts.{name}", dict(section)
            section.pop("weight", None)
            yield from SourceSpec.check(section, section.pop("source"), own).parts(own)

    def dump(self) -> dict[str, Any]:
        return {"source": self.name, **configs.dump_values(self.cls, self.values)}


def data_section(section: Mapping | None) -> tuple[DataConfig, SourceSpec]:
    """`config.data`, checked alone: the other sections may be wrong, or not there. Nothing is
    opened. Raises `ConfigError`, also for a config without the section."""
    if not isinstance(section, Mapping):
        raise ConfigError("config.data", "nothing", "a section with a source", "set config.data")
    data, rest = split(section, DataConfig, "config.data")
    return data, SourceSpec.check(rest, data.source, "config.data", configs.fields(DataConfig))


# what an evaluator may have as fields that a config does not set, and the config's key for it
_EVAL_SOURCES = {"examples": "data", "train_examples": "train_data"}
_EVAL_GIVEN = (*_EVAL_SOURCES, "pictures")


@dataclasses.dataclass(frozen=True)
class EvalSpec:
    """An eval: its section checked, its data not opened."""

    name: str
    config: EvalConfig
    evaluator: type
    values: dict[str, Any]
    sources: dict[str, SourceSpec]  # by the evaluator's field

    @classmethod
    def check(cls, name: str, section: Mapping) -> EvalSpec:
        where = f"config.evals.{name}"
        config, rest = split(section, EvalConfig, where)
        evaluator, found, rest = named(
            "evaluators", Evaluator, {**rest, "name": config.evaluator or name}, where
        )
        values = configs.check(
            evaluator, rest, where=where, given=_EVAL_GIVEN, beside=configs.fields(EvalConfig)
        )
        sources = cls._sources(evaluator, found, config, where)
        given = {field: None for field in _EVAL_GIVEN if field in configs.fields(evaluator)}
        try:
            evaluator(**given, **values)  # its own checks, now rather than after an epoch
        except ConfigError as error:
            error.where = f"{where}.{error.where.rpartition('.')[2]}"
            raise
        return cls(name, config, evaluator, values, sources)

    @staticmethod
    def _sources(evaluator: type, name: str, config: EvalConfig, where: str):
        sources = {}
        for field, key in _EVAL_SOURCES.items():
            section, known = getattr(config, key), configs.fields(evaluator).get(field)
            if section is None:
                if known is not None and known.default is dataclasses.MISSING:
                    raise ConfigError(
                        f"{where}.{key}", "nothing", "a source", f"set {where}.{key}.source"
                    )
            elif known is None:
                raise ConfigError(f"{where}.{key}", "a source", f"none: {name} reads none there")
            else:
                section = dict(section)
                source = section.pop("source", "")
                sources[field] = SourceSpec.check(section, source, f"{where}.{key}")
        return sources

    def dump(self) -> dict[str, Any]:
        """The complete section, as config.json keeps it."""
        sources = {_EVAL_SOURCES[field]: spec.dump() for field, spec in self.sources.items()}
        rest = configs.dump_values(self.evaluator, self.values, given=_EVAL_GIVEN)
        return configs.dump(self.config) | rest | sources

    def examples(self, image_size: int, field: str = "examples") -> EvaluationSet | None:
        """The examples of one of the evaluator's sources; None where it has no such source."""
        if field not in self.sources:
            return None
        limit = self.config.limit if field == "examples" else None
        return EvaluationSet(self.sources[field].open(), image_size, limit=limit)

    def open(self, image_size: int) -> Evaluator:
        given = {field: self.examples(image_size, field) for field in self.sources}
        if "pictures" in configs.fields(self.evaluator):
            given["pictures"] = Pictures(image_size)
        return self.evaluator(**given, **self.values)


def check_marks(tokenizer: tokenizers.TokenizerConfig, text: Tower) -> None:
    """Raises `ConfigError` where there is no start mark for a text tower to be read out at."""
    if tokenizer.sot_id is None and text.needs_start_mark:
        raise ConfigError(
            "config.tokenizer.marks",
            repr(tokenizer.marks),
            f"'both': {type(text).__name__} is read out at the start mark",
            "config.tokenizer.marks=both",
        )
