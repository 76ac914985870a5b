"""The parts of a run before any array exists: the objective with its towers, and the abstract batch
and state with their shardings."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from clipx.config import binding
from clipx.config.binding import bind
from clipx.models.base import HEAD, Tower
from clipx.objectives.base import Objective
from clipx.parallel import mesh as meshes
from clipx.parallel.mesh import Mesh
from clipx.training.optimizer import make_optimizer
from clipx.training.parameter_rules import locked
from clipx.training.schema import Config, check_marks, named
from clipx.training.step import initial_variables, new_state
from clipx.types import Batch, PyTree, TrainState


def bind_objective(config: Config) -> tuple[Objective, dict[str, dict[str, Any]]]:
    """(the objective with its towers, none of them locked yet, its complete sections for
    config.json: "objective", "image" and "text")."""
    image_cls, image_name, image_section = named("models", Tower, config.image, "config.image")
    text_cls, text_name, text_section = named("models", Tower, config.text, "config.text")
    objective_cls, objective_name, section = named(
        "objectives", Objective, config.objective, "config.objective"
    )
    image = bind(image_cls, image_section, where="config.image")
    from_tokenizer = {name: f"tokenizer.{name}" for name in text_cls.from_tokenizer}
    text = bind(text_cls, text_section, where="config.text", **filled(config, from_tokenizer))
    check_marks(config.tokenizer, text)
    objective = bind(
        objective_cls,
        section,
        where="config.objective",
        image=image,
        text=text,
        **filled(config, objective_cls.filled),
        locked=(),
        locked_features=(),
    )
    given = {"image", "text", "locked", "locked_features", *objective_cls.filled}
    return objective, {
        "objective": {"name": objective_name, **binding.dump(objective, given=given)},
        "image": {"name": image_name, **binding.dump(image)},
        "text": {"name": text_name, **binding.dump(text, given=from_tokenizer)},
    }


def lock(objective: Objective, freeze: tuple[str, ...], params: PyTree) -> Objective:
    """The objective, told which towers are frozen by the patterns `freeze`."""
    return objective.clone(
        locked=locked(freeze, params), locked_features=locked(freeze, params, HEAD)
    )


def filled(config: Config, fields: Mapping[str, str]) -> dict[str, Any]:
    """The config's value for each field of `fields`, which maps a field to "section.key"."""
    paths = {field: path.partition(".") for field, path in fields.items()}
    return {
        field: getattr(getattr(config, section), key) for field, (section, _, key) in paths.items()
    }


def abstract_batch(objective: Objective, rows: int, mesh: Mesh) -> Batch:
    """A batch of `rows` rows as `jax.ShapeDtypeStruct`s, sharded over the mesh's batch axes."""
    sharding = meshes.batch_sharding(mesh)
    views, size = objective.views, objective.image.image_size

    def array(dtype: DTypeLike, *shape: int) -> Any:
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=sharding)

    return Batch(
        image=array(jnp.uint8, len(views.pictures), size, size, 3),
        text=array(jnp.int32, len(views.texts), objective.text.context),
        row=array(jnp.int32),
        position=array(jnp.int32),
    )


def abstract_state(
    objective: Objective,
    config: Config,
    schedule: Callable[..., jax.Array],
    batch: Batch,
    mesh: Mesh,
    variables: PyTree = None,
) -> tuple[optax.GradientTransformation, TrainState]:
    """The optimizer, and the run's state as `jax.ShapeDtypeStruct`s with shardings.

    variables: abstract `params` and `batch_stats`; None traces the objective's `init` for them.
    """

    def unsharded(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)

    with jax.set_mesh(mesh):
        if variables is None:
            empty = functools.partial(initial_variables, objective, batch, seed=config.seed)
            variables = jax.eval_shape(empty)
        optimizer = make_optimizer(config.optimizer, schedule, variables["params"])
        new = functools.partial(new_state, objective, optimizer)
        state = jax.eval_shape(new, unsharded(variables))
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state,
        meshes.state_shardings(mesh, state),
    )
    return optimizer, state
