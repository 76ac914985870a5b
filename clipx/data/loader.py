"""From a source to batches: which rows, their crops and captions, decoded and tokenised.

Everything random about one example follows from (seed, step, place in the batch), and the order of
rows from (seed, epoch). So a batch is the same for any number of processes and workers and after
any restart, and the position of a run is its step.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib.util
import json
import multiprocessing
import multiprocessing.connection
import os
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
from jaxtyping import Int, Int32, UInt8

from clipx.data import pictures
from clipx.data.base import Example, Source
from clipx.data.pairs import Pairs
from clipx.data.pictures import cores
from clipx.data.text import cleaning
from clipx.data.text.augment import TextAugment
from clipx.data.text.tokenizers import Tokenizer
from clipx.errors import BadSample, DataError

_CHUNK = 32  # rows that are loaded together: small enough to share out, large enough to pass on
_READY_BYTES = 1 << 28  # decoded pixels that wait for their turn, at most
_ROW, _SURVEY = 3, 4  # streams of draws; 0 to 2 are a row's picture and texts
_MOST_BAD = 100  # rows one after another that cannot be used: more, and the set is at fault

Pieces = dict[str, np.ndarray]


def order(
    rows: int, seed: int, clusters: Int32[np.ndarray, " rows"] | None = None
) -> Callable[[int, int], int]:
    """The row at (epoch, position): each epoch is a permutation of its own of all rows. Nothing is
    stored; any place is found in constant time. With `clusters` positions 2i and 2i + 1 have rows
    of one cluster, as `paired` says; that takes eight bytes a row."""
    if clusters is not None:
        return Pairs(np.asarray(clusters, np.int32), seed)
    import grain  # here, because it imports JAX where it can

    # Hashed: grain shuffles epoch e with seed + e, which makes neighbouring seeds share epochs
    (hashed,) = np.random.SeedSequence(seed).generate_state(1)
    shuffled = grain.MapDataset.range(rows).shuffle(seed=int(hashed))
    shuffled[0]  # sets up grain's own statistics, before threads do
    return functools.partial(_at, shuffled, rows)


def _at(shuffled, rows: int, epoch: int, position: int) -> int:
    return shuffled[epoch * rows + position]


def share(source: Source, fraction: float) -> Source:
    """`source` itself, or so much of it."""
    return source if fraction == 1 else Share(source, fraction)


def chosen(rows: int, fraction: float) -> Int[np.ndarray, " n"]:
    """Which of so many rows `Share` has, in its order."""
    return np.random.default_rng(0).permutation(rows)[: int(rows * fraction)]


class Share:
    """A source of floor(rows x fraction) rows of another, chosen by a shuffle that is always the
    same; each keeps the row id that it has there. No subclass: no config asks for it by name."""

    def __init__(self, source: Source, fraction: float):
        self._source, self._rows = source, chosen(len(source), fraction)
        self.classes = source.classes

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Example:
        return self._source[int(self._rows[row])]

    def keys(self) -> Iterator[str]:
        keys = list(self._source.keys())
        return (keys[row] for row in self._rows)


@dataclasses.dataclass(frozen=True)
class Feed:
    """The batches of a run, of which this process loads the rows at `positions`.

    An epoch is len(source) // batch steps; the rows that its order puts last wait for another
    epoch. A row that cannot be used is replaced by the next in the epoch's order, and every other
    row stays what it is.
    """

    source: Source
    tokenizer: Tokenizer
    seed: int
    batch: int  # rows of the global batch
    positions: np.ndarray  # places in the global batch, 0 to batch - 1
    image_size: int
    crops: tuple[tuple[float, float], ...] = ((0.9, 1.0),)  # area range of each picture view
    flips: tuple[bool, ...] = (False,)  # which views mirror half of their pictures
    mirror_words: bool = False  # a mirrored picture's captions have left and right swapped
    texts: tuple[Literal["caption", "augmented", "other"], ...] = ("caption",)
    caption: Literal["random", "first", "all"] = "random"  # all: each in turn, one an epoch
    reject_cjk: bool = False  # captions with Chinese characters cannot be used
    text_augment: TextAugment | None = None  # what makes the text `augmented`
    workers: int = 0  # processes; 0: threads of this one
    episode: int | None = None  # steps; positions are places in an episode instead of an epoch
    with_replacement: bool = False  # every row of a batch is drawn on its own
    survey: bool = False  # other crops of the same rows and captions
    clusters: Int32[np.ndarray, " n"] | None = None  # of each of the source's rows: see `order`

    def __post_init__(self):
        if len(self.source) < self.batch:
            raise DataError(
                f"the data has {len(self.source)} rows, expected at least one batch of "
                f"{self.batch}; a smaller train.batch_size or more data"
            )
        object.__setattr__(self, "_order", order(len(self.source), self.seed, self.clusters))

    @property
    def steps_per_epoch(self) -> int:
        return len(self.source) // self.batch

    def batches(self, start: int, stop: int) -> Iterator[Pieces]:
        """One dict a step from `start` to before `stop`, for n = len(positions): `image` uint8
        [n, v, h, w, 3], `text` int32 [n, u, context], `row` and `position` int32 [n], `key` str
        [n], and `bad` str [n]: '' or, as JSON, a list of the rows (`row`, `key`, `reason`) that
        this place should have held and that cannot be used.

        Raises `DataError` when 100 rows one after another cannot be used.
        """
        import grain

        places = np.asarray(self.positions)
        chunks = [places[i : i + _CHUNK] for i in range(0, len(places), _CHUNK)]
        pieces = grain.MapDataset.range(start * len(chunks), stop * len(chunks)).map(
            functools.partial(_load_chunk, self, chunks)
        )
        size = _CHUNK * len(self.crops) * self.image_size**2 * 3
        threads = 1 if self.workers else min(cores(), 16)
        ready = max(2, min(2 * len(chunks), _READY_BYTES // size))
        if self.workers:
            ready = max(1, ready // self.workers)
        options = grain.ReadOptions(
            num_threads=threads, prefetch_buffer_size=1 if self.workers else max(ready, threads)
        )
        data = pieces.to_iter_dataset(options)
        if self.workers:
            from absl import flags

            if not flags.FLAGS.is_parsed():  # grain reads one, also where no command parsed any
                flags.FLAGS.mark_as_parsed()
            # small arrays travel faster without a block of shared memory each
            shared = grain.experimental.DatasetOptions(min_shm_size=1 << 16)
            data = grain.experimental.WithOptionsIterDataset(data, shared).mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=self.workers, per_worker_buffer_size=ready
                ),
                worker_init_fn=_follow_parent,
            )
        iterator = iter(data)
        try:
            with _light_main() if self.workers else contextlib.nullcontext():
                first = next(iterator, None)  # starts the processes
            for step in range(start, stop):
                parts = [first if step == start else next(iterator)]
                parts += [next(iterator) for _ in chunks[1:]]
                yield {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
        finally:
            iterator.close()

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
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        place = step_of_epoch * self.batch + position
        # all draws at once, so that none depends on what the row turns out to be
        count = len(self.crops)
        which, coin, *draws = self._rng(step, position).random(2 + count * pictures.TRIES * 4)
        if self.survey:
            coin, *draws = self._rng(step, position, _SURVEY).random(1 + len(draws))
        draws = np.reshape(draws, (count, pictures.TRIES, 4))
        another, *coins = self._rng(step, position, 1).random(count)
        if self.mirror_words:
            coins = [coin] * (count - 1)  # the captions can follow one coin alone
        flips = [f and c < 0.5 for f, c in zip(self.flips, (coin, *coins), strict=True)]
        bad = []
        for skip in range(min(len(self.source), _MOST_BAD)):
            row = self._row(step, position, epoch, place, skip)
            try:
                example = self.source[row]
                chosen = self._choose(example, which, epoch)
                pictures.views(example, self.crops, draws, flips, out)
            except BadSample as error:
                bad.append({"row": row, "key": error.key, "reason": error.reason})
                continue
            texts = self._texts(example.texts, chosen, another, flips[0], step, position)
            if self.episode:
                place = position * self.episode + step % self.episode
            return example.row, example.key, place, texts, json.dumps(bad) if bad else ""
        raise DataError(
            f"{skip + 1} rows one after another cannot be used, the first is "
            "{key}: {reason}".format(**bad[0])
        )

    def _row(self, step: int, position: int, epoch: int, place: int, skip: int) -> int:
        """The row at a place, or the one that stands in for `skip` before it."""
        if self.with_replacement:
            drawn = int(self._rng(step, position, _ROW).integers(len(self.source)))
            return (drawn + skip) % len(self.source)
        return self._order(epoch, (place + skip) % len(self.source))

    def _rng(self, step: int, position: int, stream: int = 0) -> np.random.Generator:
        return np.random.Generator(
            np.random.Philox(key=[self.seed, 0], counter=[0, stream, step, position])
        )

    def _choose(self, example: Example, which: float, epoch: int) -> int:
        """Which caption is shown."""
        if not example.texts:
            raise BadSample(example.key, "no caption")
        count, chosen = len(example.texts), 0
        if self.caption == "random":
            chosen = int(which * count)
        elif self.caption == "all":
            start = np.random.Philox(key=[self.seed, 1], counter=[0, 0, 0, example.row])
            chosen = (int(np.random.Generator(start).integers(count)) + epoch) % count
        if self.reject_cjk and cleaning.has_cjk(example.texts[chosen]):
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
                words = self.text_augment(words, self._rng(step, position, 2))
            return words

        return [text(kind) for kind in self.texts]


def _load_chunk(feed: Feed, chunks: list[np.ndarray], index: int) -> Pieces:
    step, chunk = divmod(index, len(chunks))
    return feed.load(step, chunks[chunk])


def captions(source: Source) -> Iterator[str]:
    """Every caption of the set, in the order of its rows; rows that cannot be used give none."""
    for row in range(len(source)):
        with contextlib.suppress(BadSample):
            yield from source[row].texts


@dataclasses.dataclass(frozen=True)
class EvaluationSet:
    """The examples of an evaluator: the first `limit` rows of `source`, each picture resized so
    that its shorter side is `image_size` (Pillow, bicubic) and cut to the centre, as open_clip's
    evaluation transform. A bad example is a `DataError`: nothing is skipped or replaced."""

    source: Source
    image_size: int
    limit: int | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        return self.source.classes

    def __len__(self) -> int:
        return min(len(self.source), self.limit or len(self.source))

    def texts(self, row: int) -> tuple[str, ...]:
        return self._example(row).texts

    def label(self, row: int) -> int | None:
        return self._example(row).label

    def batches(self, size: int) -> Iterator[UInt8[np.ndarray, "n h w 3"]]:
        """uint8 pictures in the order of the rows, `size` at a time but for the last."""
        with concurrent.futures.ThreadPoolExecutor(min(cores(), 16)) as pool:
            for start in range(0, len(self), size):
                rows = range(start, min(start + size, len(self)))
                yield np.stack(list(pool.map(self.picture, rows)))

    def picture(self, row: int) -> UInt8[np.ndarray, "h w 3"]:
        try:
            return pictures.evaluation(self._example(row), self.image_size)
        except BadSample as error:
            raise DataError(f"row {row} of the evaluation set: {error}") from None

    def _example(self, row: int) -> Example:
        if not 0 <= row < len(self):
            raise IndexError(row)
        try:
            return self.source[row]
        except BadSample as error:
            raise DataError(f"row {row} of the evaluation set: {error}") from None


@contextlib.contextmanager
def _light_main():
    """While it lasts, new processes run `clipx.data.worker` first, and not the main script."""
    main = sys.modules["__main__"]
    stand_in = types.ModuleType("__main__")
    stand_in.__spec__ = importlib.util.find_spec("clipx.data.worker")
    sys.modules["__main__"] = stand_in
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _follow_parent(index: int, count: int) -> None:
    """Ends this worker when its parent is gone, however it ended: nobody else would."""

    def watch() -> None:
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
