"""A run: what a config describes, built and checked, with nothing executed and no data open, and
what it is once its data is open."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from clipx.config import binding
from clipx.config.binding import bind, duration
from clipx.data.config import DataConfig
from clipx.data.text import tokenizers
from clipx.evaluators.base import Evaluator
from clipx.objectives.base import Objective
from clipx.ops import flops
from clipx.parallel import mesh as meshes
from clipx.training import checks
from clipx.training.assemble import abstract_batch, abstract_state, bind_objective
from clipx.training.checkpoint import Checkpoints, read_json
from clipx.training.encode import Encode
from clipx.training.optimizer import make_schedule
from clipx.training.parameter_rules import locked
from clipx.training.schema import Config, EvalSpec, SourceSpec, data_section
from clipx.training.step import batch_loss, make_train_step
from clipx.types import Batch, TrainState

_SAMPLES = 32  # pictures that the report shows


@dataclasses.dataclass(frozen=True)
class Run:
    """What a config describes. `train_step` compiles; everything else only describes."""

    config: Config
    complete: dict[str, Any]  # the whole config, defaults included, as config.json keeps it
    mesh: Mesh
    objective: Objective
    optimizer: Any  # optax's
    schedule: Callable[[jax.Array], jax.Array]
    data: DataConfig
    source: SourceSpec
    evals: tuple[EvalSpec, ...]
    batch: Batch  # abstract, with shardings
    state: TrainState  # abstract, with shardings

    @property
    def batch_size(self) -> int:
        return self.config.train.batch_size

    @functools.cached_property
    def steps(self) -> int | None:
        """Steps of the whole run; None for a length in epochs, which only open data tells."""
        return total_steps(self.config, None)

    @property
    def microbatches(self) -> int:
        """Of a step; 1 while the config leaves it to what fits and `fit.fitted` has not said."""
        count = self.config.train.microbatches
        return 1 if count == "auto" else count

    def with_microbatches(self, count: int) -> Run:
        """The same run with so many micro-batches, as config.json will have it."""
        train = dataclasses.replace(self.config.train, microbatches=count)
        return dataclasses.replace(
            self,
            config=dataclasses.replace(self.config, train=train),
            complete={**self.complete, "train": binding.dump(train)},
        )

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

    @functools.cached_property
    def train_step(self) -> jax.stages.Compiled:
        """(state, batch) -> (state, metrics), compiled. The state given to it is used up."""
        return self.lower().compile()

    @property
    def step_flops(self) -> int:
        """FLOPs of a step over all devices, in matrix products and convolutions as traced: what is
        recomputed counts again."""
        return flops.total(flops.products(self.traced.jaxpr))

    @property
    def model_flops(self) -> int:
        """Useful FLOPs of a step, over all devices: three times the matrix products and
        convolutions of the forward pass (the backward pass has two for each). What is recomputed
        counts once, and what masks leave out counts. Nothing is compiled."""
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (self.state, self.batch)
        )
        leaves, tree = jax.tree.flatten(shapes)
        return 3 * _forward_flops(self.objective, self.config.seed, tuple(leaves), tree)

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


@dataclasses.dataclass(frozen=True)
class OpenRun(Run):
    """A run whose data is open: every length is known in steps, and captions can be tokenised."""

    rows: int  # of the training data
    tokenizer: tokenizers.Tokenizer

    @functools.cached_property  # the loop asks at every step
    def steps(self) -> int:
        """Steps of the whole run."""
        return total_steps(self.config, self.rows)

    @property
    def steps_per_epoch(self) -> int:
        return self.rows // self.batch_size

    def encode(
        self,
        state: TrainState,
        *,
        interrupted: Callable[[], bool] = lambda: False,
        rows: int | None = None,
    ) -> Encode:
        """Both towers at the state's parameters, for evaluators. rows: as for `Encode`."""
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        return Encode(self.objective, variables, self.mesh, self.tokenizer, interrupted, rows=rows)


@functools.lru_cache(maxsize=4)  # alike for any number of micro-batches, which are tried in turn
def _forward_flops(objective: Objective, seed: int, leaves: tuple, tree: Any) -> int:
    """FLOPs of a batch's loss, for a state and a batch of these shapes."""

    def forward(state: TrainState, batch: Batch) -> jax.Array:
        return batch_loss(objective, state.params, state=state, batch=batch, seed=seed)[0]

    return flops.total(flops.products(jax.make_jaxpr(forward)(*tree.unflatten(leaves))))


