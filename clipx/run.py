"""A run: everything that a config says, built and checked, with nothing executed yet."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from clipx import config as configs
from clipx import mesh as meshes
from clipx.checkpoint import Checkpoints, read_json
from clipx.config import ConfigError, bind, duration, find
from clipx.data import pipeline, tokenizers
from clipx.data.base import Source
from clipx.encode import Encode
from clipx.evaluators.base import Evaluator
from clipx.mesh import MeshConfig
from clipx.models.layers import Tower
from clipx.objectives.base import Objective
from clipx.optimizer import OptimizerConfig, make_optimizer, make_schedule
from clipx.step import init_state, make_train_step
from clipx.types import Batch, PyTree, TrainState

_TOWERS = frozenset({"image", "text"})
_TEXT_GIVEN = ("vocab_size", "context", "eot_id", "pad_id")
_SAMPLES = 32  # pictures that the report shows


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


def _named(package: str, base: type, section: Mapping, where: str, default: str = ""):
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


def _split(section: Mapping, own: type, where: str) -> tuple[Any, dict]:
    """`section` as the dataclass `own` and the keys that `own` does not have."""
    names = configs.fields(own)
    return (
        bind(own, {k: v for k, v in section.items() if k in names}, where=where),
        {k: v for k, v in section.items() if k not in names},
    )


@dataclasses.dataclass(frozen=True)
class _SourceSpec:
    """A source, checked but not opened."""

    cls: type
    values: dict[str, Any]

    @classmethod
    def check(cls, section: Mapping, name: str, where: str, beside=()) -> _SourceSpec:
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
class _EvalSpec:
    name: str
    config: EvalConfig
    evaluator: type
    values: dict[str, Any]
    source: _SourceSpec

    @classmethod
    def check(cls, name: str, section: Mapping) -> _EvalSpec:
        where = f"config.evals.{name}"
        config, rest = _split(section, EvalConfig, where)
        evaluator, _, rest = _named(
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
        source = _SourceSpec.check(data, data.pop("source", ""), f"{where}.data")
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


@dataclasses.dataclass(frozen=True)
class Run:
    """All that a config makes. `init`, `train_step` and `encode` execute; the rest describes."""

    config: Config
    complete: dict[str, Any]  # the whole config, defaults included, as config.json keeps it
    mesh: Mesh
    objective: Objective
    optimizer: Any  # optax's
    schedule: Callable[[jax.Array], jax.Array]
    steps: int | None  # None: the length is in epochs, and the rows are not known yet
    rows: int | None
    data: DataConfig
    source: _SourceSpec
    evals: tuple[_EvalSpec, ...]
    batch: Batch  # abstract, with shardings
    state: TrainState  # abstract, with shardings
    tokenizer: tokenizers.Tokenizer | None = None  # None until the data is open

    @property
    def batch_size(self) -> int:
        return self.config.train.batch_size

    @property
    def steps_per_epoch(self) -> int | None:
        return self.rows // self.batch_size if self.rows else None

    def with_data(self, rows: int, tokenizer: tokenizers.Tokenizer) -> Run:
        """The same run over a data set of so many rows: lengths in epochs become steps."""
        run = _assemble(self.config, self.mesh, rows)
        return dataclasses.replace(run, tokenizer=tokenizer)

    def init(self) -> TrainState:
        """The state of step 0, created where it lies."""

        def init(batch):
            return init_state(self.objective, self.optimizer, batch, seed=self.config.seed)

        shardings = jax.tree.map(lambda x: x.sharding, self.state)
        zeros = functools.partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype), self.batch)
        with jax.set_mesh(self.mesh):
            return jax.jit(lambda: init(zeros()), out_shardings=shardings)()

    def lower(self) -> jax.stages.Lowered:
        """The training step, traced for this mesh; `.compile()` makes it callable. The state
        given to it is used up."""
        step = make_train_step(
            self.objective,
            self.optimizer,
            seed=self.config.seed,
            microbatches=self.config.train.microbatches,
        )
        shardings = jax.tree.map(lambda x: x.sharding, self.state)
        jitted = jax.jit(
            step, donate_argnums=0, out_shardings=(shardings, meshes.replicated(self.mesh))
        )
        with jax.set_mesh(self.mesh):
            return jitted.lower(self.state, self.batch)

    @functools.cached_property
    def train_step(self) -> jax.stages.Compiled:
        """(state, batch) -> (state, metrics), compiled. The state given to it is used up."""
        return self.lower().compile()

    def open_tokenizer(self, source: Source) -> tokenizers.Tokenizer:
        """The config's tokenizer, trained on the source's captions where it says so."""
        return tokenizers.build(self.config.tokenizer, pipeline.captions(source))

    def feed(self, source: Source, *, start: int) -> Iterator[tuple[Batch, dict[str, Any]]]:
        """Batches on the devices from step `start` to the run's end, each with what the host knows
        of it: `row` and `bad` of the rows that this process read."""
        sharding = meshes.batch_sharding(self.mesh)
        held = meshes.local_rows(sharding, self.batch_size)
        views = self.objective.views
        feed = pipeline.Feed(
            source,
            self.tokenizer,
            seed=self.config.seed,
            batch=self.batch_size,
            positions=held,
            image_size=self.objective.image.image_size,
            crops=tuple(view.scale for view in views.pictures),
            texts=views.texts,
            flip=self.data.flip,
            caption=self.data.caption,
            workers=self.data.workers,
        )
        for arrays in feed.batches(start, self.steps):
            known = {"row": arrays["row"], "bad": arrays.pop("bad")}
            yield Batch(**meshes.put_rows(arrays, sharding, held, self.batch_size)), known

    def encode(
        self,
        state: TrainState,
        *,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> Encode:
        """Both towers at the state's parameters, for evaluators."""
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        return Encode(self.objective, variables, self.mesh, self.tokenizer, interrupted)

    def evaluators(self) -> dict[str, Evaluator]:
        """The config's evals by name, their data open."""
        size = self.objective.image.image_size
        return {spec.name: spec.open(size) for spec in self.evals}

    def samples(self) -> tuple[np.ndarray, list[str], np.ndarray] | None:
        """Held-out pairs to look at: pictures uint8 [n, h, w, 3], captions, and which picture each
        caption belongs to; None where no eval's examples have captions."""
        for spec in self.evals:
            examples = spec.examples(self.objective.image.image_size)
            rows = [row for row in range(min(_SAMPLES, len(examples))) if examples.texts(row)]
            if rows:
                pictures = next(examples.batches(_SAMPLES))[rows]
                captions = [(text, i) for i, row in enumerate(rows) for text in examples.texts(row)]
                return pictures, [text for text, _ in captions], np.array([i for _, i in captions])
        return None


