"""Batches depend only on (seed, step), and a bad row is replaced and reported."""

from __future__ import annotations

import collections
import dataclasses
import io
import itertools
import json
import os
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from support.loaders import build_loader
from support.pictures import ROWS, TOKENIZER, Pictures, encode, photo

from clipx.data.base import Example, Source, fingerprint
from clipx.data.evaluation import EvaluationSet
from clipx.data.loader import Loader, captions
from clipx.data.order import Subset, chosen, order
from clipx.data.pictures import crop_box
from clipx.data.sources.shapes import Shapes
from clipx.data.sources.webdataset import WebDataset
from clipx.data.text.augment import TextAugmentConfig
from clipx.errors import DataError

BATCH = 12


@dataclasses.dataclass(frozen=True)
class WhoAmI(Source):
    """Captions that say whether another process reads them, and whether that process has JAX."""

    main: int = dataclasses.field(default_factory=os.getpid)
    classes = ()

    def __len__(self):
        return 8

    def __getitem__(self, row):
        words = "here" if os.getpid() == self.main else "away"
        words += " with jax" if sys.modules.get("jax") else " without"
        return Example(photo(16, 16), (words,), row, f"{row}")


def loader(source=None, **changes) -> Loader:
    views = {"crops": ((0.3, 1.0), (0.3, 1.0)), "flips": (True, True)}
    changes = {"batch_size": BATCH, **views, **changes}
    return build_loader(source or Pictures(), TOKENIZER, **changes)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def joined(batches: list[dict]) -> dict:
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def test_each_epoch_is_another_permutation_and_seeds_differ():
    for rows in (1, 2, 7, 100):
        at = order(rows, 3)
        for epoch in range(3):
            assert sorted(at(epoch, i) for i in range(rows)) == list(range(rows))
    epochs = [[order(100, seed)(e, i) for i in range(100)] for seed in range(3) for e in range(3)]
    for a, b in itertools.combinations(epochs, 2):
        assert np.mean(np.equal(a, b)) < 0.1
    at = pickle.loads(pickle.dumps(order(100, 2)))
    assert [at(2, i) for i in range(100)] == epochs[-1]


def test_a_batch_has_the_documented_arrays():
    (batch,) = loader().batches(3, 4)
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items() if k not in ("bad", "key")} == {
        "image": ((BATCH, 2, 32, 32, 3), "uint8"),
        "text": ((BATCH, 1, 40), "int32"),
        "row": ((BATCH,), "int32"),
        "position": ((BATCH,), "int32"),
    }
    assert batch["bad"].tolist() == [""] * BATCH
    assert batch["key"].tolist() == [f"key{row}" for row in batch["row"]]
    for row, ids in zip(batch["row"], batch["text"][:, 0]):
        assert TOKENIZER.decode(ids).startswith(f"row {' '.join(str(row))} text")


def test_an_epoch_shows_each_row_at_most_once_and_drops_the_remainder():
    steps = loader().steps_per_epoch
    assert steps == ROWS // BATCH
    seen = [batch for batch in loader().batches(0, 2 * steps)]
    for epoch in (seen[:steps], seen[steps:]):
        assert len({row for batch in epoch for row in batch["row"].tolist()}) == steps * BATCH
        positions = [p for batch in epoch for p in batch["position"].tolist()]
        assert positions == list(range(steps * BATCH))
    assert not np.array_equal(seen[0]["row"], seen[steps]["row"])


@pytest.mark.parametrize("processes", [2, 4])
def test_any_split_of_the_rows_gives_the_same_batch(processes):
    batches = list(loader().batches(2, 5))
    positions = np.arange(BATCH).reshape(-1, processes)  # strided: no process has a prefix
    parts = [list(loader(positions=positions[:, p]).batches(2, 5)) for p in range(processes)]
    for step, batch in enumerate(batches):
        together = joined([part[step] for part in parts])
        in_order = np.argsort(positions.T.ravel())
        assert same({name: value[in_order] for name, value in together.items()}, batch)


