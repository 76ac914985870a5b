"""Tiny versions of every objective, to hold against the laws."""

import functools
import os
import unittest.mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from clipx.config.binding import find
from clipx.config.files import parse
from clipx.models.base import Tower
from clipx.models.layers import drop, dropout_keys
from clipx.models.text import TextTransformer
from clipx.models.vit import ViT
from clipx.objectives.base import Objective
from clipx.parallel import mesh as meshes
from clipx.parallel.mesh import MeshConfig, batch_sharding, make_mesh, put
from clipx.training.step import embed_rows, row_keys
from clipx.types import Batch, TrainState
from support import ROOT

OBJECTIVES = sorted(
    path.stem
    for path in (ROOT / "clipx" / "objectives").glob("*.py")
    if path.stem not in ("__init__", "base")
)
ROWS = 32
WORDS = {"mask_id": 2, "special_ids": (0, 1, 2, 3), "mask_rate": 0.5}
PLAIN = {"augmentation": "none"}  # the laws test every augmentation policy separately
FIELDS = {  # fields that make a method tiny and turn all of its terms on
    "clip_lite": {**PLAIN, "width": 12},
    "declip": {**PLAIN, **WORDS, "simsiam_width": 12, "queue_size": 48},
    "filip": {**PLAIN, **WORDS, "token_width": 6, "top_k": 3, "contrastive_weight": 0.5},
    "protoclip": {
        **PLAIN,
        "k": 5,
        "projection_dim": 6,
        "projection_hidden": 12,
        "external_weight": 0.5,
        "teacher_width": 4,
        "iterations": 3,
        "restarts": 2,
        "episode_size": 70,
        "batch_size": ROWS,
    },
    "slip": {**PLAIN, "ssl_augmentation": "none", "head_width": 12, "head_dim": 6},
}
# Compiler options for float64. conftest turns these off to compile faster, where jaxlib still has
# them. Without them a softplus in float64 is accurate only to 1e-9, and a value in two results is
# rounded twice.
EXACT = {"xla_cpu_use_fusion_emitters": True} if "emitters" in os.environ["XLA_FLAGS"] else {}
SOFTPLUS = ("siglip", "clip_lite:")  # methods whose loss has a softplus
TRANSFORMERS = {"clip"}  # tested with attention in the towers: the others call towers alike


class Linear(Tower):
    """A tower that compiles fast: one dense layer over each quarter of an image's pixels, or over
    each token's one-hot vector, and the mean of the results."""

    image_size: int = 16
    context: int = 8
    vocab_size: int = 64
    eot_id: int = 3
    dropout: float = 0.1

    @property
    def backbone_width(self):
        return 16

    @nn.compact
    def features(self, x, *, train=False, keys=None):
        parts = 4 if x.ndim == 4 else x.shape[1]
        x = jax.nn.one_hot(x, self.vocab_size) if x.ndim == 2 else x
        x = x.reshape(x.shape[0], parts, -1).astype(self.dtype)
        x = nn.Dense(16, dtype=self.dtype, name="fc")(x)
        x = drop(x, self.dropout, dropout_keys(self.dropout, train, keys), 0)
        return x.mean(axis=1), x


@functools.cache
def objective(name: str, dtype: str = "float32", dropout: float = 0.1) -> Objective:
    """A method by the name of its file, or a variant such as `clip_lite:critic=concat`. The towers
    are linear, except CLIP's own and those of names such as `siglip+towers`, whose heads are
    perceptrons."""
    base, _, variant = name.partition(":")
    name, plus, _ = base.partition("+")
    cls, fields = find("objectives", name, Objective), dict(FIELDS.get(name, {}))
    towers = {"embed_dim": 8, "dtype": dtype, "dropout": dropout}
    if variant or not (plus or name in TRANSFORMERS):
        image, text = Linear(**towers), Linear(**towers)
        for part in filter(None, variant.split(",")):
            key, _, value = part.partition("=")
            fields[key] = parse(value)
    else:
        towers |= {"width": 16, "depth": 1, "heads": 2}
        towers |= {"head": "mlp", "head_dropout": dropout} if plus else {}
        image = ViT(image_size=16, patch=8, **towers)
        text = TextTransformer(vocab_size=64, context=8, eot_id=3, **towers)
    return cls(image=image, text=text, **fields)