def restore(
    workdir: str | os.PathLike,
    step: str | int = "latest",
    *,
    config: Mapping | None = None,
    devices=None,
) -> tuple[Run, TrainState]:
    """The run of a workdir and its state at a step: a number, `latest` or `best`.

    `config` stands in for the workdir's own, with other evals, say; the towers must be the same.
    The mesh is one of all `devices`, whatever the run was trained on.
    """
    folder = pathlib.Path(workdir).expanduser().absolute()
    own = read_json(folder / "config.json")
    run = assemble({**(own if config is None else config), "mesh": {}}, devices)
    checkpoints = Checkpoints(folder, keep=run.config.train.keep, best=own["train"]["best"])
    found = checkpoints.step(step)
    saved = checkpoints.restore_run(found)
    run = run.with_data(saved["rows"], tokenizers.load(saved["tokenizer"]))
    state = checkpoints.restore(found, run.state)
    checkpoints.close()
    return run, state


def assemble(config: Mapping, devices=None) -> Run:
    """Everything that `config` describes, on `devices` (default: all), with nothing executed.

    Every wrong key, type, missing field and impossible combination raises `ConfigError` here; no
    data is opened. A length in epochs leaves `steps` None until `with_data`.
    """
    bound = bind(Config, config)
    return _assemble(bound, meshes.make_mesh(bound.mesh, devices), None)


