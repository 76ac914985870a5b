"""Runs a frozen tower over every row of a data set, once, and writes its features to a folder that
`clipx.data.features` reads."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from clipx.data.base import Source, fingerprint
from clipx.data.features import FILE, FeatureRows, layout
from clipx.data.quarantine import Quarantine
from clipx.data.resolve import resolve
from clipx.data.row_writer import RowWriter
from clipx.data.threads import progress_bar
from clipx.errors import BadSample, ConfigError, Interrupted, RunError
from clipx.parallel import processes
from clipx.training import embed_rows, encoders, stored
from clipx.training.encode import rows_at_once
from clipx.training.feed import TrainingData, open_data, quarantine_file
from clipx.training.initial import init, open_tokenizer
from clipx.training.run import OpenRun, assemble, checked, with_data
from clipx.types import TrainState


@dataclasses.dataclass(frozen=True)
class Embedder:
    """One tower of a run at a state, and the rows to embed.

    views: random crops of each picture, as the objective makes them; 0: the centre alone. tokens:
    whether token features are stored too. stop: asked after each block. tell: gets what to print.
    """

    run: OpenRun
    state: TrainState
    tower: str
    source: Source
    fingerprint: str  # of the source
    folder: pathlib.Path
    views: int = 0
    tokens: bool = False
    stop: Callable[[], bool] = lambda: False
    tell: Callable[[str], None] = lambda line: None

    @functools.cached_property
    def about(self) -> dict[str, Any]:
        """What identifies the features, as features.json has it."""
        objective = self.run.objective
        return {
            "tower": self.tower,
            "rows": len(self.source),
            "fingerprint": self.fingerprint,
            "weights": stored.digest(self.state, self.tower),
            "preprocessing": stored.preprocessing(
                objective, self.tower, self.run.tokenizer, self.run.data.framing
            ),
            "tokens": self.tokens,
            "views": self.views,
            "crops": stored.crops(objective, self.views),
            "seed": self.run.config.seed if self.views else None,
        }

    def write(self) -> FeatureRows:
        """Writes the features, from where an interrupted call has stopped, and returns them. All
        processes call it. Complete features of the same tower, weights and rows are kept.

        Raises `Interrupted` if asked to stop, and `RunError` for too many bad rows and for features
        that are not finite.
        """
        about = self.about  # before anything that processes may find at different times
        if self._complete():
            return FeatureRows(str(self.folder))
        started, rows, bad = time.perf_counter(), len(self.source), 0
        with contextlib.ExitStack() as stack:
            writer = None
            if jax.process_index() == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / FILE).unlink(missing_ok=True)
                writer = stack.enter_context(self._writer())
            first, captions = _agreed(
                (writer.done, writer.written["backbone.npy"]) if writer else (0, 0)
            )
            if first:
                self.tell(f"{self.tower} features: going on after {first:,} of {rows:,} rows")
            shown = stack.enter_context(progress_bar(rows, f"{self.tower} features"))
            shown.update(first)
            for done, arrays in self._blocks(first, captions):
                bad += int(arrays["bad.npy"].sum())
                self._refuse(done, bad, arrays["backbone.npy"])
                if writer:
                    writer.write(done, arrays)
                shown.update(done - shown.n)
                if done < rows and self.stop():
                    raise Interrupted
            if writer:
                writer.finish(about)
        processes.barrier(f"features {self.tower}")
        self.tell(self._summary(rows - first, time.perf_counter() - started, bad))
        return FeatureRows(str(self.folder))

    def _complete(self) -> bool:
        """Whether the folder has these very features."""
        complete = False
        if (self.folder / FILE).exists():
            found = FeatureRows(str(self.folder)).about
            complete = {key: found.get(key) for key in self.about} == self.about
        return bool(_agreed((int(complete),))[0])

    def _writer(self) -> RowWriter:
        objective, batch = self.run.objective, self.run.batch
        like = batch.text if self.tower == "text" else batch.image
        one = jax.ShapeDtypeStruct((1, *like.shape[2:]), like.dtype)
        pooled, tokens = stored.features_of(objective, self.state, self.tower, one)
        arrays = layout(
            self.tower,
            views=max(self.views, 1),
            width=pooled.shape[1],
            tokens=tokens.shape[1:] if self.tokens else (),
            context=batch.text.shape[2],
        )
        return RowWriter(self.folder / FILE, arrays, self.about)

    def _blocks(self, first: int, captions: int) -> Iterator[embed_rows.Block]:
        compute = tower_at(self.run, self.state, self.tower, tokens=self.tokens)
        rows, options = (compute, self.source), {"report": self._report}
        if self.tower == "text":
            tokenizer = self.run.tokenizer
            return embed_rows.caption_blocks(*rows, tokenizer, first, captions=captions, **options)
        seed = self.run.config.seed
        return embed_rows.picture_blocks(*rows, first, views=self.views, seed=seed, **options)

    def _refuse(self, done: int, bad: int, backbone: np.ndarray) -> None:
        """Raises `RunError` for features that are not finite, and for more bad rows than a run
        allows."""
        if not np.isfinite(backbone).all():
            dtype = getattr(self.run.objective, self.tower).dtype
            raise RunError(
                f"{self.tower} features before row {done:,} have NaN or infinity: look at the "
                f"weights, or at config.{self.tower}.dtype={dtype}"
            )
        limit = self.run.data.max_bad_fraction
        if bad > limit * max(done, 10_000):
            raise RunError(
                f"{bad} of {done} rows could not be used, more than "
                f"config.data.max_bad_fraction={limit}; {self.folder}/quarantine.jsonl names them"
            )

    def _report(self, row: int, error: BadSample) -> None:
        """Lists and names a bad row."""
        bad = {"row": row, "key": error.key, "reason": error.reason}
        for reason in self._quarantine.add(0, [bad]):
            self.tell(f"bad row, without features: {reason}")

    @functools.cached_property
    def _quarantine(self) -> Quarantine:
        return Quarantine(quarantine_file(self.folder))

    def _summary(self, rows: int, seconds: float, bad: int) -> str:
        crops = f" x {self.views} crops" if self.views else ""
        named = f"; {bad:,} bad row(s), which quarantine.jsonl names" if bad else ""
        return (
            f"{self.tower} features: {rows:,} rows{crops} in {seconds:,.1f} s "
            f"({rows / max(seconds, 1e-9):,.0f} rows/s), in {self.folder}{named}"
        )


def tower_at(
    run: OpenRun, state: TrainState, tower: str, *, tokens: bool = False
) -> embed_rows.Compute:
    """One tower of a run at a state, which computes features some hundred rows at a time."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    chunk = rows_at_once(run.mesh, run.objective.image.image_size**2 if tower == "image" else 0)
    given = (run.objective, tower, variables, run.mesh, chunk, tokens)
    return embed_rows.Compute(*given, run.data.framing)


