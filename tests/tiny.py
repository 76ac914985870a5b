"""What the laws are held against: every objective, on one pair of tiny towers."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from clipx.config import find
from clipx.mesh import MeshConfig, batch_sharding, make_mesh, put
from clipx.models.text import TextTransformer
from clipx.models.vit import ViT
from clipx.objectives.base import Objective
from clipx.step import embed_rows, row_keys
from clipx.types import Batch

ROOT = pathlib.Path(__file__).parents[1]
OBJECTIVES = sorted(
    path.stem
    for path in (ROOT / "clipx" / "objectives").glob("*.py")
    if path.stem not in ("__init__", "base")
)
ROWS = 32


@functools.cache
def objective(name: str, dtype: str = "float32", dropout: float = 0.1) -> Objective:
    towers = {"width": 16, "depth": 1, "heads": 2, "embed_dim": 8, "dtype": dtype}
    image = ViT(image_size=16, patch=8, dropout=dropout, **towers)
    text = TextTransformer(vocab_size=64, context=8, eot_id=3, dropout=dropout, **towers)
    return find("objectives", name, Objective)(image=image, text=text)


def batch(module: Objective, rows: int = ROWS, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    views, size = module.views, module.image.image_size
    text = rng.integers(4, 64, (rows, len(views.texts), module.text.context)).astype(np.int32)
    text[..., -1] = 3
    return Batch(
        image=rng.integers(0, 256, (rows, len(views.pictures), size, size, 3)).astype(np.uint8),
        text=text,
        row=np.arange(rows, dtype=np.int32),
        position=np.arange(rows, dtype=np.int32),
    )


@functools.cache
def variables(name: str):
    module = objective(name)
    keys = row_keys(0, jnp.int32(0), ROWS)

    def init(batch):
        return module.init(jax.random.key(0), batch, keys, module.init_memory())

    return jax.tree.map(np.asarray, jax.jit(init)(batch(module)))


def as_dtype(tree, dtype: str):
    def leaf(x):
        return np.asarray(x, dtype) if np.issubdtype(x.dtype, np.floating) else x

    return jax.tree.map(leaf, tree)


@functools.cache
def _step(name: str, dtype: str, microbatches: int, rows: int):
    module = objective(name, dtype)

    def total(params, stats, batch):
        keys = row_keys(0, jnp.int32(5), rows)
        features, after = embed_rows(module, params, stats, batch, keys, microbatches=microbatches)
        loss, _ = module.apply(
            {"params": params, "batch_stats": after},
            features,
            module.init_memory(),
            train=True,
            method="loss",
            mutable=["batch_stats"],
        )
        return loss.value, loss

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def value_and_grads(
    name: str,
    *,
    dtype: str = "float32",
    mesh: dict | None = None,
    microbatches: int = 1,
    data: Batch | None = None,
    params=None,
):
    """The loss, every gradient and the next memory, as a training step computes them on a mesh."""
    state = as_dtype(variables(name), "float32" if dtype == "bfloat16" else dtype)
    params = state["params"] if params is None else params
    data = batch(objective(name)) if data is None else data
    mesh = mesh or {"data": 1}
    devices = jax.devices()[: np.prod(list(mesh.values()))]
    mesh = make_mesh(MeshConfig(**mesh), devices)
    step = _step(name, dtype, microbatches, len(data.row))
    with jax.set_mesh(mesh):
        placed = put(data, batch_sharding(mesh))
        (value, loss), grads = step(params, state.get("batch_stats", {}), placed)
    return jax.tree.map(np.asarray, (value, grads, loss.metrics, loss.memory))