def _assemble(config: Config, mesh: Mesh, rows: int | None) -> Run:
    train = config.train
    image_cls, image_name, image_section = _named("models", Tower, config.image, "config.image")
    text_cls, text_name, text_section = _named("models", Tower, config.text, "config.text")
    objective_cls, objective_name, section = _named(
        "objectives", Objective, config.objective, "config.objective"
    )
    image = bind(image_cls, image_section, where="config.image")
    text = bind(
        text_cls,
        text_section,
        where="config.text",
        **{name: getattr(config.tokenizer, name) for name in _TEXT_GIVEN},
    )
    objective = bind(objective_cls, section, where="config.objective", image=image, text=text)
    data, rest = _split(config.data, DataConfig, "config.data")
    source = _SourceSpec.check(rest, data.source, "config.data", configs.fields(DataConfig))
    evals = tuple(_EvalSpec.check(name, section) for name, section in config.evals.items())
    _check_train(train, mesh, evals, rows)
    steps = duration(dataclasses.asdict(train), "total", where="config.train").steps(
        batch_size=train.batch_size, rows=rows
    )
    batch = _abstract_batch(objective, train.batch_size, mesh)
    schedule = make_schedule(config.optimizer, steps=steps, batch_size=train.batch_size, rows=rows)
    optimizer, state = _abstract_state(objective, config, schedule, batch, mesh)
    complete = configs.dump(config) | {
        "objective": {"name": objective_name, **configs.dump(objective, given=_TOWERS)},
        "image": {"name": image_name, **configs.dump(image)},
        "text": {"name": text_name, **configs.dump(text, given=_TEXT_GIVEN)},
        "data": {**configs.dump(data), **source.dump()},
        "evals": {spec.name: spec.dump() for spec in evals},
    }
    return Run(
        config=config,
        complete=complete,
        mesh=mesh,
        objective=objective,
        optimizer=optimizer,
        schedule=schedule,
        steps=steps,
        rows=rows,
        data=data,
        source=source,
        evals=evals,
        batch=batch,
        state=state,
    )


def _check_train(train: TrainConfig, mesh: Mesh, evals, rows: int | None) -> None:
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


def _abstract_batch(objective: Objective, rows: int, mesh: Mesh) -> Batch:
    sharding = meshes.batch_sharding(mesh)
    views, size = objective.views, objective.image.image_size

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=sharding)

    return Batch(
        image=array(jnp.uint8, len(views.pictures), size, size, 3),
        text=array(jnp.int32, len(views.texts), objective.text.context),
        row=array(jnp.int32),
        position=array(jnp.int32),
    )


def _abstract_state(objective, config: Config, schedule, batch: Batch, mesh: Mesh):
    """The optimizer, whose rules need the parameters' paths, and the state it makes, abstract."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)

    def params(batch):
        keys = jax.vmap(jax.random.key)(batch.row)
        memory = objective.init_memory()
        return objective.init(jax.random.key(config.seed), batch, keys, memory)["params"]

    with jax.set_mesh(mesh):
        optimizer = make_optimizer(config.optimizer, schedule, jax.eval_shape(params, shapes))
        init = functools.partial(init_state, objective, optimizer, seed=config.seed)
        state = jax.eval_shape(init, shapes)
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state,
        meshes.state_shardings(mesh, state),
    )
    return optimizer, state


def flops(compiled: jax.stages.Compiled) -> float | None:
    """The compiler's count of one step's floating-point operations on one device."""
    cost: PyTree = compiled.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    return (cost or {}).get("flops")