def open_embedder(
    config: Mapping[str, Any], tower: str, folder: pathlib.Path, **options: Any
) -> Embedder:
    """An embedder of the complete data of a config, at the state that its runs start from.

    `options` are the embedder's `views`, `tokens`, `stop` and `tell`. Raises `ConfigError` for
    crops that the config's objective would not read.
    """
    say = on_first_process(options["tell"])
    config = encoders.resolve(config, None, say)
    checked(config)
    live = {name: {**config[name], "cache": False} for name in stored.TOWERS}
    live["data"] = {**config["data"], "features": {}}
    run = assemble(resolve({**config, **live}, None, say))
    stored.refuse_mixture(run.data, "config.data.source")
    if tower == "image":
        stored.check_crops(run.objective, options["views"], "--views")
    elif options["views"]:
        raise ConfigError("--views", str(options["views"]), "0 for texts: all captions are written")
    data = open_data(run, look=True)
    complete = run.source.open()
    tokenizer = open_tokenizer(run, data.source)
    opened = with_data(run, len(data), tokenizer, data.fingerprint)
    digest = data.fingerprint if data.rows is None else fingerprint(complete)
    return Embedder(
        opened, init(opened), tower, complete, digest, folder, **{**options, "tell": say}
    )


def on_first_process(tell: Callable[[str], Any]) -> Callable[[str], None]:
    """`tell`, which the other processes of a run do not call."""
    return lambda text: tell(text) if jax.process_index() == 0 else None


def with_features(
    run: OpenRun,
    data: TrainingData,
    state: TrainState,
    folder: pathlib.Path,
    *,
    stop: Callable[[], bool],
    tell: Callable[[str], None],
) -> TrainingData:
    """The data, with the features of all towers that the run does not run. Those that `cache` asks
    for are written to `folder` first, unless they are there.

    state: where training starts. Raises `ConfigError` for features of other weights, and as
    `Embedder.write` does.
    """
    features = dict(data.features)
    for name in stored.towers(run.objective, run.data):
        if name in features:
            stored.refuse_other_weights(state, name, features[name])
            continue
        embedder = Embedder(
            run,
            state,
            name,
            data.source,
            data.fingerprint,
            folder / name,
            views=run.data.features.views if name == "image" else 0,
            tokens=run.objective.reads_tokens,
            stop=stop,
            tell=tell,
        )
        features[name] = embedder.write()
    return dataclasses.replace(data, features=features)


def _agreed(numbers: tuple[int, ...]) -> tuple[int, ...]:
    """The numbers of process 0, on every process."""
    if jax.process_count() == 1:
        return numbers
    return tuple(multihost_utils.broadcast_one_to_all(np.array(numbers, np.int64)).tolist())
