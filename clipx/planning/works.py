"""`python -m clipx.planning.works step|loss|dense|kmeans OPTIONS`: clipx's side of the comparisons
of `python -m clipx.bench --against=...`, a process of its own as each of its peers is.

OPTIONS is JSON. A request is a number: how often a turn does the work.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipx import losses
from clipx.config import files
from clipx.ops import kmeans as clipx_kmeans
from clipx.parallel import memory, processes
from clipx.parallel.environment import find_process, has_accelerator
from clipx.planning import measure, turns
from clipx.training.run import Run, assemble

Work = Callable[[str], dict[str, Any]]


def config(spec: str, overrides: Sequence[Sequence[str]] = ()) -> dict[str, Any]:
    """The config `spec` without evals, for a step on noise."""
    values = files.load(spec)
    for path, text in [*overrides, ("evals", "{}"), ("train.best", "")]:
        files.override(values, path, text)
    return values


def step(options: Mapping[str, Any]) -> Work:
    """A turn is as many training steps as the request says."""
    run = assemble(config(options["config"], options["overrides"]))
    take = measure.train_steps(run)
    facts = {"parameters": parameters(run)}
    if options.get("flops"):
        facts["flops"] = run.model_flops

    def turn(request: str) -> dict[str, Any]:
        for _ in range(int(request)):
            next(take)
        return facts

    return turn


def parameters(run: Run) -> int:
    """The number of parameters of a run's model."""
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(run.state.params))


def _loss(options: Mapping[str, Any], value: Callable[..., jax.Array]) -> Work:
    rng = np.random.default_rng(0)
    pair = rng.normal(size=(2, options["rows"], options["width"])).astype(np.float32)
    pair /= np.linalg.norm(pair, axis=-1, keepdims=True)
    arguments = jax.block_until_ready((*map(jnp.asarray, pair), jnp.float32(14.3)))
    both = jax.jit(jax.value_and_grad(value, (0, 1, 2))).lower(*arguments).compile()
    turns.reset_peak()
    before = turns.memory()

    def turn(request: str) -> dict[str, Any]:
        for _ in range(int(request)):
            jax.block_until_ready(both(*arguments))
        return {"mib": turns.peak_memory() - before}

    return turn


def loss(options: Mapping[str, Any]) -> Work:
    """A turn is InfoNCE of random unit rows and its gradients, as often as the request says."""
    return _loss(options, lambda a, b, scale: jnp.mean(losses.info_nce(a, b, scale=scale)))


def dense(options: Mapping[str, Any]) -> Work:
    """The same as `loss`, in the plain formulation, which holds all pairs of rows."""

    def value(a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
        logits = scale * a @ b.T
        both = (jax.nn.logsumexp(logits, 1), jax.nn.logsumexp(logits, 0))
        return jnp.mean(0.5 * sum(both) - jnp.diagonal(logits))

    return _loss(options, value)


def kmeans(options: Mapping[str, Any]) -> Work:
    """A turn is a fit of the rows in the file `options["rows"]`, and their last assignment."""
    x, key = jnp.asarray(np.load(options["rows"])), jax.random.key(0)

    def fit(x: jax.Array, key: jax.Array) -> jax.Array:
        iterations = options["iterations"]
        return clipx_kmeans.fit(x, options["clusters"], key=key, iterations=iterations).inertia

    compiled = jax.jit(fit).lower(x, key).compile()

    def turn(request: str) -> dict[str, Any]:
        return {"inertia": float(compiled(x, key))}

    return turn


WORKS = {"step": step, "loss": loss, "dense": dense, "kmeans": kmeans}


def main(name: str, options: Mapping[str, Any]) -> None:
    if os.environ.get("JAX_PLATFORMS") == "cpu" or not has_accelerator():
        memory.keep_pages()  # as the commands do
    if info := find_process(os.environ):
        processes.start(info, {})
    turns.serve(WORKS[name](options), {"jax": jax.__version__})


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
