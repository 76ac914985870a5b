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
import io
import math
import multiprocessing
import multiprocessing.connection
import os
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Literal

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from clipx.data.base import BadSample, DataError, Example, Source
from clipx.data.tokenizers import Tokenizer

cv2.setNumThreads(0)  # the parallelism is over pictures

_CHUNK = 32  # rows that are loaded together: small enough to share out, large enough to pass on
_READY_BYTES = 1 << 28  # decoded pixels that wait for their turn, at most
_MOST_BAD = 100  # rows one after another that cannot be used: more, and the set is at fault
_RATIO = (3 / 4, 4 / 3)  # width over height of a crop
_TRIES = 10
# Orientation tags are not applied, in training nor evaluation: so do torchvision and open_clip
_READ = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
_READ_REDUCED = {
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}  # grey is the flag without a colour bit; `_READ` adds colour

Pieces = dict[str, np.ndarray]


def order(rows: int, seed: int) -> Callable[[int, int], int]:
    """The row at (epoch, position): each epoch is a permutation of its own of all rows. Nothing is
    stored; any place is found in constant time."""
    import grain  # here, because it imports JAX where it can

    # Hashed: grain shuffles epoch e with seed + e, which makes neighbouring seeds share epochs
    (hashed,) = np.random.SeedSequence(seed).generate_state(1)
    shuffled = grain.MapDataset.range(rows).shuffle(seed=int(hashed))
    shuffled[0]  # sets up grain's own statistics, before threads do
    return functools.partial(_at, shuffled, rows)


def _at(shuffled, rows: int, epoch: int, position: int) -> int:
    return shuffled[epoch * rows + position]


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
    texts: tuple[Literal["caption"], ...] = ("caption",)
    flip: bool = False  # left to right, one coin an example
    caption: Literal["random", "first"] = "random"
    workers: int = 0  # processes; 0: threads of this one

    def __post_init__(self):
        if len(self.source) < self.batch:
            raise DataError(
                f"the data has {len(self.source)} rows, expected at least one batch of "
                f"{self.batch}; a smaller train.batch_size or more data"
            )
        object.__setattr__(self, "_order", order(len(self.source), self.seed))

    @property
    def steps_per_epoch(self) -> int:
        return len(self.source) // self.batch

    def batches(self, start: int, stop: int) -> Iterator[Pieces]:
        """One dict a step from `start` to before `stop`, for n = len(positions): `image` uint8
        [n, v, h, w, 3], `text` int32 [n, u, context], `row` and `position` int32 [n], and `bad`
        str [n]: what was wrong with the example that this place should have held, '' if nothing.

        Raises `DataError` when 100 rows one after another cannot be used.
        """
        import grain

        places = np.asarray(self.positions)
        chunks = [places[i : i + _CHUNK] for i in range(0, len(places), _CHUNK)]
        pieces = grain.MapDataset.range(start * len(chunks), stop * len(chunks)).map(
            functools.partial(_load_chunk, self, chunks)
        )
        size = _CHUNK * len(self.crops) * self.image_size**2 * 3
        threads = 1 if self.workers else min(_cores(), 16)
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
        rows, places, captions, bad = zip(*examples)
        text = self.tokenizer(captions)
        return {
            "image": image,
            "text": np.stack([text] * len(self.texts), axis=1),
            "row": np.array(rows, np.int32),
            "position": np.array(places, np.int32),
            "bad": np.array(bad, np.str_),
        }

    def _example(self, step: int, position: int, out: UInt8[np.ndarray, "v h w 3"]):
        """(row, place in the epoch, caption, what was wrong); the views are written to `out`."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        place = step_of_epoch * self.batch + position
        rng = np.random.Generator(
            np.random.Philox(key=[self.seed, 0], counter=[0, 0, step, position])
        )
        # all draws at once, so that none depends on what the row turns out to be
        which, coin, *draws = rng.random(2 + len(self.crops) * _TRIES * 4)
        draws = np.reshape(draws, (len(self.crops), _TRIES, 4))
        bad = ""
        for skip in range(min(len(self.source), _MOST_BAD)):
            row = self._order(epoch, (place + skip) % len(self.source))
            try:
                example = self.source[row]
                if not example.texts:
                    raise BadSample(example.key, "no caption")
                self._views(example, draws, self.flip and coin < 0.5, out)
            except BadSample as error:
                bad = bad or str(error)
                continue
            chosen = int(which * len(example.texts)) if self.caption == "random" else 0
            return example.row, place, example.texts[chosen], bad
        raise DataError(f"{skip + 1} rows one after another cannot be used, the first is {bad}")

    def _views(self, example: Example, draws: Float[np.ndarray, "v 10 4"], flip: bool, out) -> None:
        width, height, kind = _header(example)
        boxes = [crop_box(width, height, s, d) for s, d in zip(self.crops, draws)]
        smallest = min(min(w, h) for _, _, w, h in boxes)
        fitting = [k for k in _READ_REDUCED if kind == "JPEG" and smallest >= k * self.image_size]
        picture = _decode(example, max(fitting, default=1))
        scale_x, scale_y = picture.shape[1] / width, picture.shape[0] / height
        for view, (x, y, w, h) in zip(out, boxes):
            left, top = round(x * scale_x), round(y * scale_y)
            right = max(left + 1, round((x + w) * scale_x))
            bottom = max(top + 1, round((y + h) * scale_y))
            crop = _resize(picture[top:bottom, left:right], self.image_size)
            view[...] = crop[:, ::-1] if flip else crop


def _load_chunk(feed: Feed, chunks: list[np.ndarray], index: int) -> Pieces:
    step, chunk = divmod(index, len(chunks))
    return feed.load(step, chunks[chunk])


def crop_box(
    width: int, height: int, scale: tuple[float, float], draws: Float[np.ndarray, "10 4"]
) -> tuple[int, int, int, int]:
    """(x, y, w, h) of a random crop, in pixels, from uniform draws in [0, 1): an area from `scale`,
    a ratio from 3/4 to 4/3, log-uniform; where none of ten fits, the whole picture as far as that
    ratio allows. As torchvision's `RandomResizedCrop.get_params`."""
    low, high = (math.log(r) for r in _RATIO)
    for area, ratio, across, down in draws.tolist():
        area = width * height * (scale[0] + (scale[1] - scale[0]) * area)
        ratio = math.exp(low + (high - low) * ratio)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(across * (width - w + 1)), int(down * (height - h + 1)), w, h
    w = min(width, round(height * _RATIO[1]))
    h = min(height, round(width / _RATIO[0]))
    return (width - w) // 2, (height - h) // 2, w, h