def test_a_restart_at_any_step_continues_with_the_same_batches():
    batches = list(loader().batches(0, 6))
    for start in (1, 4, 5):
        assert all(same(a, b) for a, b in zip(loader().batches(start, 6), batches[start:]))
    assert list(loader().batches(6, 6)) == []


@pytest.mark.parametrize(
    ("processes", "workers"),
    [(1, 0), (2, 0), (4, 0), pytest.param(2, 2, marks=pytest.mark.slow)],
)
def test_the_order_of_rows_is_the_same_for_any_processes_workers_and_restart(processes, workers):
    """The rows of all processes together are those of the epochs' permutations."""
    at, per_epoch = order(ROWS, 1), ROWS // BATCH
    expected = [
        [at(step // per_epoch, step % per_epoch * BATCH + place) for place in range(BATCH)]
        for step in range(6)
    ]
    for start in (0, 3) if workers else range(6):
        recorded = [[None] * BATCH for _ in range(start, 6)]
        for positions in np.split(np.arange(BATCH), processes):
            part = loader(positions=positions, workers=workers, image_size=8)
            for rows, batch in zip(recorded, part.batches(start, 6), strict=True):
                for position, row in zip(positions, batch["row"].tolist()):
                    rows[position] = row
        assert recorded == expected[start:]


def test_batches_do_not_depend_on_the_size_of_chunks(monkeypatch):
    batches = list(loader(batch_size=40).batches(0, 2))
    monkeypatch.setattr("clipx.data.loader.CHUNK", 7)
    assert all(same(a, b) for a, b in zip(loader(batch_size=40).batches(0, 2), batches))


def test_seeds_steps_and_views_have_different_crops():
    source = Shapes(size=24, image_size=32)
    a = loader(source, batch_size=24).load(0, np.arange(24))
    b = loader(source, batch_size=24).load(1, np.arange(24))
    c = loader(source, batch_size=24, seed=2).load(0, np.arange(24))
    assert sorted(a["row"]) == sorted(b["row"]) == sorted(c["row"])  # the same rows, shuffled
    for other in (b, c):
        moved = [np.flatnonzero(other["row"] == row)[0] for row in a["row"]]
        assert not (a["image"] == other["image"][moved]).all((1, 2, 3, 4)).any()
    assert not (a["image"][:, 0] == a["image"][:, 1]).all((1, 2, 3)).any()  # two views differ


def test_a_view_of_the_centre_is_what_evaluation_sees():
    views = loader(crops=(None, (0.3, 1.0), None), flips=(False, True, False)).load(3, np.arange(4))
    pictures = EvaluationSet(Pictures(), 32)
    expected = [pictures.picture(row) for row in views["row"]]
    assert np.array_equal(views["image"][:, 0], expected)
    assert np.array_equal(views["image"][:, 2], expected)
    three = loader(crops=((0.3, 1.0),) * 3, flips=(False, True, False)).load(3, np.arange(4))
    assert np.array_equal(views["image"][:, 1], three["image"][:, 1])


def test_first_takes_the_first_caption_and_random_takes_all():
    def texts(caption):
        batches = loader(caption=caption).batches(0, 4)
        return [TOKENIZER.decode(ids)[-1] for batch in batches for ids in batch["text"][:, 0]]

    assert set(texts("first")) == {"0"}
    assert min(texts("random").count(i) for i in "012") >= 8
    first, random = (next(loader(caption=c).batches(0, 1)) for c in ("first", "random"))
    assert np.array_equal(first["image"], random["image"])  # the crops do not depend on captions


def test_views_are_mirrored_independently_or_together_with_their_captions():
    def run(flips, mirror_words=False):
        source = Pictures(words="left of right")
        return joined(list(loader(source, flips=flips, mirror_words=mirror_words).batches(0, 4)))

    plain, both, first, pair = (
        run((False, False)),
        run((True, True)),
        run((True, False)),
        run((True, True), mirror_words=True),
    )

    def turned(batch):
        mirrored = (batch["image"] == plain["image"][:, :, :, ::-1]).all((2, 3, 4))
        assert ((batch["image"] == plain["image"]).all((2, 3, 4)) ^ mirrored).all()
        return mirrored

    assert (turned(both).sum(0) >= 12).all() and (turned(both).sum(0) <= 36).all()  # of 48
    assert 12 <= (turned(both)[:, 0] ^ turned(both)[:, 1]).sum() <= 36
    assert not turned(first)[:, 1].any()
    assert np.array_equal(turned(first)[:, 0], turned(both)[:, 0])
    assert np.array_equal(turned(pair)[:, 0], turned(pair)[:, 1])
    swapped = ["right of left" in TOKENIZER.decode(ids) for ids in pair["text"][:, 0]]
    assert np.array_equal(swapped, turned(pair)[:, 0])
    assert np.array_equal(both["text"], plain["text"])


def test_all_shows_each_caption_in_turn_one_per_epoch():
    steps = loader().steps_per_epoch
    shown = collections.defaultdict(list)
    for batch in loader(caption="all").batches(0, 3 * steps):
        for row, ids in zip(batch["row"].tolist(), batch["text"][:, 0]):
            shown[row].append(TOKENIZER.decode(ids)[-1])
    turns = [texts for texts in shown.values() if len(texts) == 3]
    assert len(turns) > 40 and all(sorted(texts) == ["0", "1", "2"] for texts in turns)
    assert len({texts[0] for texts in turns}) == 3  # rows start with different captions


def test_other_is_another_caption_of_the_picture_unless_it_has_only_one():
    def texts(source):
        for batch in loader(source, texts=("caption", "other")).batches(0, 4):
            yield from ([TOKENIZER.decode(ids) for ids in of_row] for of_row in batch["text"])

    pairs = list(texts(Pictures()))
    assert all(a[:-1] == b[:-1] and a[-1] != b[-1] for a, b in pairs)
    assert len({(a[-1], b[-1]) for a, b in pairs}) == 6
    assert all(a == b for a, b in texts(Pictures(captions=1)))


def test_augmented_is_the_caption_after_one_operation_and_reproducible():
    augment = TextAugmentConfig(operations=("swap",))
    source = Pictures(captions=1, words="one two three four five six")

    def texts():
        kinds = loader(source, texts=("caption", "augmented"), text_augment=augment)
        (batch,) = kinds.batches(1, 2)
        return [[TOKENIZER.decode(ids).split() for ids in of_row] for of_row in batch["text"]]

    assert all(sorted(a) == sorted(b) for a, b in texts())
    assert sum(a != b for a, b in texts()) > 8
    assert texts() == texts()


def test_chinese_characters_make_a_row_bad_with_reject_cjk():
    source = Pictures(captions=1, words="\u4e2d\u6587")
    with pytest.raises(DataError, match="the first is key.*Chinese"):
        loader(source, reject_cjk=True).load(0, np.arange(1))
    assert not loader(source).load(0, np.arange(BATCH))["bad"].any()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (Pictures(bad=(7,)), "key7: empty caption"),
        (
            Pictures(broken=(7,)),
            r"key7: the picture \(\d+ bytes\) cannot be decoded: .*[Tt]runcated.*",
        ),
    ],
)
def test_a_bad_row_is_replaced_by_the_next_and_named(source, reason):
    good, loaded = (joined(list(loader(s).batches(0, 4))) for s in (Pictures(), source))
    at = order(ROWS, 1)
    (place,) = [i for i in range(ROWS) if at(0, i) == 7]
    assert np.flatnonzero(loaded["bad"] != "").tolist() == [place]
    (bad,) = json.loads(loaded["bad"][place])
    assert bad["row"] == 7 and re.fullmatch(reason, "{key}: {reason}".format(**bad))
    assert loaded["row"][place] == at(0, (place + 1) % ROWS)
    assert loaded["position"][place] == place
    others = np.arange(len(loaded["row"])) != place
    for name in ("image", "text", "row", "position"):
        assert np.array_equal(loaded[name][others], good[name][others])


