"""Features of a tower for blocks of rows: pictures and captions in, arrays for the files of
`clipx.data.features` out."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from clipx.data import pictures
from clipx.data.base import Source
from clipx.data.framing import CENTRE, Framing
from clipx.data.text.tokenizers import Tokenizer
from clipx.data.threads import in_order
from clipx.errors import BadSample
from clipx.objectives.base import Objective, picture_view
from clipx.ops.photometry import photometry
from clipx.parallel import mesh as meshes
from clipx.types import PyTree, View

Block = tuple[int, dict[str, np.ndarray]]  # (rows done, new rows of each file)
Report = Callable[[int, BadSample], None]

CAPTIONS = 2048  # rows of captions between two writes
_KEYS = 1 << 18  # of the photometry of stored crops, apart from those of training
_CROPS = 2  # random stream of stored crops; a loader has the streams 0 and 1 of this place


@dataclasses.dataclass(frozen=True)
class Compute:
    """One tower of an objective at some variables, on a mesh.

    chunk: rows that it computes at a time, a multiple of the devices. tokens: compute token
    features too.
    """

    objective: Objective
    tower: str
    variables: PyTree
    mesh: meshes.Mesh
    chunk: int
    tokens: bool
    framing: Framing = CENTRE

    def put(self, tree: PyTree, held: np.ndarray | None = None) -> PyTree:
        """Arrays of a chunk's rows on the devices. held: the rows that the process has; None: all
        of them."""
        held = np.arange(self.chunk) if held is None else held
        return meshes.put_rows(tree, meshes.batch_sharding(self.mesh), held, self.chunk)

    def __call__(self, rows: jax.Array, **options: Any) -> dict[str, jax.Array]:
        """The arrays `backbone.npy` and `tokens.npy` of a chunk of pictures or token ids, complete
        on every process. `options` are those of `features`."""
        static = self.objective, self.tower, self.tokens, meshes.replicated(self.mesh)
        with jax.set_mesh(self.mesh):
            return features(*static, self.variables, rows, **options)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), static_argnames="view")
def features(
    objective: Objective,
    tower: str,
    tokens: bool,
    replicated: jax.sharding.Sharding,
    variables: PyTree,
    rows: jax.Array,
    *,
    view: View | None = None,
    bad: jax.Array | None = None,
    keys: tuple[int, int, jax.Array] | None = None,
) -> dict[str, jax.Array]:
    """The arrays `backbone.npy` and, with `tokens`, `tokens.npy` of pictures or token ids, float32.

    view, keys: the colours of a random crop, by (seed, number of the crop, number of each row).
    bad: rows whose features are zeros."""
    if view is not None and keys is not None:
        seed, crop, numbers = keys
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _KEYS), crop)
        each = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
        rows = photometry(rows, each, view.photometry)
    pooled, per_token = objective.apply(variables, tower, rows, method="tower_features")
    found = {"backbone.npy": pooled} | ({"tokens.npy": per_token} if tokens else {})

    def leaf(x: jax.Array) -> jax.Array:
        if bad is not None:
            x = jnp.where(bad.reshape(-1, *[1] * (x.ndim - 1)), 0, x)
        return jax.lax.with_sharding_constraint(x.astype(jnp.float32), replicated)

    found = jax.tree.map(leaf, found)
    if bad is not None:
        found["bad.npy"] = jax.lax.with_sharding_constraint(bad, replicated)
    return found


def picture_blocks(
    compute: Compute, source: Source, first: int, *, views: int, seed: int, report: Report
) -> Iterator[Block]:
    """The features of the pictures of all rows from `first` on. views: random crops of each, as the
    objective makes them; 0: the centre alone. `report` gets each bad row."""
    made = compute.objective.views.pictures if views else (picture_view("center", None),)
    crops = [made[i % len(made)] for i in range(max(views, 1))]
    side, size, rows = compute.objective.image.image_size, compute.chunk, len(source)
    own = meshes.local_rows(meshes.batch_sharding(compute.mesh), size)
    starts = range(first, rows, size)

    def read(number: int) -> tuple[np.ndarray, bool]:
        """(the views of a row that this process computes, whether the row is bad)."""
        block, place = divmod(number, len(own))
        row, out = starts[block] + int(own[place]), np.zeros((len(crops), side, side, 3), np.uint8)
        if row < rows:
            draws = np.stack([_draws(seed, row, i) for i in range(len(crops))])
            flips = [crop.flip and coin < 0.5 for crop, coin in zip(crops, draws[:, 0])]
            boxes = draws[:, 1:].reshape(len(crops), pictures.TRIES, 4)
            try:
                scales = [crop.scale for crop in crops]
                given = (source[row], scales, boxes, flips, out, source.limits)
                pictures.views(*given, compute.framing)
            except BadSample as error:
                report(row, error)
                return out, True
        return out, False

    def started(start: int) -> tuple[int, list[dict[str, jax.Array]]]:
        pixels, bad = zip(*itertools.islice(loaded, len(own)))
        numbers = np.arange(start, start + size)[own].astype(np.int32)
        bad, numbers = compute.put((np.array(bad), numbers), own)
        computed = []
        for i, view in enumerate(crops):
            image = compute.put(np.stack([each[i] for each in pixels]), own)
            keys = (seed, i, numbers) if view.photometry.on_device else None
            computed.append(compute(image, view=view, bad=bad, keys=keys))
        return start, computed

    def finished(start: int, computed: list[dict[str, jax.Array]]) -> Block:
        done = min(start + size, rows)
        found = [{k: np.asarray(v)[: done - start] for k, v in x.items()} for x in computed]
        arrays = {k: np.stack([x[k] for x in found], axis=1) for k in found[0]}
        return done, arrays | {"bad.npy": found[0]["bad.npy"]}

    loaded = in_order(read, len(starts) * len(own))
    for each in _one_ahead(map(started, starts)):
        yield finished(*each)


def _draws(seed: int, row: int, crop: int) -> np.ndarray:
    """The random numbers of a stored crop: a coin for the mirror, then the boxes."""
    place = np.random.Philox(key=[seed, _CROPS], counter=[0, 0, crop, row])
    return np.random.Generator(place).random(1 + pictures.TRIES * 4)


def _one_ahead(items: Iterator[Any]) -> Iterator[Any]:
    """`items`, each after the next one is made: the devices compute the next while the host waits
    for this one."""
    before = next(items, None)
    for item in items:
        yield before
        before = item
    if before is not None:
        yield before


def caption_blocks(
    compute: Compute,
    source: Source,
    tokenizer: Tokenizer,
    first: int,
    *,
    captions: int,
    report: Report,
) -> Iterator[Block]:
    """The features of all captions of all rows from row `first` on, before which there are so many
    `captions`. `report` gets each bad row. A row without captions is bad."""

    def read(row: int) -> tuple[tuple[str, ...], bool]:
        try:
            example = source.glance(first + row)
            if not example.texts:
                raise BadSample(example.key, "no caption")
            return example.texts, False
        except BadSample as error:
            report(first + row, error)
            return (), True

    loaded, ends = in_order(read, len(source) - first), np.int64(captions)
    for start in range(first, len(source), CAPTIONS):
        texts, bad = zip(*itertools.islice(loaded, CAPTIONS))
        ids = tokenizer([text for of_row in texts for text in of_row])
        offsets = ends + np.cumsum([len(of_row) for of_row in texts])
        arrays = {"ids.npy": ids, "bad.npy": np.array(bad), **_caption_features(compute, ids)}
        arrays["offsets.npy"] = offsets if start else np.append(0, offsets)
        ends = offsets[-1]
        yield start + len(texts), arrays


def _caption_features(compute: Compute, ids: Int32[np.ndarray, "m n"]) -> dict[str, np.ndarray]:
    """The features of captions. Those of like length are computed together, and padding that none
    of them needs is left out where the tower ignores it."""
    text, size = compute.objective.text, compute.chunk
    lengths = np.full(len(ids), ids.shape[1])
    if text.ignores_padding and not compute.tokens:
        ended, used = ids == text.eot_id, ids != text.pad_id
        last = np.maximum(ended.argmax(axis=1), ids.shape[1] - 1 - used[:, ::-1].argmax(axis=1))
        lengths = np.where(ended.any(axis=1), last + 1, lengths)
    order = np.argsort(lengths, kind="stable")

    def started(start: int) -> tuple[np.ndarray, dict[str, jax.Array]]:
        chosen = order[start : start + size]
        length = min(-(-int(lengths[chosen].max()) // _STEP) * _STEP, ids.shape[1])
        filled = np.resize(chosen, size)  # repeats captions to fill the chunk
        return chosen, compute(compute.put(ids[filled, :length]))

    found: dict[str, np.ndarray] = {}
    for chosen, computed in _one_ahead(map(started, range(0, len(ids), size))):
        for name, x in computed.items():
            rows = np.asarray(x)[: len(chosen)]
            found.setdefault(name, np.empty((len(ids), *rows.shape[1:]), np.float32))[chosen] = rows
    return found


_STEP = 8  # lengths of captions are rounded up to a multiple, so that few programs are compiled
