"""What a config's model is before any array exists: the objective with its towers, and the batch
and the state, abstract, with shardings."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from clipx.config import binding as configs
from clipx.config.binding import bind
from clipx.models.layers import Tower
from clipx.objectives.base import Objective
from clipx.parallel import mesh as meshes
from clipx.parallel.mesh import Mesh
from clipx.training.optimizer import make_optimizer
from clipx.training.schema import Config, check_marks, named
from clipx.training.step import init_variables, new_state
from clipx.types import Batch, PyTree, TrainState

_TEXT_GIVEN = ("vocab_size", "context", "eot_id", "pad_id")
_WORDS_GIVEN = frozenset({"mask_id", "special_ids"})  # to objectives that hide words
_SIZES_GIVEN = frozenset({"batch_size"})  # to those with a memory of their rows


def bind_objective(config: Config) -> tuple[Objective, dict[str, dict[str, Any]]]:
    """The objective with its towers, none of them locked yet, and the complete sections of the
    three, as config.json keeps them."""
    image_cls, image_name, image_section = named("models", Tower, config.image, "config.image")
    text_cls, text_name, text_section = named("models", Tower, config.text, "config.text")
    objective_cls, objective_name, section = named(
        "objectives", Objective, config.objective, "config.objective"
    )
    image = bind(image_cls, image_section, where="config.image")
    text = bind(
        text_cls,
        text_section,
        where="config.text",
        **{name: getattr(config.tokenizer, name) for name in _TEXT_GIVEN},
    )
    check_marks(config.tokenizer, text)
    words = _WORDS_GIVEN & configs.fields(objective_cls).keys()
    sizes = _SIZES_GIVEN & configs.fields(objective_cls).keys()
    objective = bind(
        objective_cls,
        section,
        where="config.objective",
        image=image,
        text=text,
        **{name: getattr(config.tokenizer, name) for name in words},
        **{name: getattr(config.train, name) for name in sizes},
        locked=(),
    )
    given = {"image", "text", "locked"} | words | sizes
    return objective, {
        "objective": {"name": objective_name, **configs.dump(objective, given=given)},
        "image": {"name": image_name, **configs.dump(image)},
        "text": {"name": text_name, **configs.dump(text, given=_TEXT_GIVEN)},
    }


def abstract_batch(objective: Objective, rows: int, mesh: Mesh) -> Batch:
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


def abstract_state(
    objective: Objective,
    config: Config,
    schedule: Callable[..., jax.Array],
    batch: Batch,
    mesh: Mesh,
    variables: PyTree | None,
) -> tuple[optax.GradientTransformation, TrainState]:
    """The optimizer, whose rules need the parameters' paths, and the state it makes, abstract.
    `variables`: `params` and `batch_stats`, where they are known."""

    def plain(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)

    with jax.set_mesh(mesh):
        if variables is None:
            init = functools.partial(init_variables, objective, seed=config.seed)
            variables = jax.eval_shape(init, plain(batch))
        optimizer = make_optimizer(config.optimizer, schedule, variables["params"])
        new = functools.partial(new_state, objective, optimizer)
        state = jax.eval_shape(new, plain(variables))
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state,
        meshes.state_shardings(mesh, state),
    )
    return optimizer, state
