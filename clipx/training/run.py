"""`Run`: everything that a config describes, built and checked, with nothing executed and no data
open; and `OpenRun`, the run once its data is open."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Self

import jax
import optax
from jax.sharding import Mesh

from clipx.config import binding, secrets
from clipx.data import holdout
from clipx.data.base import Source
from clipx.data.config import DataConfig
from clipx.data.text import tokenizers
from clipx.errors import ConfigError
from clipx.evaluators.base import Evaluator
from clipx.objectives.base import Objective
from clipx.ops import flops
from clipx.parallel import mesh as meshes
from clipx.training import checks, kept_features, programs, stored
from clipx.training.assemble import abstract_batch, abstract_state, lock
from clipx.training.average import averaged
from clipx.training.checked import checked, total_steps
from clipx.training.checkpoint import Checkpoints
from clipx.training.encode import Encode
from clipx.training.recovery import refuse_strange_config, run_config
from clipx.training.samples import Pairs, held_out_pairs
from clipx.training.schedule import Schedule, make_schedule
from clipx.training.schema import Config, EvalSpec, SourceSpec
from clipx.training.shown import working
from clipx.training.step import batch_loss, make_train_step
from clipx.types import Batch, Device, TrainState


@dataclasses.dataclass(frozen=True)
class Run:
    """What a config describes. Only `train_step` and `start_compiling` compile, and only `traced`
    and what uses it traces."""

    config: Config
    complete: dict[str, Any]  # the config with all defaults and no secrets, as config.json holds it
    mesh: Mesh
    objective: Objective
    optimizer: optax.GradientTransformation
    schedule: Schedule  # count of updates -> learning rate
    data: DataConfig
    source: SourceSpec
    evals: tuple[EvalSpec, ...]
    batch: Batch  # abstract, with shardings
    state: TrainState  # abstract, with shardings

    @property
    def batch_size(self) -> int:
        """Rows of the global batch."""
        return self.config.train.batch_size

    @functools.cached_property
    def steps(self) -> int | None:
        """Steps of the run; None for a length in epochs until the data is open (`with_data`)."""
        return total_steps(self.config, None)

    @property
    def microbatches(self) -> int:
        """Micro-batches of a step; 1 for "auto" that `fit.fitted` has not resolved yet."""
        count = self.config.train.microbatches
        return 1 if count == "auto" else count

    def with_microbatches(self, count: int) -> Self:
        """The same run with `count` micro-batches, in its config too."""
        train = dataclasses.replace(self.config.train, microbatches=count)
        return dataclasses.replace(
            self,
            config=dataclasses.replace(self.config, train=train),
            complete={**self.complete, "train": binding.dump(train)},
        )

    @functools.cached_property
    def program_key(self) -> Hashable:
        """Equal for runs whose step is the same program."""
        decays = len(self.schedule.ends)  # its lengths are arguments of the program
        return programs.key(
            self.objective, self.config.optimizer, self.mesh, (self.state, self.batch),
            decays, self.config.seed, self.microbatches, make_train_step,
        )  # fmt: skip

    @property
    def traced(self) -> jax.stages.Traced:
        """The training step, traced for this mesh."""

        def trace() -> jax.stages.Traced:
            config, count = self.config, self.microbatches
            step = make_train_step(
                self.objective,
                self.optimizer,
                seed=config.seed,
                microbatches=count,
                freeze=config.optimizer.freeze,
                schedule=self.schedule,
            )
            return programs.traced(step, self.state, self.batch, self.schedule.lengths, self.mesh)

        return programs.kept(("traced", self.program_key), trace)

    def lower(self) -> jax.stages.Lowered:
        """The training step, lowered for this mesh. `.compile()` makes it callable; a call donates
        the state."""
        with jax.set_mesh(self.mesh):
            return self.traced.lower()

    def start_compiling(self) -> concurrent.futures.Future[jax.stages.Compiled]:
        """Traces and lowers the step, and starts to compile it; `train_step` waits for that."""
        key = ("compiled", self.program_key)
        return programs.kept(key, lambda: programs.compiling(self.lower()))

    @functools.cached_property
    def train_step(self) -> programs.Step:
        """The compiled step, (state, batch) -> (state, metrics). A call donates the state."""
        compiled = self.start_compiling().result()
        lengths = meshes.put(self.schedule.lengths, meshes.replicated(self.mesh))
        return programs.Step(compiled, lengths)

    @functools.cached_property
    def step_flops(self) -> int:
        """FLOPs of a step over all devices, in its matrix products and convolutions as traced.
        Recomputation counts again."""
        return flops.total(flops.products(self.traced.jaxpr))

    @property
    def model_flops(self) -> int:
        """Useful FLOPs of a step over all devices: three times the matrix products and convolutions
        of the forward pass, as the backward pass has two for each.

        Recomputation does not count; masked positions do. Traces the loss, and compiles nothing.
        """
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (self.state, self.batch)
        )
        leaves, tree = jax.tree.flatten(shapes)
        # Linen modules are hashable, which the checker cannot know
        return 3 * _forward_flops(self.objective, self.config.seed, tuple(leaves), tree)  # pyright: ignore[reportArgumentType]

    @property
    def pair_flops(self) -> float:
        """FLOPs of training on a pair: its share of a step (`step_flops`) and, with episodes, the
        forward pass of their rows. k-means is not counted."""
        survey = 0 if self.objective.episode_steps is None else self.model_flops // 3
        return (self.step_flops + survey) / self.batch_size

    @property
    def held_out_evals(self) -> tuple[str, ...]:
        """The names of the evals that read rows which the run holds out."""
        return tuple(spec.name for spec in self.evals if spec.held_out)

    def open_parts(self) -> holdout.Parts:
        """The training data, open, without the rows that are held out, and these rows."""
        return holdout.split(self.source.open(), self.data, self.held_out_evals)

    def held_out(self) -> Source:
        """The rows that the run holds out of its training data, open."""
        return self.open_parts().checked(0, "", self.held_out_evals[0])

    def evaluators(self, held_out: Source | None = None) -> dict[str, Evaluator]:
        """The config's evals by name, with their data open. held_out: the rows that are held out,
        if they are open already."""
        size = self.objective.image.image_size
        opened = functools.cache(self.held_out if held_out is None else lambda: held_out)
        return {spec.name: spec.open(size, opened) for spec in self.evals}

    def samples(self, held_out: Source | None = None) -> Pairs | None:
        """The pairs of an eval for the report; None if no eval has examples with captions.
        held_out: as for `evaluators`."""
        opened = self.held_out if held_out is None else lambda: held_out
        return held_out_pairs(self.evals, self.objective.image.image_size, opened)


@dataclasses.dataclass(frozen=True)
class OpenRun(Run):
    """A run whose data is open: its length is known in steps, and it has a tokenizer."""

    rows: int  # of the training data
    tokenizer: tokenizers.Tokenizer
    # of the rows that the run trains on; "": not known, as for a model of another library
    fingerprint: str = ""

    def held_out(self) -> Source:
        """The rows that the run holds out. Raises `ConfigError` if it has trained on them, or if
        the data has changed."""
        return self.open_parts().checked(self.rows, self.fingerprint, self.held_out_evals[0])

    @functools.cached_property  # the loop reads it at every step
    def steps(self) -> int:
        """Steps of the run."""
        steps = total_steps(self.config, self.rows)
        assert steps is not None  # the rows are known
        return steps

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in the training data."""
        return self.rows // self.batch_size

    def encode(
        self,
        state: TrainState,
        *,
        interrupted: Callable[[], bool] = lambda: False,
        rows: int | None = None,
    ) -> Encode:
        """Both towers at the state's parameters, for evaluators. `Interrupted` is raised between
        chunks once `interrupted()` is True. rows: as for `Encode`."""
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        return Encode(
            *(self.objective, variables, self.mesh, self.tokenizer, interrupted),
            rows=rows,
            kept=kept_features.kept(self.objective, self.data, self.tokenizer, state),
        )