def test_substitutes_wrap_around_and_skip_other_bad_rows():
    at = order(ROWS, 1)
    last = [at(0, i) for i in (48, 49)]
    source = Pictures(bad=tuple(last))
    batch = loader(source, batch_size=ROWS).load(0, np.arange(ROWS))
    assert batch["row"][-2:].tolist() == [at(0, 0)] * 2
    keys = [[bad["key"] for bad in json.loads(text)] for text in batch["bad"][-2:]]
    assert keys == [[f"key{last[0]}", f"key{last[1]}"], [f"key{last[1]}"]]


@pytest.mark.parametrize("with_replacement", [False, True])
def test_rows_that_are_left_out_are_replaced_by_random_ones(with_replacement):
    """Also where all their neighbours in the order are left out; all other rows keep their places,
    and what stands in is a function of (seed, step, position)."""
    options = {"episode_steps": None, "with_replacement": with_replacement}
    plain = joined(list(loader(**options).batches(0, 8)))
    left_out = frozenset(plain["row"][:30].tolist())
    parts = [
        loader(**options, left_out=left_out, positions=np.arange(BATCH)[i::2]) for i in range(2)
    ]
    odd, even = (joined(list(part.batches(0, 8))) for part in parts)
    rows = np.stack([odd["row"].reshape(8, -1), even["row"].reshape(8, -1)], axis=2).ravel()
    kept = ~np.isin(plain["row"], list(left_out))
    assert np.array_equal(rows[kept], plain["row"][kept]) and not left_out & set(rows.tolist())
    assert len(set(rows[~kept].tolist())) > 10
    kept = sorted(set(range(ROWS)) - left_out)
    few = loader(Pictures(bad=tuple(kept[5:])), **options, left_out=left_out)
    assert set(few.load(0, np.arange(BATCH))["row"].tolist()) <= set(kept[:5])


