"""Opens a run's data, and puts its batches on the devices."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Generator, Mapping
from typing import Any

import jax
import numpy as np

from clipx.data import first_look, holdout, row_arrays
from clipx.data.base import Source, fingerprint
from clipx.data.features import FEATURES, FeatureRows
from clipx.data.loader import Loader
from clipx.data.order import Sampling
from clipx.parallel import mesh as meshes
from clipx.parallel.mesh import Mesh
from clipx.training import stored
from clipx.training.run import OpenRun, Run
from clipx.types import Batch, PyTree

_HOST_ONLY = ("key", "bad")  # what a loader reports that does not go to the devices


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """The training data of a run, open."""

    source: Source  # what the run trains on: a share of the data, without what is held out
    fingerprint: str  # of the source's rows
    teacher: np.ndarray | None = None  # the external teacher's rows by row id, memory-mapped
    clusters: np.ndarray | None = None  # the cluster of each row of the source, in its order
    held_out: Source | None = None  # what the run holds out of the data
    rows: np.ndarray | None = None  # those of the complete data that the source has; None: all
    # by tower: stored features of the source's rows, which batches have in place of pictures or
    # captions
    features: Mapping[str, FeatureRows] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what to say of it when the run starts
    left_out: frozenset[int] = frozenset()  # row ids that the run no longer trains on

    def __len__(self) -> int:
        return len(self.source)


def open_data(run: Run, *, look: bool = False) -> TrainingData:
    """Opens the run's training data.

    look: look at some rows first, and raise `DataError` if the run would stop because of them.
    Raises `DataError` for a teacher or clusters of other data.
    """
    data, complete = run.data, run.source.open()
    if look:
        first_look.refuse_unusable(complete, data)
    parts = holdout.split(complete, data, run.held_out_evals)
    digest = fingerprint(parts.train)
    opened = TrainingData(
        parts.train,
        digest,
        held_out=parts.held_out,
        rows=parts.rows,
        features=stored.open_features(data, parts.rows, digest, lambda: fingerprint(complete)),
        notes=tuple(parts.describe(complete, run.held_out_evals)),
    )
    if data.teacher is None and data.clusters is None:
        return opened
    # the files of a teacher and of clusters cover all rows, whatever the run trains on
    made_for: dict[str, Any] = {
        "rows": len(complete),
        "fingerprint": digest if parts.rows is None else fingerprint(complete),
    }
    teacher = clusters = None
    if data.teacher is not None:
        width = run.objective.external_width
        teacher = row_arrays.open_teacher(data.teacher, width=width, **made_for)
    if data.clusters is not None:
        clusters = row_arrays.open_clusters(data.clusters, **made_for)
        if parts.rows is not None:
            clusters = clusters[parts.rows]
    return dataclasses.replace(opened, teacher=teacher, clusters=clusters)


def loader(
    run: OpenRun, data: TrainingData, positions: np.ndarray, *, survey: bool = False
) -> Loader:
    """A loader of the rows at `positions` of every batch.

    survey: load other crops of the same rows, for the pass before an episode. Raises `ConfigError`
    if a text that the objective asks for cannot be made, and `DataError` for less than one batch of
    data.
    """
    objective, left_out = run.objective, data.left_out
    if left_out and data.rows is not None:
        left_out = frozenset(np.flatnonzero(np.isin(data.rows, list(left_out))).tolist())
    return Loader(
        data.source,
        run.tokenizer,
        objective.views,
        run.data,
        seed=run.config.seed,
        batch_size=run.batch_size,
        positions=positions,
        image_size=objective.image.image_size,
        sampling=Sampling(
            objective.episode_steps, objective.with_replacement, data.clusters, left_out
        ),
        survey=survey,
        features=data.features,
        tokens=objective.reads_tokens,
        row_ids=data.rows,
    )


def to_batch(arrays: Mapping[str, PyTree], mesh: Mesh, positions: np.ndarray, rows: int) -> Batch:
    """The global batch of `rows` rows on the devices.

    arrays: what this process's loader gives for the rows at `positions`.
    """
    sharding = meshes.batch_sharding(mesh)
    kept = {name: x for name, x in arrays.items() if name not in _HOST_ONLY}
    features = {name: kept.pop(name) for name in FEATURES if name in kept}
    kept["extra"] = {**kept.get("extra", {}), **features}
    return Batch(**meshes.put_rows(kept, sharding, positions, rows))


def quarantine_file(folder: pathlib.Path) -> pathlib.Path:
    """The file in which this process lists the rows that could not be used."""
    suffix = f"-{jax.process_index()}" if jax.process_count() > 1 else ""
    return folder / f"quarantine{suffix}.jsonl"


def own_rows(run: Run) -> np.ndarray:
    """The positions in a batch of the rows that this process loads."""
    return meshes.local_rows(meshes.batch_sharding(run.mesh), run.batch_size)


def feed(
    run: OpenRun, data: TrainingData, *, start: int
) -> Generator[tuple[Batch, dict[str, Any]], None, None]:
    """The batches from step `start` to the run's end. With each comes a dict of what the host keeps
    of the rows that this process loaded: `row`, `key` and `bad`, as `Loader.batches` gives them."""
    positions = own_rows(run)
    for arrays in loader(run, data, positions).batches(start, run.steps):
        host = {name: arrays[name] for name in (*_HOST_ONLY, "row")}
        yield to_batch(arrays, run.mesh, positions, run.batch_size), host
