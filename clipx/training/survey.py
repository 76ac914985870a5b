"""The pass before each episode, the survey: it embeds all rows of the episode, and makes the
episode's memory from their features."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Generator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipx.parallel import mesh as meshes
from clipx.training import programs
from clipx.training.feed import TrainingData, loader, own_rows, to_batch
from clipx.training.run import OpenRun
from clipx.training.step import make_refresh, make_survey_step, put_features
from clipx.types import Batch, Features, TrainState


@dataclasses.dataclass(frozen=True)
class Survey:
    """The surveys of a run over its data. The external teacher's rows come with the batches."""

    run: OpenRun
    data: TrainingData

    def batches(self, *, start: int) -> Generator[Batch, None, None]:
        """The batches of complete episodes, from the first episode that starts at step `start` or
        later. Empty for an objective without episodes.

        They have the rows of `feed.feed` under other crops, with the teacher's rows in `extra`.
        Nothing is loaded before the first batch is taken.
        """
        run, data = self.run, self.data
        if (episode_steps := run.objective.episode_steps) is None:
            return
        positions = own_rows(run)
        first, stop = (-(-step // episode_steps) * episode_steps for step in (start, run.steps))
        for arrays in loader(run, data, positions, survey=True).batches(first, stop):
            extra = {} if data.teacher is None else {"teacher": data.teacher[arrays["row"]]}
            yield to_batch({**arrays, "extra": extra}, run.mesh, positions, run.batch_size)

    @functools.cached_property
    def refresh(
        self,
    ) -> Callable[[TrainState, Callable[[], Batch]], tuple[TrainState, Features]]:
        """A function (state, next_batch) -> (state with a fresh memory, features of the episode).

        state: at the step where the episode starts; donated. next_batch: returns the episode's next
        batch. The features are [b, episode_steps, ...]. Compiles at the first call.
        """
        return programs.kept(("refresh", self.run.program_key), self._make_refresh)

    def _make_refresh(
        self,
    ) -> Callable[[TrainState, Callable[[], Batch]], tuple[TrainState, Features]]:
        run, options = self.run, {"seed": self.run.config.seed}
        embed = make_survey_step(run.objective, microbatches=run.microbatches, **options)
        extra: dict[str, Any] = dict(run.batch.extra)
        width = run.objective.external_width
        rows = meshes.batch_sharding(run.mesh)
        if width is not None:
            shape = (run.batch_size, width)
            extra["teacher"] = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=rows)
        with jax.set_mesh(run.mesh):
            features = jax.eval_shape(embed, run.state, run.batch.replace(extra=extra), 0)
        episode_steps = run.objective.episode_steps
        assert episode_steps is not None  # callers refresh only objectives with episodes

        def zeros() -> Features:
            return jax.tree.map(
                lambda x: jnp.zeros((x.shape[0], episode_steps, *x.shape[1:]), x.dtype), features
            )

        def put(buffer: Features, state: TrainState, batch: Batch, step: jax.Array) -> Features:
            return put_features(buffer, embed(state, batch, step), step % episode_steps)

        buffer_shardings = jax.tree.map(lambda _: rows, features)
        state_shardings = jax.tree.map(lambda x: x.sharding, run.state)
        create = jax.jit(zeros, out_shardings=buffer_shardings)
        put_jitted = jax.jit(put, donate_argnums=0, out_shardings=buffer_shardings)
        renew = jax.jit(
            make_refresh(run.objective, **options), donate_argnums=0, out_shardings=state_shardings
        )

        def refresh(
            state: TrainState, next_batch: Callable[[], Batch]
        ) -> tuple[TrainState, Features]:
            with jax.set_mesh(run.mesh):
                buffer, first = create(), int(state.step)
                for step in range(first, first + episode_steps):
                    buffer = put_jitted(buffer, state, next_batch(), step)
                return renew(state, buffer), buffer

        return refresh

    @functools.cached_property
    def gather(self) -> Callable[[Features, np.ndarray], dict[str, jax.Array]]:
        """A function (features of the episode, places in it) -> the features at these places,
        {"image": [places, d], "text": [places, d]}, replicated."""

        def select(features: Any, places: jax.Array) -> dict[str, jax.Array]:
            by_name = {"image": features.image, "text": features.text}
            return {name: x.reshape(-1, *x.shape[2:])[places] for name, x in by_name.items()}

        def jitted() -> Callable[..., dict[str, jax.Array]]:
            return jax.jit(select, out_shardings=meshes.replicated(self.run.mesh))

        select_jitted = programs.kept(("gather", self.run.mesh), jitted)

        def gather(features: Features, places: np.ndarray) -> dict[str, jax.Array]:
            with jax.set_mesh(self.run.mesh):
                return select_jitted(features, places)

        return gather