def test_a_data_set_without_usable_rows_stops_the_run():
    source = Pictures(bad=tuple(range(ROWS)))
    with pytest.raises(DataError, match=r"^50 consecutive rows cannot be used; the first is key"):
        next(loader(source).batches(0, 1))


def test_a_share_has_the_same_rows_every_time_with_their_ids():
    shares = [Subset(Pictures(), chosen(ROWS, fraction)) for fraction in (0.25, 0.5)]
    rows = [[share[i].row for i in range(len(share))] for share in shares]
    assert [len(of) for of in rows] == [12, 25] and rows[1][:12] == rows[0] != sorted(rows[0])
    assert list(shares[0].keys()) == [f"key{row}" for row in rows[0]]
    assert fingerprint(shares[0]) != fingerprint(shares[1]) != fingerprint(Pictures())


@pytest.mark.parametrize("with_replacement", [False, True])
def test_a_survey_shows_an_episodes_rows_and_captions_under_other_crops(with_replacement):
    options = {"episode_steps": 5, "with_replacement": with_replacement}
    training = list(loader(**options).batches(0, 10))
    survey = list(loader(**options, survey=True).batches(5, 10))
    positions = np.stack([part["position"] for part in training[5:]])
    assert sorted(positions.ravel()) == list(range(5 * BATCH))
    assert (positions == np.arange(BATCH) * 5 + np.arange(5)[:, None]).all()
    for seen, shown in zip(survey, training[5:], strict=True):
        for name in ("row", "text", "position", "key"):
            np.testing.assert_array_equal(seen[name], shown[name])
        assert (seen["image"] != shown["image"]).any(axis=(1, 2, 3, 4)).all()
    usual = [part["row"] for part in loader().batches(0, 10)]
    assert all((part["row"] == row).all() for part, row in zip(training, usual)) != with_replacement


def test_rows_with_replacement_are_sampled_evenly_and_reproducibly():
    source = Pictures(rows=BATCH, captions=1)
    parts = list(loader(source, with_replacement=True, episode_steps=5).batches(0, 40))
    count = np.bincount(np.concatenate([part["row"] for part in parts]), minlength=BATCH)
    assert max(np.bincount(parts[0]["row"])) > 1 and min(count) > 15 and max(count) < 70
    (again,) = loader(source, with_replacement=True, episode_steps=5).batches(33, 34)
    assert same(again, parts[33])


