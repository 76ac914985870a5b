"""From a run's data to its batches on the devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from clipx.data import row_arrays
from clipx.data.base import Source, fingerprint
from clipx.data.loader import Loader
from clipx.data.order import Sampling, chosen, share
from clipx.parallel import mesh as meshes
from clipx.parallel.mesh import Mesh
from clipx.training.run import OpenRun, Run
from clipx.types import Batch

_KNOWN = ("key", "bad")  # what the host alone knows of a row


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """What a run trains on, opened once."""

    source: Source  # the share of the data that is trained on
    fingerprint: str  # of its rows
    teacher: np.ndarray | None = None  # the external teacher's rows, by row id, still on disk
    clusters: np.ndarray | None = None  # the cluster of each of the source's rows, in its order

    def __len__(self) -> int:
        return len(self.source)


def open_data(run: Run) -> TrainingData:
    """The run's training data. Raises `DataError` for a teacher or clusters made for other rows."""
    data, whole = run.data, run.source.open()
    source = share(whole, data.fraction)
    digest = fingerprint(source)
    if data.teacher is None and data.clusters is None:
        return TrainingData(source, digest)
    # a teacher and clusters cover all rows, also where a fraction is trained on
    made_for = {
        "rows": len(whole),
        "fingerprint": digest if source is whole else fingerprint(whole),
    }
    teacher = clusters = None
    if data.teacher is not None:
        width = run.objective.external_width
        teacher = row_arrays.open_teacher(data.teacher, width=width, **made_for)
    if data.clusters is not None:
        clusters = row_arrays.open_clusters(data.clusters, **made_for)
        if source is not whole:
            clusters = clusters[chosen(len(clusters), data.fraction)]
    return TrainingData(source, digest, teacher, clusters)


def loader(
    run: OpenRun, data: TrainingData, positions: np.ndarray, *, survey: bool = False
) -> Loader:
    """What loads the rows at `positions` of every batch; with `survey`, of every batch of the
    passes before episodes. Raises `ConfigError` where a text that the objective asks for cannot be
    made, `DataError` for less data than a batch."""
    objective = run.objective
    return Loader(
        data.source,
        run.tokenizer,
        objective.views,
        run.data,
        seed=run.config.seed,
        batch_size=run.batch_size,
        positions=positions,
        image_size=objective.image.image_size,
        sampling=Sampling(objective.episode_steps, objective.with_replacement, data.clusters),
        survey=survey,
    )


def to_batch(
    arrays: Mapping[str, np.ndarray], mesh: Mesh, positions: np.ndarray, rows: int
) -> Batch:
    """The global batch of so many rows, on the devices, from what a loader says of those at
    `positions`, which are this process's."""
    sharding = meshes.batch_sharding(mesh)
    kept = {name: x for name, x in arrays.items() if name not in _KNOWN}
    return Batch(**meshes.put_rows(kept, sharding, positions, rows))


def own_rows(run: Run) -> np.ndarray:
    """Which rows of a batch this process loads."""
    return meshes.local_rows(meshes.batch_sharding(run.mesh), run.batch_size)


def feed(run: OpenRun, data: TrainingData, *, start: int) -> Iterator[tuple[Batch, dict[str, Any]]]:
    """Batches from step `start` to the run's end, each with what the host knows of it: `row`, `key`
    and `bad` of the rows that this process read."""
    held = own_rows(run)
    for arrays in loader(run, data, held).batches(start, run.steps):
        known = {name: arrays[name] for name in (*_KNOWN, "row")}
        yield to_batch(arrays, run.mesh, held, run.batch_size), known
