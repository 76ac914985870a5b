"""The passes before a run's episodes: the batches of one as they are seen then, and the memory that
is made of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from clipx.parallel import mesh as meshes
from clipx.training.feed import TrainingData, loader, own_rows, to_batch
from clipx.training.run import OpenRun
from clipx.training.step import make_refresh, make_survey_step, put_features
from clipx.types import Batch, Features, TrainState


@dataclasses.dataclass(frozen=True)
class Survey:
    """Of a run over its data, whose external teacher's rows go with the batches."""

    run: OpenRun
    data: TrainingData

    def batches(self, *, start: int) -> Iterator[Batch]:
        """The batches of whole episodes, from the first that starts at step `start` or later: the
        rows that `feed.feed` gives, under other crops, with the teacher's rows. Nothing is loaded
        before the first is asked for; an objective without episodes has none."""
        run, data = self.run, self.data
        if (episode := run.objective.episode_steps) is None:
            return
        held = own_rows(run)
        first, stop = (-(-step // episode) * episode for step in (start, run.steps))
        for arrays in loader(run, data, held, survey=True).batches(first, stop):
            extra = {} if data.teacher is None else {"teacher": data.teacher[arrays["row"]]}
            yield to_batch({**arrays, "extra": extra}, run.mesh, held, run.batch_size)

    @functools.cached_property
    def refresh(
        self,
    ) -> Callable[[TrainState, Callable[[], Batch]], tuple[TrainState, Features]]:
        """(state, a function that returns the episode's next batch) -> the state at whose step an
        episode starts, with the memory of that episode, and what `refresh` was given, [b, episode,
        ...]. Compiled at the first call. The state given to it is used up."""
        run, options = self.run, {"seed": self.run.config.seed}
        embed = make_survey_step(run.objective, microbatches=run.microbatches, **options)
        extra, width = {}, run.objective.external_width
        rows = meshes.batch_sharding(run.mesh)
        if width is not None:
            shape = (run.batch_size, width)
            extra["teacher"] = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=rows)
        with jax.set_mesh(run.mesh):
            features = jax.eval_shape(embed, run.state, run.batch.replace(extra=extra), 0)
        episode = run.objective.episode_steps

        def zeros():
            return jax.tree.map(
                lambda x: jnp.zeros((x.shape[0], episode, *x.shape[1:]), x.dtype), features
            )

        def put(buffer, state, batch, step):
            return put_features(buffer, embed(state, batch, step), step % episode)

        buffers = jax.tree.map(lambda _: rows, features)
        state = jax.tree.map(lambda x: x.sharding, run.state)
        create = jax.jit(zeros, out_shardings=buffers)
        put = jax.jit(put, donate_argnums=0, out_shardings=buffers)
        renew = jax.jit(
            make_refresh(run.objective, **options), donate_argnums=0, out_shardings=state
        )

        def refresh(state: TrainState, batch: Callable[[], Batch]) -> tuple[TrainState, Features]:
            with jax.set_mesh(run.mesh):
                buffer, first = create(), int(state.step)
                for step in range(first, first + episode):
                    buffer = put(buffer, state, batch(), step)
                return renew(state, buffer), buffer

        return refresh

    @functools.cached_property
    def gather(self) -> Callable[[Features, np.ndarray], dict[str, jax.Array]]:
        """(what `refresh` was given, places in the episode) -> its features there, by name."""

        def gather(features: Features, places: jax.Array) -> dict[str, jax.Array]:
            whole = {"image": features.image, "text": features.text}
            return {name: x.reshape(-1, *x.shape[2:])[places] for name, x in whole.items()}

        gather = jax.jit(gather, out_shardings=meshes.replicated(self.run.mesh))

        def of_mesh(features: Features, places: np.ndarray) -> dict[str, jax.Array]:
            with jax.set_mesh(self.run.mesh):
                return gather(features, places)

        return of_mesh
