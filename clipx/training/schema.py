"""The sections of a config file, bound and checked against each other, with no data open."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from clipx.config import binding as configs
from clipx.config.binding import bind, find
from clipx.data import loader
from clipx.data.base import Source
from clipx.data.manifests import MANIFESTS
from clipx.data.pictures import Pictures
from clipx.data.text import tokenizers
from clipx.data.text.augment import TextAugmentConfig
from clipx.errors import ConfigError
from clipx.evaluators.base import Evaluator
from clipx.models.layers import Tower
from clipx.parallel import mesh as meshes
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
class DataConfig:
    """The keys of `config.data` beside its source's own."""

    source: str
    fraction: float = 1.0  # of the rows: so many, chosen once and for all
    workers: int = 0  # processes that decode; 0: threads of this one
    caption: Literal["random", "first", "all"] = "random"  # of several; all: in turn, one an epoch
    reject_cjk: bool = False  # a caption with Chinese characters counts as bad, as DeCLIP has it
    text_augment: TextAugmentConfig = TextAugmentConfig()  # of objectives that ask for it
    teacher: str | None = None  # rows that `clipx.teacher` wrote, for objectives that ask for them
    clusters: str | None = (
        None  # that `clipx.teacher` wrote: rows 2i and 2i + 1 of a batch share one
    )
    manifest: Literal[*MANIFESTS] | None = None  # the known set that this is, or is a part of
    max_bad_fraction: float = 0.01  # of the rows read; more stop the run

    def __post_init__(self):
        if not 0 < self.fraction <= 1:
            raise ConfigError("DataConfig.fraction", str(self.fraction), "more than 0, at most 1")


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

    def dump(self) -> dict[str, Any]:
        return {"source": self.name, **configs.dump_values(self.cls, self.values)}


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

    def examples(self, image_size: int, field: str = "examples") -> loader.EvaluationSet | None:
        """The examples of one of the evaluator's sources; None where it has no such source."""
        if field not in self.sources:
            return None
        limit = self.config.limit if field == "examples" else None
        return loader.EvaluationSet(self.sources[field].open(), image_size, limit=limit)

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


def check_clusters(data: DataConfig, batch: int, groups: int, with_replacement: bool) -> None:
    """Raises `ConfigError` for pairs of one cluster that would not stay together."""
    if data.clusters is None:
        return
    if batch % (2 * groups):
        raise ConfigError(
            "config.train.batch_size",
            f"{batch} in {groups} group(s), with data.clusters",
            "whole pairs of rows in each group",
            f"config.train.batch_size={max(batch // (2 * groups), 1) * 2 * groups}",
        )
    if with_replacement:
        raise ConfigError(
            "config.data.clusters",
            repr(data.clusters),
            "none where every row is drawn on its own",
            "config.objective.with_replacement=false",
        )


def check_episodes(
    train: TrainConfig, data: DataConfig, episode: int | None, width: int | None, objective: str
) -> None:
    """Raises `ConfigError` for a teacher that the objective does not ask for, or lacks, and for
    pictures of episodes where there is none."""
    if train.episode_pictures and episode is None:
        raise ConfigError(
            "config.train.episode_pictures",
            "true",
            f"false: {objective} has no episodes",
            "an objective with episodes, such as protoclip",
        )
    if width is None and data.teacher is not None:
        raise ConfigError(
            "config.data.teacher",
            repr(data.teacher),
            f"none: nothing of {objective} reads it",
            "config.objective.external_weight=1",
        )
    if width is not None and data.teacher is None:
        raise ConfigError(
            "config.data.teacher",
            "nothing",
            f"the file of the teacher's rows that {objective} asks for",
            "write one with `python -m clipx.teacher`, or set config.objective.external_weight=0",
        )


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
        if isinstance(value, int) and value < 1:
            raise ConfigError(f"{where}.{name}", str(value), "at least 1")
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    slices = 1 if train.microbatches == "auto" else train.microbatches
    unit = devices * slices
    if train.batch_size % unit:
        up, down = -(-train.batch_size // unit) * unit, train.batch_size // unit * unit
        raise ConfigError(
            f"{where}.batch_size",
            str(train.batch_size),
            f"a multiple of {devices} device(s) x {slices} micro-batch(es) = {unit}",
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