def batch(module: Objective, rows: int = ROWS, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    views, size = module.views, module.image.image_size
    text = rng.integers(4, 64, (rows, len(views.texts), module.text.context)).astype(np.int32)
    text[..., -1] = 3
    return Batch(
        image=rng.integers(0, 256, (rows, len(views.pictures), size, size, 3)).astype(np.uint8),
        text=text,
        row=np.arange(rows, dtype=np.int32),
        position=np.arange(rows, dtype=np.int32) + seed,
    )


def memory(module: Objective):
    """The memory before a step. A method with episodes gets a later episode, with random tables and
    labels."""
    before = module.init_memory()
    rng = np.random.default_rng(2)

    def leaf(x):
        values = (
            rng.integers(2, 5, x.shape) if x.dtype == np.int32 else 0.3 * rng.normal(size=x.shape)
        )
        return values.astype(x.dtype)

    return before if module.episode_steps is None else jax.tree.map(leaf, before)


@functools.cache
def variables(name: str):
    module = objective(name)
    keys = row_keys(0, jnp.int32(0), ROWS)

    def init(batch):
        return module.init(jax.random.key(0), batch, keys, module.init_memory())

    rng = np.random.default_rng(0)
    if not isinstance(module.image, Linear):
        made = jax.tree.map(np.asarray, jax.jit(init)(batch(module)))
        if module.image.head == "linear":
            return made
        return as_dtype(
            jax.tree.map(lambda x: x + 0.05 * rng.normal(size=x.shape), made), "float32"
        )
    # compiles nothing
    shapes = jax.eval_shape(init, batch(module))
    params = jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape), shapes["params"])
    stats = jax.tree.map(lambda x: 1 + rng.uniform(size=x.shape), shapes.get("batch_stats", {}))
    return as_dtype({"params": params, "batch_stats": stats}, "float32")


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
            memory(module),
            train=True,
            method="loss",
            mutable=["batch_stats"],
        )
        return loss.value, loss

    exact = dtype == "float64" and name.startswith(SOFTPLUS)
    options = EXACT if exact else None  # it takes three times as long to compile
    return jax.jit(jax.value_and_grad(total, has_aux=True), compiler_options=options)


def memory_after(name: str, dtype: str):
    """The memory that a step leaves, as shapes and dtypes: the step is traced and not compiled."""
    state, data = variables(name), batch(objective(name))
    step = _step(name, dtype, 1, len(data.row))
    (_, loss), _ = jax.eval_shape(step, state["params"], state.get("batch_stats", {}), data)
    return loss.memory


def value_and_grads(
    name: str,
    *,
    dtype: str = "float32",
    mesh: dict | None = None,
    microbatches: int = 1,
    data: Batch | None = None,
    params=None,
):
    """Returns (loss, gradients, metrics, next memory) as a training step on a mesh computes them.
    Even the smallest parameters are sharded where their shape allows."""
    state = as_dtype(variables(name), "float32" if dtype == "bfloat16" else dtype)
    params = state["params"] if params is None else params
    data = batch(objective(name)) if data is None else data
    mesh = mesh or {"data": 1}
    devices = jax.devices()[: np.prod(list(mesh.values()))]
    mesh = make_mesh(MeshConfig(**mesh), devices)
    step = _step(name, dtype, microbatches, len(data.row))
    if mesh.shape["fsdp"] * mesh.shape["tensor"] > 1:
        with unittest.mock.patch.object(meshes, "SMALL", 1):
            only_params = TrainState(0, params, (), {}, {})
            params = jax.device_put(params, meshes.state_shardings(mesh, only_params).params)
    with jax.set_mesh(mesh):
        placed = put(data, batch_sharding(mesh))
        (value, loss), grads = step(params, state.get("batch_stats", {}), placed)
    return jax.tree.map(np.asarray, (value, grads, loss.metrics, loss.memory))
