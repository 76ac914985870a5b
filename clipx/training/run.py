"""A run: everything that a config says, built and checked, with nothing executed yet."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from clipx.config import binding as configs
from clipx.config.binding import bind, duration
from clipx.data import loader
from clipx.data import row_arrays as teachers
from clipx.data.base import Source, fingerprint
from clipx.data.text import tokenizers
from clipx.data.text.augment import TextAugment
from clipx.evaluators.base import Evaluator
from clipx.interop import load
from clipx.objectives.base import Objective
from clipx.ops import flops
from clipx.parallel import mesh as meshes
from clipx.training import pretrained
from clipx.training.assemble import abstract_batch, abstract_state, bind_objective
from clipx.training.checkpoint import Checkpoints, read_json
from clipx.training.encode import Encode
from clipx.training.optimizer import make_schedule
from clipx.training.parameter_rules import locked
from clipx.training.schema import (
    Config,
    DataConfig,
    EvalSpec,
    SourceSpec,
    check_clusters,
    check_episodes,
    check_train,
    split,
)
from clipx.training.step import batch_loss, init_state, make_train_step
from clipx.types import Batch, PyTree, TrainState

_SAMPLES = 32  # pictures that the report shows


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
    source: SourceSpec
    evals: tuple[EvalSpec, ...]
    batch: Batch  # abstract, with shardings
    state: TrainState  # abstract, with shardings
    tokenizer: tokenizers.Tokenizer | None = None  # None until the data is open

    @property
    def batch_size(self) -> int:
        return self.config.train.batch_size

    @property
    def steps_per_epoch(self) -> int | None:
        return self.rows // self.batch_size if self.rows else None

    @property
    def microbatches(self) -> int:
        """Of a step; 1 while the config leaves it to what fits and `fitted` has not said."""
        count = self.config.train.microbatches
        return 1 if count == "auto" else count

    def with_microbatches(self, count: int) -> Run:
        """The same run with so many micro-batches, as config.json will have it."""
        train = dataclasses.replace(self.config.train, microbatches=count)
        run = dataclasses.replace(
            self,
            config=dataclasses.replace(self.config, train=train),
            complete={**self.complete, "train": configs.dump(train)},
        )
        run.__dict__.update({k: v for k, v in self.__dict__.items() if k == "model_flops"})
        return run

    def with_data(self, rows: int, tokenizer: tokenizers.Tokenizer) -> Run:
        """The same run over a data set of so many rows: lengths in epochs become steps."""
        variables = {"params": self.state.params, "batch_stats": self.state.batch_stats}
        run = _assemble(self.config, self.mesh, rows, variables)
        return dataclasses.replace(run, tokenizer=tokenizer)

    def init(self) -> TrainState:
        """The state of step 0, created where it lies. What starts from files is read here."""
        found = pretrained.entries(
            self.objective, self.state.params, self.config, self.tokenizer, restore
        )

        def init(pretrained):
            batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.batch)
            return init_state(
                self.objective,
                self.optimizer,
                batch,
                seed=self.config.seed,
                pretrained=pretrained,
            )

        shardings = jax.tree.map(lambda x: x.sharding, self.state)
        kinds = {"params": shardings.params, "batch_stats": shardings.batch_stats}
        with jax.set_mesh(self.mesh):
            return jax.jit(init, out_shardings=shardings)(meshes.put_parts(found, kinds))

    @functools.cached_property
    def traced(self) -> jax.stages.Traced:
        """The training step, traced for this mesh."""
        step = make_train_step(
            self.objective, self.optimizer, seed=self.config.seed, microbatches=self.microbatches
        )
        shardings = jax.tree.map(lambda x: x.sharding, self.state)
        jitted = jax.jit(
            step, donate_argnums=0, out_shardings=(shardings, meshes.replicated(self.mesh))
        )
        with jax.set_mesh(self.mesh):
            return jitted.trace(self.state, self.batch)

    def lower(self) -> jax.stages.Lowered:
        """The training step for this mesh; `.compile()` makes it callable. The state given to it is
        used up."""
        with jax.set_mesh(self.mesh):
            return self.traced.lower()

    @property
    def step_flops(self) -> int:
        """FLOPs of a step over all devices, in matrix products and convolutions as traced: what is
        recomputed counts again."""
        return flops.total(flops.products(self.traced.jaxpr))

    @functools.cached_property
    def model_flops(self) -> int:
        """Useful FLOPs of a step, over all devices: three times the matrix products and
        convolutions of the forward pass (the backward pass has two for each). What is recomputed
        counts once, and what masks leave out counts. Nothing is compiled."""

        def forward(state: TrainState, batch: Batch) -> jax.Array:
            value, _ = batch_loss(
                self.objective, state.params, state=state, batch=batch, seed=self.config.seed
            )
            return value

        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (self.state, self.batch)
        )
        return 3 * flops.total(flops.products(jax.make_jaxpr(forward)(*shapes)))

    @functools.cached_property
    def train_step(self) -> jax.stages.Compiled:
        """(state, batch) -> (state, metrics), compiled. The state given to it is used up."""
        return self.lower().compile()

    def open_source(self) -> Source:
        """The data that the run trains on."""
        return loader.share(self.source.open(), self.data.fraction)

    def open_tokenizer(self, source: Source) -> tokenizers.Tokenizer:
        """The config's tokenizer: of `config.init_from` where that fits, or trained on the source's
        captions, where the config names no file."""
        config = self.config
        if config.init_from and not load.ignored("text", config.init_ignore):
            given = pretrained.open_tokenizer(config.init_from)
            if found := pretrained.tokenizer_for(config.tokenizer, given):
                return found
        return tokenizers.build(self.config.tokenizer, loader.captions(source))

    def open_teacher(self) -> np.ndarray | None:
        """The external teacher's rows, by row id, still on disk; None where there is none. Raises
        `DataError` for rows made for other data."""
        if self.data.teacher is None:
            return None
        whole = self.source.open()  # also where a fraction of it is trained on
        return teachers.open_teacher(
            self.data.teacher,
            rows=len(whole),
            width=self.objective.teacher,
            fingerprint=fingerprint(whole),
        )

    @functools.cached_property
    def clusters(self) -> np.ndarray | None:
        """The cluster of each row of `open_source`, in its order; None where none are given. Raises
        `DataError` as `open_teacher` does."""
        if self.data.clusters is None:
            return None
        whole = self.source.open()
        found = teachers.open_clusters(
            self.data.clusters, rows=len(whole), fingerprint=fingerprint(whole)
        )
        share = self.data.fraction
        return found if share == 1 else found[loader.chosen(len(found), share)]

    def loader(self, source: Source, positions: np.ndarray, *, survey: bool = False) -> loader.Feed:
        """What loads the rows at `positions` of every batch; with `survey`, of every batch of the
        passes before episodes. Raises `ConfigError` where a text that the objective asks for cannot
        be made."""
        views = self.objective.views
        augmented = "augmented" in views.texts
        return loader.Feed(
            source,
            self.tokenizer,
            seed=self.config.seed,
            batch=self.batch_size,
            positions=positions,
            image_size=self.objective.image.image_size,
            crops=tuple(view.scale for view in views.pictures),
            flips=tuple(view.flip for view in views.pictures),
            mirror_words=views.mirror_words,
            texts=views.texts,
            caption=self.data.caption,
            reject_cjk=self.data.reject_cjk,
            text_augment=TextAugment(self.data.text_augment) if augmented else None,
            workers=self.data.workers,
            episode=self.objective.episode,
            with_replacement=self.objective.with_replacement,
            survey=survey,
            clusters=self.clusters,
        )

    def feed(self, source: Source, *, start: int) -> Iterator[tuple[Batch, dict[str, Any]]]:
        """Batches on the devices from step `start` to the run's end, each with what the host knows
        of it: `row`, `key` and `bad` of the rows that this process read."""
        sharding = meshes.batch_sharding(self.mesh)
        held = meshes.local_rows(sharding, self.batch_size)
        for arrays in self.loader(source, held).batches(start, self.steps):
            known = {name: arrays.pop(name) for name in ("key", "bad")} | {"row": arrays["row"]}
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
            count = min(_SAMPLES, len(examples or ()))
            rows = [row for row in range(count) if examples.texts(row)]
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
    base = own if config is None else config
    train = {**base["train"], "microbatches": 1}  # no step is taken
    run = assemble({**base, "mesh": {}, "train": train}, devices)
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


def _assemble(config: Config, mesh: Mesh, rows: int | None, variables: PyTree | None = None) -> Run:
    """A run over so many rows. `variables`: what is known of its `params` and `batch_stats`."""
    train = config.train
    objective, sections = bind_objective(config)
    data, rest = split(config.data, DataConfig, "config.data")
    check_clusters(
        data, train.batch_size, getattr(objective, "groups", 1), objective.with_replacement
    )
    check_episodes(train, data, objective.episode, objective.teacher, sections["objective"]["name"])
    source = SourceSpec.check(rest, data.source, "config.data", configs.fields(DataConfig))
    evals = tuple(EvalSpec.check(name, section) for name, section in config.evals.items())
    check_train(train, mesh, evals, rows)
    steps = duration(dataclasses.asdict(train), "total", where="config.train").steps(
        batch_size=train.batch_size, rows=rows
    )
    batch = abstract_batch(objective, train.batch_size, mesh)
    schedule = make_schedule(config.optimizer, steps=steps, batch_size=train.batch_size, rows=rows)
    optimizer, state = abstract_state(objective, config, schedule, batch, mesh, variables)
    meshes.refuse_whole(config.mesh, mesh, state.params)
    objective = objective.clone(locked=locked(config.optimizer.freeze, state.params))
    complete = {
        **configs.dump(config),
        **sections,
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