@functools.lru_cache(maxsize=4)  # `fit.fewest` asks for several numbers of micro-batches: all alike
def _forward_flops(objective: Objective, seed: int, leaves: tuple, tree: Any) -> int:
    """FLOPs of the loss of a batch. `leaves` and `tree` are those of (state, batch), abstract."""

    def forward(state: TrainState, batch: Batch) -> jax.Array:
        return batch_loss(objective, state.params, state=state, batch=batch, seed=seed)[0]

    return flops.total(flops.products(jax.make_jaxpr(forward)(*tree.unflatten(leaves))))


def assemble(config: Mapping[str, Any], devices: Sequence[Device] | None = None) -> Run:
    """The run that `config` describes, on `devices` (default: all). Nothing is executed, and no
    data is opened.

    Raises `ConfigError` as `checked` does, and for a mesh or rules that do not fit the parameters.
    For a length in epochs, `steps` is None until `with_data`.
    """
    bound, mesh, objective, sections, data, source, evals, schedule = checked(config, devices)
    batch = abstract_batch(objective, bound.train.batch_size, mesh)
    optimizer, state = abstract_state(objective, bound, schedule, batch, mesh)
    meshes.refuse_whole(bound.mesh, mesh, state.params)
    objective = stored.checked(lock(objective, bound.optimizer.freeze, state.params), data)
    complete = {**binding.dump(bound), **sections, "evals": {e.name: e.dump() for e in evals}}
    complete["data"] = {**binding.dump(data), **source.dump()}
    return Run(
        config=bound,
        complete=secrets.cut_all(complete),
        mesh=mesh,
        objective=objective,
        optimizer=optimizer,
        schedule=schedule,
        data=data,
        source=source,
        evals=evals,
        batch=stored.batch(objective, data, state, batch),
        state=state,
    )


