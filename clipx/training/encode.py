"""Both towers as functions of NumPy rows, for evaluators and the report."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from clipx.data.text.tokenizers import Tokenizer
from clipx.errors import ConfigError, Interrupted
from clipx.objectives.base import Objective
from clipx.parallel import mesh as meshes
from clipx.training import embed_rows
from clipx.training.kept_features import KeptFeatures
from clipx.types import Encoded, PyTree, Stored

_ROWS = 256  # that a tower computes at a time


class Encode:
    """Both towers of an objective at some variables. Every process gets all rows back.

    interrupted: asked before each chunk; `Interrupted` is raised once it returns True.

    Attributes:
        rows: the rows of every program, a multiple of the devices; None if calls differ.
        done: how many rows it has encoded.
    """

    heat_chunk = 32  # rows of heat maps at a time, which score all pairs of a chunk

    def __init__(
        self,
        objective: Objective,
        variables: PyTree,
        mesh: meshes.Mesh,
        tokenizer: Tokenizer,
        interrupted: Callable[[], bool] = lambda: False,
        *,
        rows: int | None = None,
        kept: Mapping[str, KeptFeatures] | None = None,
    ):
        """rows: pad every call to a multiple of so many rows, so that one program serves all sizes;
        None: up to 256 rows are padded to the devices alone, and each size has its own program.
        kept: the features of towers that are frozen below their heads, by tower."""
        self.done = 0
        self.rows = None if rows is None else _rounded(rows, mesh.devices.size)
        self._objective, self._variables, self._mesh = objective, variables, mesh
        self._tokenizer, self._interrupted = tokenizer, interrupted
        self._kept = kept or {}

    def image(self, pictures: np.ndarray, fields: tuple[str, ...] = ()) -> Encoded:
        """The image tower's `fields` (default: those that `similarity` reads) for uint8 pictures
        [n, h, w, 3]."""
        return self._encode("encode_image", pictures, fields)

    def text(self, texts: Sequence[str], fields: tuple[str, ...] = ()) -> Encoded:
        """The text tower's `fields` (default: those that `similarity` reads)."""
        return self._encode("encode_text", self._tokenizer(texts), fields)

    def similarity(
        self, images: Encoded, texts: Encoded, query: Literal["image", "text"] = "image"
    ) -> np.ndarray:
        """The objective's score of every image with every text, float32 [images, texts], by which a
        `query` of one side picks among the other."""
        method = "similarity" if query == "image" else "similarity_of_texts"
        with jax.set_mesh(self._mesh):
            scores = _similarity(self._objective, method, self._variables, images, texts)
        return np.asarray(scores, np.float32)

    def heat(self, pictures: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """Grad-CAM maps of each picture's score with its own text, float32 [n, i, j], at least 0.

        [i, j] is the grid of the image tower's last convolution. Only ratios within one map mean
        anything. Raises `ConfigError` for a tower without convolutions.
        """
        tokens = self._tokenizer(texts)
        return self._by_chunks(_heat_rows, self.heat_chunk, pictures, tokens)

    def _encode(self, method: str, rows: np.ndarray, fields: tuple[str, ...]) -> Encoded:
        fields = tuple(fields) or self._objective.compares
        pixels = math.prod(rows.shape[1:3]) if rows.ndim == 4 else 0
        chunk = self.rows or rows_at_once(self._mesh, pixels)
        tower = method.removeprefix("encode_")
        if tower in self._kept:
            compute = functools.partial(_features_of_rows, tower)
            rows = self._kept[tower](rows, lambda: self._by_chunks(compute, chunk, rows))
        return self._by_chunks(functools.partial(_encode_rows, method, fields), chunk, rows)

    def _by_chunks(
        self, function: Callable[..., PyTree], chunk: int, *arrays: np.ndarray
    ) -> PyTree:
        """`function` of the rows of `arrays`, computed `chunk` rows at a time, as NumPy arrays."""
        sharding, out = meshes.batch_sharding(self._mesh), []
        devices, rows = self._mesh.devices.size, len(arrays[0])
        chunk = _rounded(chunk, devices)
        for start in range(0, rows, chunk):
            if self._interrupted():
                raise Interrupted
            # several chunks share one compiled shape; a single one is padded to the devices only,
            # unless `rows` fixes the shape
            fixed = self.rows is not None or rows > chunk
            size = chunk if fixed else _rounded(rows, devices)
            full = [padded(x[start : start + chunk], size) for x in arrays]
            with jax.set_mesh(self._mesh):
                computed = function(
                    self._objective,
                    meshes.replicated(self._mesh),
                    self._variables,
                    *(meshes.put(x, sharding) for x in full),
                )
            out.append(jax.tree.map(np.asarray, computed))
            self.done += min(chunk, rows - start)
        return jax.tree.map(lambda *chunks: np.concatenate(chunks)[:rows], *out)


def rows_at_once(mesh: meshes.Mesh, pixels: int = 0) -> int:
    """How many rows a tower computes at a time, a multiple of the devices: about 256.

    pixels: those of each picture. CPUs take fewer large ones, 32 of 224 px: these stay in their
    caches (a third faster for EfficientNet) and need an eighth of the memory.
    """
    count = _ROWS
    if pixels and mesh.devices.flat[0].platform == "cpu":
        count = min(count, max(32, count * 64**2 // pixels))
    return _rounded(count, mesh.devices.size)


def _rounded(rows: int, devices: int) -> int:
    """`rows`, rounded up to a multiple of the devices."""
    return -(-rows // devices) * devices


def padded(rows: np.ndarray, size: int) -> np.ndarray:
    """`rows` with the last one repeated, so that there are `size` rows."""
    return np.concatenate([rows, np.repeat(rows[-1:], size - len(rows), axis=0)])


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _encode_rows(
    method: str,
    fields: tuple[str, ...],
    objective: Objective,
    replicated: jax.sharding.Sharding,
    variables: PyTree,
    rows: jax.Array,
) -> Encoded:
    """rows: pictures or token ids, or features, which have two axes of floats."""
    given = Stored(rows) if jnp.issubdtype(rows.dtype, jnp.floating) else rows
    encoded = objective.apply(variables, given, train=False, method=method)
    kept = Encoded(**{name: getattr(encoded, name) for name in fields})
    return jax.lax.with_sharding_constraint(kept, replicated)


def _features_of_rows(
    tower: str,
    objective: Objective,
    replicated: jax.sharding.Sharding,
    variables: PyTree,
    rows: jax.Array,
) -> jax.Array:
    """Pooled features, float32, below the tower's head: what a stored tower's rows have."""
    found = embed_rows.features(objective, tower, False, replicated, variables, rows)
    return found["backbone.npy"]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _similarity(
    objective: Objective, method: str, variables: PyTree, images: Encoded, texts: Encoded
) -> jax.Array:
    scores = objective.apply(variables, images, texts, method=method)
    return scores  # pyright: ignore[reportReturnType]: a tuple only with `mutable`


@functools.partial(jax.jit, static_argnums=(0, 1))
def _heat_rows(
    objective: Objective,
    replicated: jax.sharding.Sharding,
    variables: PyTree,
    pictures: jax.Array,
    tokens: jax.Array,
) -> jax.Array:
    """Grad-CAM of the score of each pair (Selvaraju et al. 2017, arXiv:1610.02391, equations 1 and
    2): a channel's weight is the mean of the score's gradient over the map.

    Rows do not interact in evaluation, so one gradient of the summed scores holds the gradient of
    every pair.
    """
    texts = objective.apply(variables, tokens, train=False, method="encode_text")

    def total(noise: dict) -> tuple[jax.Array, dict]:
        """The sum of the pairs' scores, and the map of the last convolution."""
        images, kept = objective.apply(
            {**variables, **({"perturbations": unflatten_dict(noise)} if noise else {})},
            pictures,
            train=False,
            method="encode_image",
            mutable=["intermediates"],
        )
        maps = flatten_dict(kept.get("intermediates", {}))
        scores = objective.apply(variables, images, texts, method="similarity")
        score = jnp.trace(scores)  # pyright: ignore[reportArgumentType]: as above
        return score, {k: x for k, x in maps.items() if k[-1] == "last_map"}

    shapes = jax.eval_shape(total, {})[1]
    if len(shapes) != 1:
        raise ConfigError(
            "config.image",
            f"{type(objective.image).__name__}, which has no convolutions",
            "an image tower with convolutions, for heat maps",
            "config.image.name=resnet",
        )
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    gradients, maps = jax.grad(total, has_aux=True)(zeros)
    (gradient,), (values,) = (jax.tree.leaves(tree) for tree in (gradients, maps))
    weights = jnp.mean(gradient.astype(jnp.float32), axis=(1, 2), keepdims=True)
    heat = nn.relu(jnp.sum(weights * values.astype(jnp.float32), axis=-1))
    return jax.lax.with_sharding_constraint(heat, replicated)
