"""One training step: micro-batches through the towers, one loss over all rows, one update."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int32, Key

from clipx.models.layers import unit
from clipx.objectives.base import Objective, caption_ids, tower_keys
from clipx.training.optimizer import norm, updates_done
from clipx.training.parameter_rules import frozen
from clipx.types import Batch, Features, Loss, Metrics, PyTree, TrainState, constrain_rows


def row_keys(seed: int, step: Int32[Array, ""] | int, rows: int) -> Key[Array, " b"]:
    """One key per row, a pure function of (seed, step, position in the batch).

    So augmentation and dropout are the same on any mesh, and no random state has to be saved.
    """
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))


# JAX keeps what it has traced: to know the shapes and to compute the values traces this once, and a
# process that assembles an objective again traces nothing
@functools.partial(jax.jit, static_argnames=("objective", "seed"))
def _initialised(objective: Objective, batch: Batch, *, seed: int) -> PyTree:
    keys = row_keys(seed, jnp.int32(0), batch.row.shape[0])
    return objective.init(jax.random.key(seed), batch, keys, objective.init_memory())


def initial_variables(objective: Objective, batch: Batch, *, seed: int) -> PyTree:
    """`params` of step 0, and `batch_stats` if a tower has BatchNorm. Only the shapes of `batch`
    matter."""
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), batch)
    return _initialised(objective, zeros, seed=seed)


def init_state(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    batch: Batch,
    *,
    seed: int,
    pretrained: PyTree | None = None,
) -> TrainState:
    """The state of step 0.

    Call it under `jax.eval_shape` for an abstract state, or under `jax.jit` with output shardings
    to create the arrays sharded. pretrained: parts of `params` and `batch_stats` that replace newly
    initialised ones.
    """
    variables = _replaced(initial_variables(objective, batch, seed=seed), pretrained or {})
    return new_state(objective, optimizer, variables)


def new_state(
    objective: Objective, optimizer: optax.GradientTransformation, variables: PyTree
) -> TrainState:
    """The state of step 0 at these `params` and `batch_stats`."""
    return TrainState(
        step=jnp.int32(0),
        params=variables["params"],
        opt_state=optimizer.init(variables["params"]),
        batch_stats=variables.get("batch_stats", {}),
        memory=objective.init_memory(),
    )


def _replaced(tree: PyTree, given: PyTree) -> PyTree:
    """`tree` with each entry of the nested dict `given` in place of its own."""
    if not isinstance(given, Mapping):
        return given
    return {**tree, **{key: _replaced(tree[key], part) for key, part in given.items()}}


def _slices(tree: PyTree, count: int) -> PyTree:
    """Strided slices [count, b/count, ...]: slice k holds rows k, k+count, ..., so that every slice
    is sharded over all devices."""

    def leaf(x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)

    return constrain_rows(jax.tree.map(leaf, tree), axis=1)


def _unsliced(tree: PyTree) -> PyTree:
    """Undoes `_slices`: [count, b/count, ...] -> [b, ...], in the rows' original order."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree)


def embed_rows(
    objective: Objective,
    params: PyTree,
    batch_stats: PyTree,
    batch: Batch,
    keys: Key[Array, " b"],
    *,
    microbatches: int,
) -> tuple[Features, PyTree]:
    """(features of the whole batch, the running statistics after it).

    The backward pass recomputes each of several micro-batches, so the towers' activations are in
    memory for one micro-batch at a time. The loss still sees every row.
    """

    def embed(stats: PyTree, slice_: tuple[Batch, jax.Array]) -> tuple[PyTree, Features]:
        batch, keys = slice_
        features, changed = objective.apply(
            {"params": params, "batch_stats": stats},
            batch,
            keys,
            train=True,
            method="embed",
            mutable=["batch_stats"],
        )
        return changed.get("batch_stats", stats), constrain_rows(features)

    if microbatches == 1:
        stats, features = embed(batch_stats, (batch, keys))
        return features, stats
    stats, features = jax.lax.scan(
        jax.checkpoint(embed), batch_stats, _slices((batch, keys), microbatches)
    )
    return constrain_rows(_unsliced(features)), stats


def _survey_keys(seed: int, step: Int32[Array, ""], rows: int) -> Key[Array, " b"]:
    """One key per row of the pass before an episode, other keys than those of the training step."""
    return tower_keys(row_keys(seed, step, rows), 1 << 17)


def make_survey_step(
    objective: Objective, *, seed: int, microbatches: int = 1
) -> Callable[[TrainState, Batch, Int32[Array, ""]], Features]:
    """A pure function (state, batch, step) -> the objective's `episode_features` of the batch, in
    evaluation mode. `refresh` takes those of all steps of an episode."""

    def survey_step(state: TrainState, batch: Batch, step: Int32[Array, ""]) -> Features:
        variables = {"params": state.params, "batch_stats": state.batch_stats}

        def embed(slice_: tuple[Batch, jax.Array]) -> Features:
            features = objective.apply(variables, *slice_, train=False, method="embed")
            return constrain_rows(objective.apply(variables, features, method="episode_features"))

        rows = batch, _survey_keys(seed, step, batch.row.shape[0])
        if microbatches == 1:
            return embed(rows)
        return constrain_rows(_unsliced(jax.lax.map(embed, _slices(rows, microbatches))))

    return survey_step