def _resize(crop: UInt8[np.ndarray, "h w 3"], side: int) -> UInt8[np.ndarray, "s s 3"]:
    shrinks = crop.shape[0] >= side and crop.shape[1] >= side
    how = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    return cv2.resize(crop, (side, side), interpolation=how)


def _header(example: Example) -> tuple[int, int, str]:
    """Width, height and format; nothing is decoded yet."""
    if isinstance(example.image, np.ndarray):
        return example.image.shape[1], example.image.shape[0], ""
    with _unreadable(example):
        header = Image.open(io.BytesIO(example.image))
        return header.width, header.height, header.format or ""


def _decode(example: Example, reduce: int) -> UInt8[np.ndarray, "h w 3"]:
    """Pixels, 1/reduce as wide and as high: by OpenCV, else by Pillow, which knows more formats."""
    if isinstance(example.image, np.ndarray):
        return example.image
    data = np.frombuffer(example.image, np.uint8)
    with contextlib.suppress(cv2.error):
        pixels = cv2.imdecode(data, _READ | _READ_REDUCED.get(reduce, 0))
        if pixels is not None:
            return pixels
    with _unreadable(example):
        return np.asarray(Image.open(io.BytesIO(example.image)).convert("RGB"))


@contextlib.contextmanager
def _unreadable(example: Example):
    """Whatever a decoder raises becomes a `BadSample`: they raise all sorts of things."""
    try:
        yield
    except Exception as error:
        size = len(example.image)
        reason = f"the picture ({size} bytes) cannot be decoded: {error}"
        raise BadSample(example.key, reason.replace("\n", " ")) from None


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
        with concurrent.futures.ThreadPoolExecutor(min(_cores(), 16)) as pool:
            for start in range(0, len(self), size):
                rows = range(start, min(start + size, len(self)))
                yield np.stack(list(pool.map(self.picture, rows)))

    def picture(self, row: int) -> UInt8[np.ndarray, "h w 3"]:
        example, side = self._example(row), self.image_size
        try:
            with _unreadable(example):
                if isinstance(example.image, np.ndarray):
                    picture = Image.fromarray(example.image)
                else:
                    picture = Image.open(io.BytesIO(example.image)).convert("RGB")
        except BadSample as error:
            raise DataError(f"row {row} of the evaluation set: {error}") from None
        width, height = picture.size
        if min(width, height) != side:
            if width <= height:
                width, height = side, int(side * height / width)
            else:
                width, height = int(side * width / height), side
            picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - side) / 2), round((height - side) / 2)
        return np.asarray(picture.crop((left, top, left + side, top + side)))

    def _example(self, row: int) -> Example:
        if not 0 <= row < len(self):
            raise IndexError(row)
        try:
            return self.source[row]
        except BadSample as error:
            raise DataError(f"row {row} of the evaluation set: {error}") from None


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
