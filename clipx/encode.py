"""Both towers as functions of NumPy rows: what evaluators and the report call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np

from clipx import mesh as meshes
from clipx.data.tokenizers import Tokenizer
from clipx.objectives.base import Objective
from clipx.types import Encoded, PyTree


class Interrupted(Exception):
    """Raised from inside an evaluation when the run was told to stop."""


class Encode:
    """The towers as functions of NumPy rows; every process gets all rows back."""

    chunk = 256  # rows at a time, rounded up to the devices

    def __init__(
        self,
        objective: Objective,
        variables: PyTree,
        mesh: meshes.Mesh,
        tokenizer: Tokenizer,
        interrupted: Callable[[], bool] = lambda: False,
    ):
        self._objective, self._variables, self._mesh = objective, variables, mesh
        self._tokenizer, self._interrupted = tokenizer, interrupted
        self._rows = -(-self.chunk // mesh.devices.size) * mesh.devices.size

    def image(self, pictures: np.ndarray, fields: tuple[str, ...] = ()) -> Encoded:
        return self._encode("encode_image", pictures, fields)

    def text(self, texts: Sequence[str], fields: tuple[str, ...] = ()) -> Encoded:
        return self._encode("encode_text", self._tokenizer(texts), fields)

    def similarity(self, images: Encoded, texts: Encoded) -> np.ndarray:
        with jax.set_mesh(self._mesh):
            scores = _similarity(self._objective, self._variables, images, texts)
        return np.asarray(scores, np.float32)

    def _encode(self, method: str, rows: np.ndarray, fields) -> Encoded:
        fields = tuple(fields) or self._objective.compares
        sharding, out = meshes.batch_sharding(self._mesh), []
        for start in range(0, len(rows), self._rows):
            if self._interrupted():
                raise Interrupted
            part = rows[start : start + self._rows]
            # Few rows are padded to the devices alone, many to the one shape that is compiled.
            devices = self._mesh.devices.size
            size = self._rows if len(rows) > self._rows else -(-len(part) // devices) * devices
            padded = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
            with jax.set_mesh(self._mesh):
                done = _encode_rows(
                    self._objective,
                    method,
                    fields,
                    meshes.replicated(self._mesh),
                    self._variables,
                    meshes.put(padded, sharding),
                )
            out.append(jax.tree.map(np.asarray, done))
        return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(rows)], *out)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _encode_rows(objective, method, fields, whole, variables, rows):
    encoded = objective.apply(variables, rows, train=False, method=method)
    kept = Encoded(**{name: getattr(encoded, name) for name in fields})
    return jax.lax.with_sharding_constraint(kept, whole)


@functools.partial(jax.jit, static_argnums=0)
def _similarity(objective, variables, images, texts):
    return objective.apply(variables, images, texts, method="similarity")