def put_features(buffer: Features, features: Features, step: Int32[Array, ""]) -> Features:
    """`buffer` [b, episode_steps, ...] with `features` [b, ...] written at `step` of the episode.
    Rows stay on the devices that embedded them."""

    def leaf(held: jax.Array, new: jax.Array) -> jax.Array:
        return constrain_rows(jax.lax.dynamic_update_index_in_dim(held, new, step, 1))

    return jax.tree.map(leaf, buffer, features)


def make_refresh(
    objective: Objective, *, seed: int
) -> Callable[[TrainState, Features], TrainState]:
    """A pure function (state, features [b, episode_steps, ...]) -> the state with the memory of the
    episode that starts at the state's step."""

    def refresh(state: TrainState, features: Features) -> TrainState:
        rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), features)
        memory = objective.apply(
            {"params": state.params, "batch_stats": state.batch_stats},
            state.memory,
            constrain_rows(rows),
            key=jax.random.fold_in(jax.random.key(seed), state.step),
            method="refresh",
        )
        return state.replace(memory=memory)

    return refresh


def _shared_captions(batch: Batch) -> Float[Array, ""]:
    """The share of rows whose caption occurs more than once in the batch."""
    ids = jnp.sort(caption_ids(batch.text[:, 0]))
    equal = jnp.concatenate([jnp.zeros(1, bool), ids[1:] == ids[:-1], jnp.zeros(1, bool)])
    return jnp.mean(equal[1:] | equal[:-1], dtype=jnp.float32)


def embedding_variance(features: Features) -> Metrics:
    """`batch/image_variance` and `batch/text_variance`: the mean squared distance of a tower's unit
    rows from their mean. 0: all rows are the same; 1: they point everywhere.

    Rows are `features.image` and `features.text`, or else the means of `image_tokens` and
    `text_tokens`. A tower without either has no metric.
    """
    metrics = {}
    for tower in ("image", "text"):
        rows = getattr(features, tower, None)
        tokens = getattr(features, f"{tower}_tokens", None)
        if rows is None and tokens is not None:
            rows = jnp.mean(tokens, axis=1, dtype=jnp.float32)
        if rows is not None:
            rows = unit(jax.lax.stop_gradient(rows))
            apart = rows - jnp.mean(rows, axis=0)
            metrics[f"batch/{tower}_variance"] = jnp.mean(jnp.sum(apart * apart, axis=-1))
    return metrics


def batch_loss(
    objective: Objective,
    params: PyTree,
    *,
    state: TrainState,
    batch: Batch,
    seed: int,
    microbatches: int = 1,
) -> tuple[Float[Array, ""], tuple[Loss, PyTree]]:
    """(the loss of a batch at `params`, (all that `Objective.loss` returns, running statistics)).

    state: gives the step, the memory and the running statistics before the step.
    """
    keys = row_keys(seed, state.step, batch.row.shape[0])
    features, stats = embed_rows(
        objective, params, state.batch_stats, batch, keys, microbatches=microbatches
    )
    loss, changed = objective.apply(
        {"params": params, "batch_stats": stats},
        features,
        state.memory,
        train=True,
        method="loss",
        mutable=["batch_stats"],
    )
    loss = loss._replace(metrics=loss.metrics | embedding_variance(features))
    return loss.value, (loss, changed.get("batch_stats", stats))


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    microbatches: int = 1,
    freeze: tuple[str, ...] = (),
    schedule: Callable[..., jax.Array] | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """A pure function (state, batch) -> (state, metrics), which the caller jits. A third argument,
    `lengths`, is that of the optimizer's `Schedule`; without it the schedule's own are constants.

    The loss is evaluated once, over the whole batch, for any number of micro-batches: averaging the
    losses of small batches would leave a contrastive loss fewer negatives. freeze: as in
    `config.optimizer`; no gradient of what it matches is computed. schedule: the optimizer's, whose
    learning rate is then among the metrics. If the loss or the gradient is not finite, the step
    changes only the step count, and `skipped` is 1.
    """

    update = optax.with_extra_args_support(optimizer).update

    def train_step(
        state: TrainState, batch: Batch, lengths: jax.Array | None = None
    ) -> tuple[TrainState, Metrics]:
        still = frozen(freeze, state.params)

        def loss_fn(params: PyTree) -> tuple[Float[Array, ""], tuple[Loss, PyTree]]:
            params = jax.tree.map(lambda s, x: jax.lax.stop_gradient(x) if s else x, still, params)
            return batch_loss(
                objective, params, state=state, batch=batch, seed=seed, microbatches=microbatches
            )

        grads, (loss, stats) = jax.grad(loss_fn, has_aux=True)(state.params)
        grad_norm = norm(grads)
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(loss.value)
        updates, opt_state = update(
            grads, state.opt_state, state.params, lengths=lengths, grad_norm=grad_norm
        )
        new = TrainState(
            step=state.step,
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
            batch_stats=stats,
            memory=loss.memory,
        )
        new = jax.tree.map(lambda a, b: jax.lax.select(finite, a, b), new, state)
        metrics = {
            **loss.metrics,
            "batch/duplicate_captions": _shared_captions(batch),
            "grad_norm": grad_norm,
            "param_norm": norm(new.params),
            "skipped": 1.0 - finite.astype(jnp.float32),
        }
        if (updates := updates_done(new.opt_state)) is not None:
            metrics["updates"] = updates
            if schedule is not None:
                given = {} if lengths is None else {"lengths": lengths}
                metrics["learning_rate"] = schedule(updates - 1, **given)
        return new.replace(step=state.step + 1), metrics

    return train_step
