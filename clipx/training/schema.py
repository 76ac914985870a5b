"""The sections of a config file as dataclasses, with no data open."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, TypeVar

from clipx.config import binding as configs
from clipx.config.binding import bind, find
from clipx.config.ranges import BatchSize, Count, CountOrZero, LongCount, NonNegative, Seed
from clipx.data.base import Source
from clipx.data.config import TIMEOUT, DataConfig
from clipx.data.evaluation import EvaluationSet
from clipx.data.first_look import refuse_unfit
from clipx.data.framing import CENTRE, Framing
from clipx.data.limits import Limits
from clipx.data.pictures import Pictures
from clipx.data.text import tokenizers
from clipx.errors import ConfigError, DataError, at_key, in_section
from clipx.evaluators.base import Evaluator
from clipx.models.base import Tower
from clipx.parallel.mesh import MeshConfig
from clipx.training.optimizer import OptimizerConfig

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """`config.train`. Exactly one of the `total_*` keys sets the length of the run."""

    batch_size: BatchSize  # global: over all devices and micro-batches
    total_steps: CountOrZero | None = None  # the length of the run in steps
    total_epochs: NonNegative | None = None  # the same in passes over the data
    total_examples: LongCount | None = None  # the same in pairs seen
    microbatches: Count | Literal["auto"] = 1  # auto: the fewest that fit the devices' memory
    log_every_steps: Count = 10  # steps between two lines of metrics.jsonl
    save_every_steps: Count = 1000  # steps between two checkpoints; the last step is saved too
    eval_every_steps: Count | None = None  # None: only after the last step
    keep: Count = 2  # number of newest checkpoints to keep
    best: str = ""  # a metric, such as "retrieval/mean_recall": keep its best checkpoint too
    patience: Count | None = None  # end the run after so many evals in which `best` got no better
    extended_from: CountOrZero = 0  # the step at which the schedule begins: `--extend` sets it
    max_skipped_steps: Count = 5  # stop after this many steps in a row that are not finite, or
    # with rollback go back to the last checkpoint and train without the rows of these steps
    rollback: bool = False
    tensorboard: bool = False  # write the metrics for TensorBoard too
    wandb: str = ""  # log the metrics to this project of Weights & Biases too
    cca_rows: Count = 20_000  # of towers with head_init=cca: the rows that it is fitted to
    cca_regularizer: NonNegative = 1.0  # times the mean variance of each tower's features
    episode_pictures: bool = False  # show each episode's map and some prototypes in report.html


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """The keys of a section of `config.evals`, beside those of its evaluator."""

    data: dict[str, Any] | None = None  # a source; None for evaluators that read their own folders
    train_data: dict[str, Any] | None = None  # a source, for evaluators that train a probe
    evaluator: str | None = None  # None: the name of the section
    limit: Count | None = None  # use only the first examples of `data`, this many


@dataclasses.dataclass(frozen=True)
class Config:
    """The sections of a config file."""

    objective: dict[str, Any]  # the method: `name`, and the keys of its class
    image: dict[str, Any]  # the image tower: `name`, and the keys of its class
    text: dict[str, Any]  # the text tower: `name`, and the keys of its class
    tokenizer: tokenizers.TokenizerConfig  # how texts become ids
    data: dict[str, Any]  # the training data: `source`, and the keys of its class
    train: TrainConfig  # batch, length, logging and checkpoints
    optimizer: OptimizerConfig = OptimizerConfig()  # optimizer and learning rate
    mesh: MeshConfig = MeshConfig()  # how a run is split over devices
    # evaluations by name, each with the keys of its evaluator
    evals: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    seed: Seed = 0  # of the weights, the order of the rows, crops, captions and dropout
    # weights to start from: a workdir, one of its checkpoints, or a folder or file of open_clip or
    # transformers. A difference from the config is an error, unless `init_ignore` names it.
    init_from: str = ""
    # start with the optimizer's state of `init_from` too, a run of clipx; the schedule begins anew
    init_optimizer: bool = False
    init_ignore: tuple[str, ...] = ()  # such as ("image.activation", "text.*", "logit_bias")


def named(
    package: str, base: type, section: Mapping[str, Any], where: str, default: str = ""
) -> tuple[type[Any], str, dict[str, Any]]:
    """(the class that a section's `name` names, the name, the section without it).

    package, base: where the class is, as for `binding.find`. Raises `ConfigError` for an unknown
    name.
    """
    section = dict(section)
    name = section.pop("name", default)
    if not name:
        raise ConfigError(f"{where}.name", "nothing", f"the name of a file in clipx/{package}/")
    try:
        return find(package, name, base), name, section
    except ConfigError as error:
        error.where = f"{where}.name"
        raise


def split(section: Mapping[str, Any], cls: type[T], where: str) -> tuple[T, dict[str, Any]]:
    """(an instance of the dataclass `cls` from its keys in `section`, the other keys)."""
    names = configs.fields(cls)
    return (
        bind(cls, {k: v for k, v in section.items() if k in names}, where=where),
        {k: v for k, v in section.items() if k not in names},
    )


@dataclasses.dataclass(frozen=True)
class SourceSpec:
    """A source whose section is checked and whose data is not open."""

    name: str
    cls: type[Source]
    values: dict[str, Any]  # the typed values of the section
    limits: Limits = Limits()
    where: str = ""  # the section, as messages name it: its path in the config, or a flag

    @classmethod
    def check(
        cls, section: Mapping[str, Any], name: str, where: str, beside: Iterable[str] = ()
    ) -> SourceSpec:
        """The source `name` with the keys of `section`. Raises `ConfigError` at `where`; `beside`
        as for `binding.check`."""
        try:
            source = find("data.sources", name, Source)
        except ConfigError as error:
            error.where = f"{where}.source"
            raise
        values = configs.check(source, section, where=where, beside=beside)
        if hasattr(source, "check_section"):
            source.check_section(values, where)
        return cls(name, source, values, where=where)

    def open(self) -> Source:
        """The source, open. Raises `DataError`, which names the section."""
        try:
            source = self.cls(**self.values)
        except DataError as error:
            if not self.where:
                raise
            path = ".path" * (self.where.startswith("config.") and "path" in self.values)
            raise DataError(at_key(str(error), self.where + path)) from None
        source.limit(self.limits)
        return source

    def parts(self, where: str) -> Iterator[tuple[str, SourceSpec]]:
        """This source, or the sources of a mixture, each with its path in the config."""
        if self.name != "mixture":
            yield where, self
            return
        for name, section in self.values["parts"].items():
            path, section = f"{where}.parts.{name}", dict(section)
            section.pop("weight", None)
            part = SourceSpec.check(section, section.pop("source"), path)
            yield from dataclasses.replace(part, limits=self.limits).parts(path)

    def dump(self) -> dict[str, Any]:
        """The complete section, as config.json holds it."""
        return {"source": self.name, **configs.dump_values(self.cls, self.values)}


def data_section(section: Mapping[str, Any] | None) -> tuple[DataConfig, SourceSpec]:
    """`config.data`, checked without the other sections. Nothing is opened.

    Raises `ConfigError` for a wrong section, and for None.
    """
    if not isinstance(section, Mapping):
        raise ConfigError(
            "config.data", "nothing", "a section with a source", "set config.data.source"
        )
    data, rest = split(section, DataConfig, "config.data")
    spec = SourceSpec.check(rest, data.source, "config.data", configs.fields(DataConfig))
    return data, dataclasses.replace(spec, limits=data.limits)


# fields of an evaluator that hold examples: {field: key of the eval's section}
EVAL_SOURCES = {"examples": "data", "train_examples": "train_data"}
_NAME = re.compile(r"[A-Za-z0-9][\w+.:@-]*")  # of an eval
_EVAL_GIVEN = (*EVAL_SOURCES, "pictures")


@dataclasses.dataclass(frozen=True)
class EvalSpec:
    """An eval whose section is checked and whose data is not open."""

    name: str
    config: EvalConfig
    evaluator: type[Evaluator]
    values: dict[str, Any]  # the typed values of the evaluator's keys
    sources: dict[str, SourceSpec]  # by the evaluator's field
    timeout: float = TIMEOUT  # of `EvaluationSet`
    framing: Framing = CENTRE

    @classmethod
    def check(
        cls, name: str, section: Mapping[str, Any], data: DataConfig | None = None
    ) -> EvalSpec:
        """The section `config.evals.<name>`, checked. data: has the limits of its rows. Raises
        `ConfigError`."""
        where = f"config.evals.{name}"
        if not _NAME.fullmatch(name):  # it becomes part of a file's name
            expected = "a name of letters, digits and _-+.:@, with a letter or digit first"
            raise ConfigError("config.evals", f"an eval named {name!r}", expected)
        config, rest = split(section, EvalConfig, where)
        evaluator, evaluator_name, rest = named(
            "evaluators", Evaluator, {**rest, "name": config.evaluator or name}, where
        )
        values = configs.check(
            evaluator, rest, where=where, given=_EVAL_GIVEN, beside=configs.fields(EvalConfig)
        )
        sources = cls._sources(evaluator, evaluator_name, config, where)
        given = {field: None for field in _EVAL_GIVEN if field in configs.fields(evaluator)}
        try:
            evaluator(**given, **values)  # runs the evaluator's own checks before training
        except ConfigError as error:
            error.where = f"{where}.{error.where.rpartition('.')[2]}"
            raise
        if data is None:
            return cls(name, config, evaluator, values, sources)
        limited = {f: dataclasses.replace(s, limits=data.limits) for f, s in sources.items()}
        return cls(name, config, evaluator, values, limited, data.timeout, data.framing)

    @staticmethod
    def _sources(
        evaluator: type[Evaluator], name: str, config: EvalConfig, where: str
    ) -> dict[str, SourceSpec]:
        """The checked sources of an eval, by the evaluator's field."""
        sources = {}
        for field, key in EVAL_SOURCES.items():
            section, known = getattr(config, key), configs.fields(evaluator).get(field)
            if field == "examples" and evaluator.pairs and _is_held_out(section):
                continue
            if section is None:
                if known is not None and known.default is dataclasses.MISSING:
                    raise ConfigError(
                        f"{where}.{key}",
                        "nothing",
                        "a source",
                        f"set {where}.{key}.source"
                        + f", or {where}.{key}.path='' to hold out rows" * evaluator.pairs,
                    )
            elif known is None:
                raise ConfigError(
                    f"{where}.{key}",
                    "a source",
                    f"None: the evaluator {name} does not read {key}",
                    f"remove {where}.{key}",
                )
            else:
                section = dict(section)
                source = section.pop("source", "")
                sources[field] = SourceSpec.check(section, source, f"{where}.{key}")
        return sources

    @property
    def held_out(self) -> bool:
        """Whether the path of its data is empty, so that it reads rows that the run holds out."""
        return self.evaluator.pairs and "examples" not in self.sources

    def dump(self) -> dict[str, Any]:
        """The complete section, as config.json holds it."""
        sources = {EVAL_SOURCES[field]: spec.dump() for field, spec in self.sources.items()}
        rest = configs.dump_values(self.evaluator, self.values, given=_EVAL_GIVEN)
        return configs.dump(self.config) | rest | sources

    def examples(
        self, image_size: int, held_out: Callable[[], Source], field: str = "examples"
    ) -> EvaluationSet | None:
        """The open examples of the evaluator's field `field`; None without such a source.

        held_out: opens the rows that the run holds out.
        """
        limit = self.config.limit if field == "examples" else None
        if field == "examples" and self.held_out:
            return EvaluationSet(held_out(), image_size, limit, self.timeout, self.framing)
        if field not in self.sources:
            return None
        try:
            source = self.sources[field].open()
        except DataError as error:
            section = f"evals.{self.name}.{EVAL_SOURCES[field]}"
            raise DataError(in_section(str(error), section)) from None
        return EvaluationSet(source, image_size, limit, self.timeout, self.framing)

    def look(self, evaluator: Evaluator) -> None:
        """Raises `DataError` if no row of the data of the open `evaluator` can be used."""
        for field in self.sources:
            examples: EvaluationSet = getattr(evaluator, field)
            refuse_unfit(
                f"evals.{self.name}.{EVAL_SOURCES[field]}",
                examples.source,
                self.evaluator.needs,
                examples.limit,
            )

    def open(self, image_size: int, held_out: Callable[[], Source]) -> Evaluator:
        """The evaluator, with its data open. held_out: as for `examples`."""
        fields = [*self.sources, *["examples"] * self.held_out]
        given: dict[str, Any] = {f: self.examples(image_size, held_out, f) for f in fields}
        if "pictures" in configs.fields(self.evaluator):
            given["pictures"] = Pictures(image_size, self.framing)
        return self.evaluator(**given, **self.values)


def _is_held_out(section: Mapping[str, Any] | None) -> bool:
    """Whether the section of an eval's source stands for rows that the run holds out: its path is
    empty. A command line may fill it."""
    if section is None or section.get("path") != "":
        return False
    try:
        source = configs.find("data.sources", section.get("source", "webdataset"), Source)
    except ConfigError:
        return False  # `SourceSpec.check` says what is wrong with it
    return "path" in configs.fields(source)


def check_marks(tokenizer: tokenizers.TokenizerConfig, text: Tower) -> None:
    """Raises `ConfigError` for a text tower that pools at a start mark that no text has."""
    if tokenizer.sot_id is None and text.needs_start_mark:
        raise ConfigError(
            "config.tokenizer.marks",
            repr(tokenizer.marks),
            f"'both': {type(text).__name__} pools at the start mark",
            "config.tokenizer.marks=both",
        )