def test_a_row_with_only_a_label_has_no_caption():
    @dataclasses.dataclass(frozen=True)
    class Labelled(Pictures):
        def __getitem__(self, row):
            return super().__getitem__(row)._replace(texts=())

    with pytest.raises(DataError, match="key.*: no caption$"):
        loader(Labelled()).load(0, np.arange(2))


def test_too_few_rows_for_a_batch():
    with pytest.raises(
        DataError, match="has 50 rows, expected at least one batch of 51; set a smaller"
    ):
        loader(batch_size=51)


def test_crop_boxes_are_inside_the_picture_and_in_the_range_of_areas_and_ratios():
    rng = np.random.default_rng(0)
    for width, height in ((500, 333), (40, 64)):
        boxes = [crop_box(width, height, (0.2, 0.8), rng.random((10, 4))) for _ in range(2000)]
        x, y, w, h = np.array(boxes).T
        assert (x >= 0).all() and (y >= 0).all()
        assert (x + w <= width).all() and (y + h <= height).all()
        area, ratio = w * h / (width * height), w / h
        assert 0.18 < area.min() < 0.25 and 0.7 < area.max() < 0.82
        assert 0.72 < ratio.min() < 0.78 and 1.25 < ratio.max() < 1.37
        for start, room in ((x, width - w), (y, height - h)):
            assert abs(np.mean(start[room > 0] / room[room > 0]) - 0.5) < 0.03


def test_a_crop_that_cannot_fit_is_the_centre():
    draws = np.random.default_rng(0).random((10, 4))
    assert crop_box(100, 10, (1.0, 1.0), draws) == (43, 0, 13, 10)
    assert crop_box(10, 100, (1.0, 1.0), draws) == (0, 43, 10, 13)
    assert crop_box(80, 80, (1.0, 1.0), draws * 0 + 0.5) == (0, 0, 80, 80)


def load_one(image, side=32, **changes) -> np.ndarray:
    class One(Source):
        classes = ()

        def __len__(self):
            return 1

        def __getitem__(self, row):
            return Example(image, ("words",), row, "one")

    values = {"batch_size": 1, "flips": (False,), "crops": ((1.0, 1.0),), "image_size": side}
    return loader(One(), **(values | changes)).load(0, np.arange(1))["image"][0, 0]


@pytest.mark.parametrize("size", [40, 64, 200, 640])
def test_a_resized_jpeg_is_close_to_pillows(size):
    data = encode(photo(size, size), quality=90)
    expected = Image.open(io.BytesIO(data)).resize((32, 32), Image.Resampling.BICUBIC)
    assert np.abs(load_one(data).astype(int) - np.asarray(expected)).mean() < 2


@pytest.mark.parametrize("size", [36, 40, 48])
def test_a_picture_that_shrinks_a_little_is_closer_to_pillows(size):
    """Than one whose areas are averaged, which differs by 0.62 to 0.68."""
    pixels = photo(size, size)
    expected = np.asarray(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC))
    assert np.abs(load_one(pixels).astype(int) - expected).mean() < 0.6


def test_pixels_of_the_right_size_stay_unchanged():
    pixels = photo(32, 32)
    assert np.array_equal(load_one(pixels), pixels)
    assert np.array_equal(load_one(encode(pixels, "PNG")), pixels)
    assert np.array_equal(load_one(encode(pixels, "WEBP", lossless=True)), pixels)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_other_modes_become_rgb_in_training_as_in_evaluation(mode):
    file = io.BytesIO()
    picture = Image.fromarray(photo(32, 32)).convert(mode)
    picture.save(file, "JPEG" if mode in ("L", "CMYK") else "PNG")
    expected = np.asarray(Image.open(io.BytesIO(file.getvalue())).convert("RGB"))
    assert np.abs(load_one(file.getvalue()).astype(int) - expected).mean() < 2


