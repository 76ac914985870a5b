"""`head_init="cca"`: both towers' projections start from a regularised canonical correlation
analysis of what the towers give for rows of the training data.

The cosine of two projections is then that of the canonical coordinates, each times the square root
of its correlation. A projection with a bias takes the mean from the features. One without, as
exports have it, is blind along the mean, which costs next to nothing (docs/pretrained.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from clipx.data.order import Subset
from clipx.errors import BadSample, ConfigError
from clipx.models.base import Tower
from clipx.ops import cca
from clipx.parallel import mesh as meshes
from clipx.training import embed_rows
from clipx.training.embedding import tower_at
from clipx.training.feed import TrainingData
from clipx.training.run import OpenRun
from clipx.training.step import new_state
from clipx.types import TrainState


def start(
    run: OpenRun, data: TrainingData, state: TrainState, tell: Callable[[str], None]
) -> TrainState:
    """`state`, that of step 0, with projections from the analysis if the towers ask for it. `tell`
    gets a line about it.

    Raises `ConfigError` for rows that the analysis refuses.
    """
    towers = {"image": run.objective.image, "text": run.objective.text}
    if towers["image"].head_init != "cca":
        return state
    image, text = _features(run, data, state)
    train, dim = run.config.train, towers["image"].embed_dim
    found = cca.fit(image, text, dim=dim, regularizer=train.cca_regularizer)
    weight = np.sqrt(found.correlations)
    sides = {"image": (found.x_mean, found.x_kernel), "text": (found.y_mean, found.y_kernel)}
    params = dict(state.params)
    for name, (mean, kernel) in sides.items():
        projection = _projection(towers[name], mean, kernel * weight)
        shardings = jax.tree.map(lambda x: x.sharding, run.state.params[name]["projection"])
        placed = jax.tree.map(meshes.put, projection, shardings)
        params[name] = {**params[name], "projection": placed}
    first = ", ".join(f"{c:.2f}" for c in found.correlations[:4])
    tell(
        f"heads start from the canonical correlations of {len(image):,} rows: {dim} dimensions, "
        f"{first}, ... {found.correlations[-1]:.2f}"
    )
    variables = {"params": params, "batch_stats": state.batch_stats}
    shardings = jax.tree.map(lambda x: x.sharding, run.state)
    with jax.set_mesh(run.mesh):  # the optimizer may keep copies of the parameters
        return jax.jit(
            lambda variables: new_state(run.objective, run.optimizer, variables),
            out_shardings=shardings,
        )(variables)


def _projection(
    tower: Tower, mean: Float[np.ndarray, " c"], kernel: Float[np.ndarray, "c d"]
) -> dict[str, np.ndarray]:
    """The parameters of a projection to `kernel`, of features around `mean`."""
    wide = mean.astype(np.float64)
    shift = wide @ kernel
    if tower.biased_projection:
        return {"kernel": kernel, "bias": (-shift).astype(np.float32)}
    blind = kernel - np.outer(wide, shift) / max(wide @ wide, 1e-12)
    return {"kernel": blind.astype(np.float32)}


def _features(
    run: OpenRun, data: TrainingData, state: TrainState
) -> tuple[Float[np.ndarray, "n c"], Float[np.ndarray, "n e"]]:
    """(features of each row's picture, means of the features of its captions), of the rows that can
    be read among `train.cca_rows` rows, evenly spaced. What is stored is not computed again."""
    count = min(run.config.train.cca_rows, len(data.source))
    rows = np.linspace(0, len(data.source) - 1, count).astype(np.int64)
    pictures = _pictures(run, data, state, rows)
    captions, counts = _captions(run, data, state, rows)
    if run.data.caption == "first":
        captions = captions[(np.cumsum(counts) - counts)[counts > 0]]
        counts = np.minimum(counts, 1)
    means = _means(captions, counts)
    good = np.isfinite(pictures[:, 0]) & (counts > 0)
    if not good.any():
        found = f"none of {count:,} rows with a picture and a caption"
        raise ConfigError("config.data", found, "rows to fit head_init=cca to")
    return pictures[good], means[good]


def _pictures(
    run: OpenRun, data: TrainingData, state: TrainState, rows: Int[np.ndarray, " n"]
) -> Float[np.ndarray, "n c"]:
    """The image tower's features of the rows' pictures; NaN for a picture that cannot be read."""
    stored = data.features.get("image")
    if stored is not None:
        first_view = np.zeros((len(rows), 1))
        found = stored.images(rows, first_view, False)["image_features"][:, 0]
        bad = np.array([_unless_bad(stored.check, row) is None for row in rows])
    else:
        compute, source = tower_at(run, state, "image"), Subset(data.source, rows)
        blocks = embed_rows.picture_blocks(compute, source, 0, views=0, seed=0, report=_pass)
        parts = [arrays for _, arrays in blocks]
        found = np.concatenate([part["backbone.npy"][:, 0] for part in parts])
        bad = np.concatenate([part["bad.npy"] for part in parts])
    return np.where(bad[:, None], np.nan, found)


def _captions(
    run: OpenRun, data: TrainingData, state: TrainState, rows: Int[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, "m e"], Int[np.ndarray, " n"]]:
    """(the text tower's features of the rows' captions, how many each row has)."""
    stored = data.features.get("text")
    if stored is not None:
        numbers = [_unless_bad(stored.captions, row) or range(0) for row in rows]
        chosen = np.array([i for of_row in numbers for i in of_row], np.int64)
        found = stored.texts(chosen[:, None], False)["text_features"][:, 0]
        return found, np.array([len(of_row) for of_row in numbers])
    compute, source = tower_at(run, state, "text"), Subset(data.source, rows)
    blocks = embed_rows.caption_blocks(compute, source, run.tokenizer, 0, captions=0, report=_pass)
    parts = [arrays for _, arrays in blocks]
    ends = np.concatenate([part["offsets.npy"] for part in parts])
    return np.concatenate([part["backbone.npy"] for part in parts]), np.diff(ends)


def _unless_bad(read: Callable[[int], Any], row: int) -> Any:
    """What `read` gives for a row; None for a bad row."""
    try:
        return read(int(row))
    except BadSample:
        return None


def _pass(row: int, error: BadSample) -> None:
    """Leaves a bad row out: training names it when it meets it."""


def _means(
    rows: Float[np.ndarray, "m c"], counts: Int[np.ndarray, " n"]
) -> Float[np.ndarray, "n c"]:
    """The means of runs of so many rows; zeros for none."""
    sums = np.zeros((len(counts), rows.shape[1]), np.float32)
    np.add.at(sums, np.repeat(np.arange(len(counts)), counts), rows)
    return sums / np.maximum(counts, 1)[:, None].astype(np.float32)