def total_steps(config: Config, rows: int | None) -> int | None:
    """Steps of a whole run over so many rows; None for a length in epochs of rows not known."""
    return duration(dataclasses.asdict(config.train), "total", where="config.train").steps(
        batch_size=config.train.batch_size, rows=rows
    )


def assemble(config: Mapping, devices=None) -> Run:
    """The run that `config` describes, on `devices` (default: all), with nothing executed.

    Every wrong key, type, missing field and impossible combination raises `ConfigError` here; no
    data is opened. A length in epochs leaves `steps` None until `with_data`.
    """
    bound = bind(Config, config)
    mesh = meshes.make_mesh(bound.mesh, devices)
    train = bound.train
    objective, sections = bind_objective(bound)
    data, source = data_section(bound.data)
    checks.check_clusters(
        data, train.batch_size, getattr(objective, "groups", 1), objective.with_replacement
    )
    checks.check_episodes(train, data, objective, sections["objective"]["name"])
    evals = tuple(EvalSpec.check(name, section) for name, section in bound.evals.items())
    checks.check_train(train, mesh, evals)
    schedule = make_schedule(
        bound.optimizer,
        steps=total_steps(bound, None),
        batch_size=train.batch_size,
        rows=None,
    )
    batch = abstract_batch(objective, train.batch_size, mesh)
    optimizer, state = abstract_state(objective, bound, schedule, batch, mesh)
    meshes.refuse_whole(bound.mesh, mesh, state.params)
    return Run(
        config=bound,
        complete={
            **binding.dump(bound),
            **sections,
            "data": {**binding.dump(data), **source.dump()},
            "evals": {spec.name: spec.dump() for spec in evals},
        },
        mesh=mesh,
        objective=objective.clone(locked=locked(bound.optimizer.freeze, state.params)),
        optimizer=optimizer,
        schedule=schedule,
        data=data,
        source=source,
        evals=evals,
        batch=batch,
        state=state,
    )


def with_data(run: Run, rows: int, tokenizer: tokenizers.Tokenizer) -> OpenRun:
    """The run over training data of so many rows: lengths in epochs become steps, and with them the
    schedule. Raises `ConfigError` for less than a batch, and for a warm-up longer than the run."""
    config = run.config
    checks.check_rows(config.train, run.mesh, rows)
    schedule = make_schedule(
        config.optimizer,
        steps=total_steps(config, rows),
        batch_size=run.batch_size,
        rows=rows,
    )
    variables = {"params": run.state.params, "batch_stats": run.state.batch_stats}
    optimizer, state = abstract_state(
        run.objective, config, schedule, run.batch, run.mesh, variables
    )
    kept = {field.name: getattr(run, field.name) for field in dataclasses.fields(Run)}
    changed = {"schedule": schedule, "optimizer": optimizer, "state": state}
    return OpenRun(**{**kept, **changed}, rows=rows, tokenizer=tokenizer)


def restore(
    workdir: str | os.PathLike,
    step: str | int = "latest",
    *,
    config: Mapping | None = None,
    devices=None,
    mesh: Mapping[str, int] | None = None,
) -> tuple[OpenRun, TrainState]:
    """The run of a workdir and its state at a step: a number, `latest` or `best`.

    config: replaces the workdir's own config, for example with other evals; towers must be equal.
    devices: default all. mesh: sizes of the mesh axes as in `config.mesh`; default: all devices
    along `data`. Both may differ from what the run was trained on: no step is taken.
    """
    folder = pathlib.Path(workdir).expanduser().absolute()
    own = read_json(folder / "config.json")
    base = own if config is None else config
    count = jax.device_count() if devices is None else len(devices)
    batch = -(-base["train"]["batch_size"] // count) * count  # which any mesh divides
    train = {**base["train"], "microbatches": 1, "batch_size": batch}
    run = assemble({**base, "mesh": mesh or {}, "train": train}, devices)
    checkpoints = Checkpoints(folder, keep=run.config.train.keep, best=own["train"]["best"])
    found = checkpoints.step(step)
    saved = checkpoints.restore_run(found)
    opened = with_data(run, saved["rows"], tokenizers.load(saved["tokenizer"]))
    state = checkpoints.restore(found, opened.state)
    checkpoints.close()
    return opened, state