def test_an_orientation_tag_is_ignored_at_every_scale():
    exif = Image.Exif()
    exif[0x0112] = 6
    for size in (32, 256):
        tagged, plain = (encode(photo(size, size), exif=e) for e in (exif, Image.Exif()))
        assert np.array_equal(load_one(tagged), load_one(plain))


def test_captions_skip_bad_rows():
    texts = list(captions(Pictures(bad=(1,), rows=3)))
    assert texts == [f"row {row} text {i}" for row in (0, 2) for i in range(3)]


@pytest.mark.parametrize(("height", "width"), [(48, 100), (100, 48), (32, 32), (33, 77)])
def test_evaluation_is_resize_and_centre_crop(height, width):
    class One(Pictures):
        def __getitem__(self, row):
            return Example(encode(photo(height, width), "PNG"), ("a",), row, "one", 3)

    examples = EvaluationSet(One(rows=1), 32)
    picture = Image.fromarray(photo(height, width))
    short, long = 32, int(32 * max(height, width) / min(height, width))
    size = (short, long) if width <= height else (long, short)
    resized = np.asarray(picture.resize(size, Image.Resampling.BICUBIC))
    top, left = (int(round((n - 32) / 2.0)) for n in resized.shape[:2])
    (batch,) = examples.batches(4)
    assert np.array_equal(batch, resized[None, top : top + 32, left : left + 32])
    assert (examples.label(0), examples.texts(0), len(examples)) == (3, ("a",), 1)


def test_evaluation_batches_are_the_rows_in_order_up_to_the_limit():
    examples = EvaluationSet(Pictures(), 32, limit=7)
    batches = list(examples.batches(3))
    assert [len(b) for b in batches] == [3, 3, 1] and len(examples) == 7
    assert np.array_equal(np.concatenate(batches), [examples.picture(i) for i in range(7)])
    assert len(EvaluationSet(Pictures(), 32, limit=1000)) == ROWS
    assert EvaluationSet(Shapes(size=3), 32).classes == Shapes.classes
    with pytest.raises(IndexError):
        examples.texts(7)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (Pictures(bad=(2,)), "row 2 of the evaluation set: key2: empty caption"),
        (
            Pictures(broken=(2,)),
            r"row 2 of the evaluation set: key2: the picture \(\d+ bytes\) can",
        ),
    ],
)
def test_a_bad_example_is_an_error_in_evaluation(source, reason):
    batches = EvaluationSet(source, 32).batches(2)
    next(batches)
    with pytest.raises(DataError, match=f"^{reason}"):
        next(batches)


def test_importing_the_data_folder_imports_no_jax():
    code = "import sys, clipx.data.loader, clipx.data.sources.shapes, clipx.data.sources.webdataset"
    code += "; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_workers_load_the_same_batches_without_jax():
    batches = list(loader().batches(1, 4))
    assert all(same(a, b) for a, b in zip(loader(workers=2).batches(1, 4), batches, strict=True))
    for workers, words in ((0, "here"), (1, "away without")):
        (batch,) = loader(WhoAmI(), batch_size=8, workers=workers).batches(0, 1)
        assert all(TOKENIZER.decode(ids).startswith(words) for ids in batch["text"][:, 0])


def test_an_error_in_a_worker_reaches_the_run():
    source = Pictures(bad=tuple(range(ROWS)))
    with pytest.raises(DataError, match="^50 consecutive rows cannot be used"):
        next(loader(source, workers=1).batches(0, 1))


@pytest.mark.skipif("FLICKR8K" not in os.environ, reason="FLICKR8K names no folder of shards")
def test_real_pictures():
    source = WebDataset("$FLICKR8K/train-*.tar")
    (batch,) = loader(source, batch_size=256, image_size=64).batches(0, 1)
    assert not batch["bad"].any()
    images = batch["image"].reshape(512, -1).astype(float)
    assert 80 < images.mean() < 150 and images.std(1).min() > 5
    pictures = next(EvaluationSet(WebDataset("$FLICKR8K/test-*.tar"), 64).batches(100))
    assert pictures.shape == (100, 64, 64, 3)
