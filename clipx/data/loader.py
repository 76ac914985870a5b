"""Turns a source into batches: selects rows, decodes and crops images, tokenises captions.

All randomness of one example is a function of (seed, step, position in the batch), and the order
of rows is a function of (seed, epoch). So a batch does not depend on the number of processes or
workers, nor on restarts, and the step alone says where a run continues.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import UInt8

from clipx.data import activity, pictures
from clipx.data.base import Example, Source
from clipx.data.config import DataConfig
from clipx.data.features import FeatureRows
from clipx.data.order import EPOCHS, Sampling, Schedule
from clipx.data.reading import patiently
from clipx.data.supply import PictureArrays, Supply
from clipx.data.text import cleaning
from clipx.data.text.augment import TextAugment
from clipx.data.text.tokenizers import Tokenizer
from clipx.data.worker import Workers
from clipx.errors import BadSample, DataError

if TYPE_CHECKING:
    from grain import IterDataset

    from clipx.types import Views  # imports JAX, which workers run without

# rows per work item: few enough to spread a batch over workers, enough to amortise the transfer
CHUNK = 32
_READY_BYTES = 1 << 28  # upper bound on decoded pixels that wait for their turn
_SURVEY = 4  # random stream; 0 to 2 are for a row's image and texts, 3 for the choice of the row
_MOST_BAD = 100  # consecutive bad rows after which the data set counts as unusable

Pieces = dict[str, np.ndarray]


class _Loaded(NamedTuple):
    """One row of a batch, without its pictures."""

    source_row: int
    row: int  # `Example.row`
    key: str
    place: int  # in the epoch or episode
    texts: list[str]  # or the numbers of captions whose features are stored
    draws: np.ndarray  # one number in [0, 1) for each picture view
    bad: str  # as in `Loader.batches`


class Loader:
    """Loads the rows at `positions` of every global batch of a run.

    A bad row is replaced by the next row in the epoch's order. All other rows keep their places.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        views: Views,
        data: DataConfig,
        *,
        seed: int,
        batch_size: int,
        positions: np.ndarray,
        image_size: int,
        sampling: Sampling = EPOCHS,
        survey: bool = False,
        features: Mapping[str, FeatureRows] | None = None,
        tokens: bool = False,
        row_ids: np.ndarray | None = None,
    ):
        """
        batch_size: rows of the global batch.
        positions: the rows of the global batch that this process loads, from 0 to batch_size - 1.
        survey: load the same rows and captions with other crops, for the pass before an episode.
        features: stored features of the tower "image" or "text" or both, which are loaded in place
        of its pictures or captions. tokens: load token features too. row_ids: `Example.row` of
        each row of the source; None: its index.

        Raises `ConfigError` if `views` asks for augmented texts and `data.text_augment` needs a
        WordNet that is not installed, and `DataError` for data with less than one batch of rows.
        """
        self.source, self.tokenizer, self.data = source, tokenizer, data
        # Only plain values: workers unpickle the loader without JAX, which `views` needs
        self.crops = tuple(view.scale for view in views.pictures)
        self.flips = tuple(view.flip for view in views.pictures)
        self.texts, self.mirror_words = views.texts, views.mirror_words
        self._augment = TextAugment(data.text_augment) if "augmented" in self.texts else None
        if len(source) < batch_size:
            raise DataError(
                f"the data has {len(source)} rows, expected at least one batch of {batch_size}; "
                "set a smaller train.batch_size or add data"
            )
        self.positions, self.image_size, self.survey = positions, image_size, survey
        self.schedule = Schedule(len(source), batch_size, seed, sampling)
        self.features, self.tokens, self.row_ids = dict(features or {}), tokens, row_ids

    @property
    def steps_per_epoch(self) -> int:
        return self.schedule.steps_per_epoch

    def batches(self, start: int, stop: int) -> Iterator[Pieces]:
        """Yields one dict per step from `start` to `stop` (exclusive), with n = len(positions):

            image     uint8 [n, v, h, w, 3], v views
            text      int32 [n, u, context], u texts
            row       int32 [n], `Example.row`
            position  int32 [n], the place in the epoch or episode
            key       str [n], `Example.key`
            bad       str [n], '' or a JSON list of the bad rows (`row`, `key`, `reason`) that the
                      row at this place replaces

        With stored features also `image_features` float32 [n, v, c] and `text_features` [n, u, c],
        and `image_tokens` and `text_tokens` if asked for. `image` has no views then.

        Raises `DataError` after 100 consecutive bad rows, `StorageError` for a file that is no
        longer as it was, and otherwise as `Supply`.
        """
        positions = np.asarray(self.positions)
        chunks = [positions[i : i + CHUNK] for i in range(0, len(positions), CHUNK)]
        timeout, steps = self.data.timeout, range(start, stop)
        workers = Workers(self.data.workers, timeout) if self.data.workers else None
        whole = None if workers else PictureArrays(self._image_shape(len(positions)))
        supply = Supply(
            lambda: iter(self._pieces(chunks, steps, workers, whole)),
            len(steps) * len(chunks),
            workers,
            timeout,
        )
        try:
            for step in steps:
                pieces = [next(supply) for _ in chunks]
                done = {"image": whole.take(step)} if whole else {}
                left = [name for name in pieces[0] if name not in done]
                yield {**done, **{n: np.concatenate([p[n] for p in pieces]) for n in left}}
        finally:
            supply.close()

    def _pieces(
        self,
        chunks: list[np.ndarray],
        steps: range,
        workers: Workers | None,
        whole: PictureArrays | None,
    ) -> IterDataset[Pieces]:
        """Every chunk of every step, in order, as a grain data set. Threads, which write to `whole`
        batches of pictures, or `workers` load chunks ahead of time."""
        import grain

        load = functools.partial(_load_chunk, self, chunks, whole)
        pieces = grain.MapDataset.range(steps.start * len(chunks), steps.stop * len(chunks)).map(
            workers.ship(load) if workers else load
        )
        size = sum(x.row_bytes for x in self.features.values())
        if "image" not in self.features:
            size += len(self.crops) * self.image_size**2 * 3
        ready = max(2, min(2 * len(chunks), _READY_BYTES // (CHUNK * size)))
        if workers is None:
            threads = min(pictures.cores(), 16)
            return pieces.to_iter_dataset(
                grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(ready, threads))
            )
        from absl import flags

        if not flags.FLAGS.is_parsed():  # grain reads a flag, even if no command parsed flags
            flags.FLAGS.mark_as_parsed()
        data = pieces.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
        # small arrays travel faster without shared memory
        options = grain.experimental.DatasetOptions(min_shm_size=1 << 16)
        return grain.experimental.WithOptionsIterDataset(data, options).mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=workers.count, per_worker_buffer_size=max(1, ready // workers.count)
            ),
            worker_init_fn=workers.init,
        )

    def _image_shape(self, rows: int) -> tuple[int, ...]:
        views = 0 if "image" in self.features else len(self.crops)
        return rows, views, self.image_size, self.image_size, 3

    def load(
        self,
        step: int,
        positions: np.ndarray,
        image: UInt8[np.ndarray, "n v h w 3"] | None = None,
    ) -> Pieces:
        """The rows at `positions` of one step's global batch, in the format of `batches`. image:
        where to write the pictures; None: to a new array."""
        n = len(positions)
        image = np.empty(self._image_shape(n), np.uint8) if image is None else image
        loaded = [self._example(step, int(p), out) for p, out in zip(positions, image)]
        if "text" in self.features:
            numbers = np.array([each.texts for each in loaded], np.int64)
            texts = self.features["text"].texts(numbers, self.tokens)
        else:
            with activity.doing(f"tokenising the captions of step {step:,}"):
                ids = self.tokenizer([text for each in loaded for text in each.texts])
            texts = {"text": ids.reshape(n, len(self.texts), -1)}
        stored = {}
        if "image" in self.features:
            indices = np.array([each.source_row for each in loaded])
            draws = np.array([each.draws for each in loaded])
            stored = self.features["image"].images(indices, draws, self.tokens)
        return {
            "image": image,
            **texts,
            **stored,
            "row": np.array([each.row for each in loaded], np.int32),
            "position": np.array([each.place for each in loaded], np.int32),
            "key": np.array([each.key for each in loaded], np.str_),
            "bad": np.array([each.bad for each in loaded], np.str_),
        }

    def _example(self, step: int, position: int, out: UInt8[np.ndarray, "v h w 3"]) -> _Loaded:
        """What a position of a step's batch shows. Writes the views to `out`."""
        schedule = self.schedule
        # sample all numbers up front, so that they do not depend on which rows turn out to be bad
        count = len(self.crops)
        which, coin, *boxes = schedule.rng(step, position).random(2 + count * pictures.TRIES * 4)
        if self.survey:
            coin, *boxes = schedule.rng(step, position, _SURVEY).random(1 + len(boxes))
        draws = np.reshape(boxes, (count, pictures.TRIES, 4))
        another, *coins = schedule.rng(step, position, 1).random(count)
        if self.mirror_words:
            coins = [coin] * (count - 1)  # one coin for all views, which the captions follow
        flips = [f and c < 0.5 for f, c in zip(self.flips, (coin, *coins), strict=True)]
        bad = []
        candidates = min(len(self.source), _MOST_BAD)
        for skip in range(candidates):
            row = schedule.row(step, position, skip)
            try:
                example = patiently(functools.partial(self._read, row), self.data.timeout)
                chosen = self._choose(example, which, step // self.steps_per_epoch)
                if len(out):
                    with activity.doing(f"decoding {example.key}"):
                        limits, framing = self.data.limits, self.data.framing
                        pictures.views(example, self.crops, draws, flips, out, limits, framing)
            except BadSample as error:
                bad.append({"row": self._id(row), "key": error.key, "reason": error.reason})
                continue
            texts = self._texts(example.texts, chosen, another, flips[0], step, position)
            place = schedule.place(step, position)
            said = json.dumps(bad) if bad else ""
            return _Loaded(row, example.row, example.key, place, texts, draws[:, 0, 0], said)
        raise DataError(
            f"{candidates} consecutive rows cannot be used; the first is "
            "{key}: {reason}".format(**bad[0])
        )

    def _id(self, index: int) -> int:
        """`Example.row` of a row of the source."""
        return index if self.row_ids is None else int(self.row_ids[index])

    def _read(self, index: int) -> Example:
        """The source's row, without what is stored. Captions whose features are stored are their
        numbers."""
        stored = self.features
        texts = stored["text"].captions(index) if "text" in stored else None
        if "image" not in stored:
            example = self.source[index]
        else:
            stored["image"].check(index)
            if texts is not None:
                row = self._id(index)
                return Example(b"", texts, row, f"row {row}")  # pyright: ignore[reportArgumentType]
            example = self.source.glance(index)
        return example if texts is None else example._replace(texts=texts)

    def _choose(self, example: Example, which: float, epoch: int) -> int:
        """The index of the caption to use. Raises `BadSample` if there is none to use."""
        if not example.texts:
            raise BadSample(example.key, "no caption")
        count, chosen = len(example.texts), 0
        if self.data.caption == "random":
            chosen = int(which * count)
        elif self.data.caption == "all":
            start = np.random.Philox(key=[self.schedule.seed, 1], counter=[0, 0, 0, example.row])
            chosen = (int(np.random.Generator(start).integers(count)) + epoch) % count
        if self.data.reject_cjk and cleaning.has_cjk(example.texts[chosen]):
            raise BadSample(example.key, "the caption has Chinese characters (data.reject_cjk)")
        return chosen

    def _texts(
        self,
        captions: tuple[str, ...],
        chosen: int,
        another: float,
        flipped: bool,
        step: int,
        position: int,
    ) -> list[str]:
        """One text for each kind in `self.texts`."""

        def text(kind: str) -> str:
            index = chosen
            if kind == "other" and len(captions) > 1:
                index = int(another * (len(captions) - 1))
                index += index >= chosen
            words = captions[index]
            if flipped and self.mirror_words:
                words = cleaning.swap_left_right(words)
            if kind == "augmented":
                assert self._augment  # made in __init__ for this kind of text
                words = self._augment(words, self.schedule.rng(step, position, 2))
            return words

        return [text(kind) for kind in self.texts]


def import_grain() -> None:
    """Imports Grain, half a second before the first batch that otherwise comes with it."""
    import grain  # noqa: F401


def _load_chunk(
    loader: Loader, chunks: list[np.ndarray], whole: PictureArrays | None, index: int
) -> Pieces:
    step, chunk = divmod(index, len(chunks))
    positions = chunks[chunk]
    image = None if whole is None else whole.rows(step, chunk * CHUNK, len(positions))
    return loader.load(step, positions, image)


def captions(source: Source) -> Iterator[str]:
    """Yields every caption of the data set, in row order, without reading pictures where the source
    can. Skips bad rows."""
    for row in range(len(source)):
        with contextlib.suppress(BadSample):
            yield from source.glance(row).texts
