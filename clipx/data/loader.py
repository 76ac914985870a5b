"""From a source to batches: which rows, their crops and captions, decoded and tokenised.

Everything random about one example follows from (seed, step, position in the batch), and the order
of rows from (seed, epoch). So a batch is the same for any number of processes and workers and after
any restart, and the position of a run is its step.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8

from clipx.data import pictures, worker
from clipx.data.base import Example, Source
from clipx.data.config import DataConfig
from clipx.data.order import EPOCHS, Sampling, Schedule
from clipx.data.text import cleaning
from clipx.data.text.augment import TextAugment
from clipx.data.text.tokenizers import Tokenizer
from clipx.errors import BadSample, DataError

if TYPE_CHECKING:
    from clipx.types import Views  # imports JAX, which workers do without

CHUNK = 32  # rows that are loaded together: small enough to share out, large enough to pass on
_READY_BYTES = 1 << 28  # decoded pixels that wait for their turn, at most
_SURVEY = 4  # a stream of draws; 0 to 2 are a row's picture and texts, 3 is the row itself
_MOST_BAD = 100  # rows one after another that cannot be used: more, and the set is at fault

Pieces = dict[str, np.ndarray]


class Loader:
    """The batches of a run, of which this process loads the rows at `positions`.

    A row that cannot be used is replaced by the next in the epoch's order, and every other row
    stays what it is.
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
    ):
        """
        batch_size: rows of the global batch.
        positions: places in the global batch, from 0 to batch_size - 1.
        survey: other crops of the same rows and captions, for the pass before an episode.

        Raises `ConfigError` if `views` asks for augmented texts that `data` cannot make here, and
        `DataError` for data of less than one batch.
        """
        self.source, self.tokenizer, self.data = source, tokenizer, data
        # Plain values: a loader is pickled for workers, and `views` holds what needs JAX
        self.crops = tuple(view.scale for view in views.pictures)
        self.flips = tuple(view.flip for view in views.pictures)
        self.texts, self.mirror_words = views.texts, views.mirror_words
        self._augment = TextAugment(data.text_augment) if "augmented" in self.texts else None
        if len(source) < batch_size:
            raise DataError(
                f"the data has {len(source)} rows, expected at least one batch of "
                f"{batch_size}; a smaller train.batch_size or more data"
            )
        self.positions, self.image_size, self.survey = positions, image_size, survey
        self.schedule = Schedule(len(source), batch_size, seed, sampling)

    @property
    def steps_per_epoch(self) -> int:
        return self.schedule.steps_per_epoch

    def batches(self, start: int, stop: int) -> Iterator[Pieces]:
        """One dict a step from `start` to before `stop`, for n = len(positions): `image` uint8
        [n, v, h, w, 3], `text` int32 [n, u, context], `row` and `position` int32 [n], `key` str
        [n], and `bad` str [n]: '' or, as JSON, a list of the rows (`row`, `key`, `reason`) that
        this place should have held and that cannot be used.

        Raises `DataError` when 100 rows one after another cannot be used.
        """
        places = np.asarray(self.positions)
        chunks = [places[i : i + CHUNK] for i in range(0, len(places), CHUNK)]
        iterator = iter(self._pieces(chunks, start, stop))
        try:
            with worker.light_main() if self.data.workers else contextlib.nullcontext():
                first = next(iterator, None)  # starts the processes
            for step in range(start, stop):
                parts = [first if step == start else next(iterator)]
                parts += [next(iterator) for _ in chunks[1:]]
                yield {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
        finally:
            iterator.close()

    def _pieces(self, chunks: list[np.ndarray], start: int, stop: int):
        """Every chunk of every step in order, as grain's data set: loaded ahead of its turn, by
        threads or by worker processes."""
        import grain

        pieces = grain.MapDataset.range(start * len(chunks), stop * len(chunks)).map(
            functools.partial(_load_chunk, self, chunks)
        )
        size = CHUNK * len(self.crops) * self.image_size**2 * 3
        ready = max(2, min(2 * len(chunks), _READY_BYTES // size))
        workers = self.data.workers
        if not workers:
            threads = min(pictures.cores(), 16)
            return pieces.to_iter_dataset(
                grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(ready, threads))
            )
        from absl import flags

        if not flags.FLAGS.is_parsed():  # grain reads one, also where no command parsed any
            flags.FLAGS.mark_as_parsed()
        data = pieces.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
        # small arrays travel faster without a block of shared memory each
        shared = grain.experimental.DatasetOptions(min_shm_size=1 << 16)
        return grain.experimental.WithOptionsIterDataset(data, shared).mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=workers, per_worker_buffer_size=max(1, ready // workers)
            ),
            worker_init_fn=worker.follow_parent,
        )

    def load(self, step: int, positions: np.ndarray) -> Pieces:
        """The rows at `positions` of one step's global batch, as `batches` gives them."""
        n, side = len(positions), self.image_size
        image = np.empty((n, len(self.crops), side, side, 3), np.uint8)
        examples = [self._example(step, int(p), out) for p, out in zip(positions, image)]
        rows, keys, places, texts, bad = zip(*examples)
        ids = self.tokenizer([text for of_row in texts for text in of_row])
        return {
            "image": image,
            "text": ids.reshape(n, len(self.texts), -1),
            "row": np.array(rows, np.int32),
            "position": np.array(places, np.int32),
            "key": np.array(keys, np.str_),
            "bad": np.array(bad, np.str_),
        }

    def _example(self, step: int, position: int, out: UInt8[np.ndarray, "v h w 3"]):
        """(row, key, place in the epoch or episode, texts, what could not be used); the views are
        written to `out`."""
        schedule = self.schedule
        # all draws at once, so that none depends on what the row turns out to be
        count = len(self.crops)
        which, coin, *draws = schedule.rng(step, position).random(2 + count * pictures.TRIES * 4)
        if self.survey:
            coin, *draws = schedule.rng(step, position, _SURVEY).random(1 + len(draws))
        draws = np.reshape(draws, (count, pictures.TRIES, 4))
        another, *coins = schedule.rng(step, position, 1).random(count)
        if self.mirror_words:
            coins = [coin] * (count - 1)  # the captions can follow one coin alone
        flips = [f and c < 0.5 for f, c in zip(self.flips, (coin, *coins), strict=True)]
        bad = []
        for skip in range(min(len(self.source), _MOST_BAD)):
            row = schedule.row(step, position, skip)
            try:
                example = self.source[row]
                chosen = self._choose(example, which, step // self.steps_per_epoch)
                pictures.views(example, self.crops, draws, flips, out)
            except BadSample as error:
                bad.append({"row": row, "key": error.key, "reason": error.reason})
                continue
            texts = self._texts(example.texts, chosen, another, flips[0], step, position)
            place = schedule.place(step, position)
            return example.row, example.key, place, texts, json.dumps(bad) if bad else ""
        raise DataError(
            f"{skip + 1} rows one after another cannot be used, the first is "
            "{key}: {reason}".format(**bad[0])
        )

    def _choose(self, example: Example, which: float, epoch: int) -> int:
        """The index of the caption that is shown."""
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
        """The texts that `self.texts` names."""

        def text(kind: str) -> str:
            at = chosen
            if kind == "other" and len(captions) > 1:
                at = int(another * (len(captions) - 1))
                at += at >= chosen
            words = captions[at]
            if flipped and self.mirror_words:
                words = cleaning.swap_left_right(words)
            if kind == "augmented":
                words = self._augment(words, self.schedule.rng(step, position, 2))
            return words

        return [text(kind) for kind in self.texts]


def _load_chunk(loader: Loader, chunks: list[np.ndarray], index: int) -> Pieces:
    step, chunk = divmod(index, len(chunks))
    return loader.load(step, chunks[chunk])


def captions(source: Source) -> Iterator[str]:
    """Every caption of the set, in the order of its rows; rows that cannot be used give none."""
    for row in range(len(source)):
        with contextlib.suppress(BadSample):
            yield from source[row].texts