def with_data(
    run: Run, rows: int, tokenizer: tokenizers.Tokenizer, fingerprint: str = ""
) -> OpenRun:
    """The run over training data of `rows` rows, with lengths in steps and its final schedule.

    Raises `ConfigError` for less than one batch of rows, and for a warm-up longer than the run.
    """
    config = run.config
    checks.check_rows(config.train, run.mesh, rows)
    schedule = make_schedule(
        config.optimizer,
        steps=total_steps(config, rows),
        batch_size=run.batch_size,
        rows=rows,
        start=config.train.extended_from,
    )
    variables = {"params": run.state.params, "batch_stats": run.state.batch_stats}
    optimizer, state = abstract_state(
        run.objective, config, schedule, run.batch, run.mesh, variables
    )
    kept = {field.name: getattr(run, field.name) for field in dataclasses.fields(Run)}
    changed = {"schedule": schedule, "optimizer": optimizer, "state": state}
    return OpenRun(**{**kept, **changed}, rows=rows, tokenizer=tokenizer, fingerprint=fingerprint)


def restore(
    workdir: str | os.PathLike,
    step: str | int = "latest",
    *,
    config: Mapping[str, Any] | None = None,
    evals: bool = True,
    devices: Sequence[Device] | None = None,
    mesh: Mapping[str, int] | None = None,
    average: bool = False,
) -> tuple[OpenRun, TrainState]:
    """The run of a workdir and its state at a step: a number, `latest` or `best`; "" is the
    best if the run keeps one, else the latest.

    config: replaces the workdir's config, for example with other evals; the towers must match.
    evals: False for a run without its evals, whose data may be gone. devices: default all. mesh:
    axis sizes as in `config.mesh`; default: data-parallel. Both may differ from those of the
    training, since no step is taken. average: the averages of the parameters in place of the last
    ones. Raises `ConfigError` for a folder that is no workdir or has no such checkpoint or
    averages, and `CheckpointError` for a checkpoint that cannot be read.
    """
    folder = pathlib.Path(workdir).expanduser().absolute()
    saved_config = run_config(folder)
    base = dict(saved_config if config is None else config)
    if not evals:
        base |= {"evals": {}, "train": {**base["train"], "best": ""}}
    count = jax.device_count() if devices is None else len(devices)
    batch = -(-base["train"]["batch_size"] // count) * count  # divides over any mesh
    train = {**base["train"], "microbatches": 1, "batch_size": batch}
    run = assemble({**base, "mesh": mesh or {}, "train": train}, devices)
    best = saved_config["train"]["best"]
    checkpoints = Checkpoints(folder, best=best, evals=saved_config["evals"])
    chosen = checkpoints.step(step)
    saved = checkpoints.restore_run(chosen)
    refuse_strange_config(folder, chosen, saved["config"])
    tokenizer = tokenizers.load(saved["tokenizer"])
    opened = with_data(run, saved["rows"], tokenizer, saved.get("fingerprint", ""))
    with working("reading the checkpoint"):
        state = checkpoints.restore(chosen, opened.state)
    if average and (state := averaged(state)) is None:
        found = f"a run without averages in {folder}"
        raise ConfigError("--average", found, "a run with config.optimizer.average, such as 0.999")
    return opened, state
