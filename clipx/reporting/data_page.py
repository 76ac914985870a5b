"""The preview of a run's data: its first rows as the run's model receives them."""

from __future__ import annotations

import dataclasses

import numpy as np

from clipx.reporting import preview
from clipx.training.alone import after_photometry
from clipx.training.feed import TrainingData, loader
from clipx.training.run import OpenRun


def build(run: OpenRun, data: TrainingData, rows: int) -> tuple[str, int]:
    """Returns (the page as HTML, number of rows that it shows). It shows at most `rows` rows, and
    at most one batch."""
    source, views = preview.Remembering(data.source), run.objective.views
    positions = np.arange(min(rows, run.batch_size))
    pieces = loader(run, dataclasses.replace(data, source=source), positions).load(0, positions)
    after = [np.asarray(view) for view in after_photometry(run, pieces)]
    facts = [
        (f"{len(data):,}", "rows"),
        (run.data.source, "source"),
        (run.complete["objective"]["name"], "objective"),
        (str(len(after)), "picture views"),
        (str(len(views.texts)), "text views"),
        (run.config.tokenizer.name, f"{run.tokenizer.vocab_size:,} ids"),
    ]
    descriptions = [preview.describe(*view) for view in views.pictures]
    notes = [(f"view {i}", text) for i, text in enumerate(descriptions, 1)]
    page = preview.page(
        run.data.manifest or str(run.source.values.get("path", run.data.source)),
        facts,
        [*notes, ("texts", ", ".join(views.texts))],
        list(preview.shown(source, pieces, after, views.texts)),
        run.tokenizer,
    )
    return page, len(positions)
