"""Both towers as functions of NumPy rows: what evaluators and the report call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from clipx.data.text.tokenizers import Tokenizer
from clipx.errors import ConfigError, Interrupted
from clipx.objectives.base import Objective
from clipx.parallel import mesh as meshes
from clipx.types import Encoded, PyTree


class Encode:
    """The towers as functions of NumPy rows; every process gets all rows back."""

    chunk = 256  # rows at a time, rounded up to the devices
    heat_chunk = 32  # the same for heat maps, which score all pairs of a chunk

    def __init__(
        self,
        objective: Objective,
        variables: PyTree,
        mesh: meshes.Mesh,
        tokenizer: Tokenizer,
        interrupted: Callable[[], bool] = lambda: False,
        *,
        rows: int | None = None,
    ):
        """rows: pad every call to a multiple of so many rows, so that one program serves all sizes;
        None: up to 256 rows are padded to the devices alone, and each size has its own program."""
        self._rows = rows
        self._objective, self._variables, self._mesh = objective, variables, mesh
        self._tokenizer, self._interrupted = tokenizer, interrupted

    def image(self, pictures: np.ndarray, fields: tuple[str, ...] = ()) -> Encoded:
        return self._encode("encode_image", pictures, fields)

    def text(self, texts: Sequence[str], fields: tuple[str, ...] = ()) -> Encoded:
        return self._encode("encode_text", self._tokenizer(texts), fields)

    def similarity(self, images: Encoded, texts: Encoded) -> np.ndarray:
        with jax.set_mesh(self._mesh):
            scores = _similarity(self._objective, self._variables, images, texts)
        return np.asarray(scores, np.float32)

    def heat(self, pictures: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """Grad-CAM of each picture's score with its own text: float32 [n, i, j], at least 0, on the
        grid of the image tower's last convolutions; only ratios within one row mean anything.
        Raises `ConfigError` for a tower without convolutions."""
        tokens = self._tokenizer(texts)
        return self._by_chunks(_heat_rows, self.heat_chunk, pictures, tokens)

    def _encode(self, method: str, rows: np.ndarray, fields) -> Encoded:
        fields = tuple(fields) or self._objective.compares
        function = functools.partial(_encode_rows, method, fields)
        return self._by_chunks(function, self._rows or self.chunk, rows)

    def _by_chunks(self, function: Callable, chunk: int, *arrays: np.ndarray) -> PyTree:
        """The rows that `function` makes of the arrays' rows, `chunk` at a time."""
        sharding, out = meshes.batch_sharding(self._mesh), []
        devices, rows = self._mesh.devices.size, len(arrays[0])
        whole = -(-chunk // devices) * devices
        for start in range(0, rows, whole):
            if self._interrupted():
                raise Interrupted
            fixed = self._rows is not None or rows > whole
            size = whole if fixed else -(-rows // devices) * devices
            parts = [_padded(x[start : start + whole], size) for x in arrays]
            with jax.set_mesh(self._mesh):
                done = function(
                    self._objective,
                    meshes.replicated(self._mesh),
                    self._variables,
                    *(meshes.put(part, sharding) for part in parts),
                )
            out.append(jax.tree.map(np.asarray, done))
        return jax.tree.map(lambda *parts: np.concatenate(parts)[:rows], *out)


def _padded(rows: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([rows, np.repeat(rows[-1:], size - len(rows), axis=0)])


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _encode_rows(method, fields, objective, whole, variables, rows):
    encoded = objective.apply(variables, rows, train=False, method=method)
    kept = Encoded(**{name: getattr(encoded, name) for name in fields})
    return jax.lax.with_sharding_constraint(kept, whole)


@functools.partial(jax.jit, static_argnums=0)
def _similarity(objective, variables, images, texts):
    return objective.apply(variables, images, texts, method="similarity")


@functools.partial(jax.jit, static_argnums=(0, 1))
def _heat_rows(objective, whole, variables, pictures, tokens):
    """Selvaraju et al. 2017 (arXiv:1610.02391), equations 1 and 2, for the score of a pair: a
    channel's weight is its mean gradient over the map. In evaluation rows are alone, so that one
    gradient of the sum over pairs holds every pair's own."""
    texts = objective.apply(variables, tokens, train=False, method="encode_text")

    def total(noise):
        images, kept = objective.apply(
            {**variables, **({"perturbations": unflatten_dict(noise)} if noise else {})},
            pictures,
            train=False,
            method="encode_image",
            mutable=["intermediates"],
        )
        maps = flatten_dict(kept.get("intermediates", {}))
        scores = objective.apply(variables, images, texts, method="similarity")
        return jnp.trace(scores), {k: x for k, x in maps.items() if k[-1] == "last_map"}

    shapes = jax.eval_shape(total, {})[1]
    if len(shapes) != 1:
        raise ConfigError(
            "config.image",
            f"{type(objective.image).__name__}, which has no map of convolutions",
            "an image tower with convolutions, to draw heat maps of",
            "config.image.name=resnet",
        )
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    slopes, maps = jax.grad(total, has_aux=True)(zeros)
    (slope,), (values,) = (jax.tree.leaves(tree) for tree in (slopes, maps))
    weights = jnp.mean(slope.astype(jnp.float32), axis=(1, 2), keepdims=True)
    heat = nn.relu(jnp.sum(weights * values.astype(jnp.float32), axis=-1))
    return jax.lax.with_sharding_constraint(heat, whole)
