"""Stored features are read row by row, in place of pictures and captions."""

from __future__ import annotations

import json
import os
import pathlib
import pickle
import resource

import numpy as np
import pytest
from support.loaders import build_loader
from support.pictures import TOKENIZER, Pictures

from clipx.data.base import Example
from clipx.data.features import FILE, FeatureRows, layout
from clipx.data.row_writer import Rows, RowWriter
from clipx.errors import DataError

ROWS, WIDTH, CONTEXT = 50, 4, TOKENIZER(["a"]).shape[1]
BAD = 7


def write(folder, tower, *, views=1, rows=ROWS, captions=3, **about):
    """Features that say whose they are: [row, view or caption, 0, ...]."""
    folder.mkdir(parents=True, exist_ok=True)
    bad = np.arange(rows) == BAD
    each = np.arange(rows)
    if tower == "image":
        arrays = {"backbone.npy": np.zeros((rows, views, WIDTH))}
        arrays["backbone.npy"][..., 0] = each[:, None]
        arrays["backbone.npy"][..., 1] = np.arange(views)
    else:
        offsets = np.append(0, np.cumsum(np.where(bad, 0, captions)))
        owner = np.repeat(each, np.diff(offsets))
        number = np.arange(len(owner)) - offsets[owner]
        texts = [f"row {r} text {i}" for r, i in zip(owner, number)]
        backbone = np.stack([owner, number, *np.zeros((WIDTH - 2, len(owner)))], axis=1)
        arrays = {"backbone.npy": backbone, "offsets.npy": offsets, "ids.npy": TOKENIZER(texts)}
    arrays["bad.npy"] = bad
    files = layout(tower, views=views, width=WIDTH, context=CONTEXT)
    with RowWriter(folder / FILE, files, {}) as writer:
        writer.write(rows, arrays)
        about = {"tower": tower, "rows": rows, "fingerprint": "f", "tokens": False, **about}
        writer.finish(about)
    return FeatureRows(str(folder))


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    return {name: write(folder / name, name) for name in ("image", "text")}


def load(features, step=2, source=None, **changes):
    changes = {"batch_size": 12, **changes}
    loader = build_loader(source or Pictures(bad=(BAD,)), TOKENIZER, features=features, **changes)
    return loader.load(step, np.arange(12))


@pytest.mark.parametrize("towers", [("image",), ("text",), ("image", "text")])
@pytest.mark.parametrize("caption", ["random", "first", "all"])
def test_features_are_those_of_the_rows_and_captions_that_a_run_would_see(stored, towers, caption):
    usual = load({}, caption=caption)
    features = load({name: stored[name] for name in towers}, caption=caption)
    assert np.array_equal(usual["row"], features["row"])
    assert np.array_equal(usual["position"], features["position"])
    assert np.array_equal(usual["text"], features["text"])
    if "image" in towers:
        assert features["image"].shape == (12, 0, 32, 32, 3)
        assert np.array_equal(features["image_features"][:, 0, 0], usual["row"])
    else:
        assert np.array_equal(usual["image"], features["image"])
    if "text" in towers:
        found = features["text_features"][:, 0, :2].astype(int).tolist()
        expected = TOKENIZER([f"row {row} text {i}" for row, i in found])
        assert np.array_equal(usual["text"][:, 0], expected)


def test_a_row_without_features_is_replaced_and_named(stored):
    every = [load(stored, step) for step in range(12)]
    assert not any(BAD in batch["row"] for batch in every)
    said = [json.loads(bad) for batch in every for bad in batch["bad"] if bad]
    assert said and {bad["row"] for of_row in said for bad in of_row} == {BAD}
    assert "quarantine.jsonl" in said[0][0]["reason"]


def test_a_share_of_the_rows_has_its_own_features(stored):
    rows = np.arange(ROWS - 1, 9, -1)
    share = {name: FeatureRows(x.folder, rows) for name, x in stored.items()}
    source = Pictures(rows=len(rows))
    batch = load(share, source=source, row_ids=rows)
    assert np.array_equal(batch["row"], batch["image_features"][:, 0, 0])
    assert np.array_equal(batch["row"], batch["text_features"][:, 0, 0])
    assert batch["row"].min() >= 10


def test_a_worker_maps_the_files_again(stored):
    again = pickle.loads(data := pickle.dumps(stored))
    assert len(data) < 1000
    for name, features in stored.items():
        assert (again[name].width, again[name].about) == (features.width, features.about)


def test_each_view_takes_stored_crops_of_its_own(tmp_path):
    image = {"image": write(tmp_path / "i", "image", views=5)}
    crops = ((0.3, 1.0),) * 2
    batches = [load(image, step, crops=crops) for step in range(20)]
    chosen = np.concatenate([batch["image_features"][..., 1] for batch in batches])
    assert set(chosen[:, 0]) == {0, 2, 4} and set(chosen[:, 1]) == {1, 3}
    again = load(image, 3, crops=crops)["image_features"]
    assert np.array_equal(again, batches[3]["image_features"])
    survey = load(image, 3, crops=crops, survey=True)["image_features"]
    assert not np.array_equal(again, survey) and np.array_equal(again[..., 0], survey[..., 0])


class Many(Pictures):
    """Ten million rows, of which only captions are read."""

    def __len__(self):
        return 10_000_000

    def glance(self, row):
        return Example(b"", ("a caption",), row, f"{row}")

    def __getitem__(self, row):
        raise AssertionError("a picture is read")


def resident() -> int:
    """Bytes of memory that this process occupies."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="memory is measured in /proc")
def test_ten_million_rows_are_never_read_whole(tmp_path):
    rows, width = len(Many()), 512
    files = layout("image", views=1, width=width)
    with RowWriter(tmp_path / FILE, files, {}) as writer:
        for name, each in files.items():
            writer.written[name] = rows
            with open(tmp_path / f".{name}.part", "r+b") as out:  # sparse: a size, and no blocks
                out.truncate(128 + rows * np.dtype(each.dtype).itemsize * int(np.prod(each.shape)))
        writer.finish({"tower": "image", "rows": rows, "fingerprint": "f", "tokens": False})
    assert (tmp_path / "backbone.npy").stat().st_size > 20e9
    build_loader(Many(), TOKENIZER, batch_size=256).schedule.row(0, 0)  # what any run takes
    before = resident()
    features = {"image": FeatureRows(str(tmp_path), np.arange(rows - 1, -1, -1, dtype=np.int32))}
    loader = build_loader(Many(), TOKENIZER, batch_size=256, features=features)
    for step in range(4):
        assert loader.load(step, np.arange(256))["image_features"].shape == (256, 1, width)
    grown = resident() - before
    assert grown < 60e6, f"{grown / 1e6:.0f} MB"


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda f: (f / FILE).unlink(), "expected a folder that `clipx.embed` has finished"),
        (lambda f: (f / FILE).write_text("{"), "cannot be read"),
        (lambda f: (f / "backbone.npy").unlink(), "no such file"),
        (lambda f: (f / "bad.npy").write_bytes(b"12"), "not a complete .npy file"),
        (lambda f: np.save(f / "backbone.npy", np.zeros((3, 1, 4), "f")), "not the 50 rows"),
        (lambda f: np.save(f / "backbone.npy", np.zeros((50, 4), "f")), "not the 50 rows"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_in_a_line(tmp_path, spoil, said):
    write(tmp_path / "x", "image")
    spoil(tmp_path / "x")
    with pytest.raises(DataError, match=said) as error:
        FeatureRows(str(tmp_path / "x"))
    assert "\n" not in str(error.value)


def test_an_interrupted_writer_goes_on_where_it_was(tmp_path):
    arrays = {"a.npy": Rows(np.float32, (2,)), "b.npy": Rows(np.int64)}

    def write(identity, rows):
        with RowWriter(tmp_path / "x.json", arrays, identity) as writer:
            before = writer.done, dict(writer.written)
            for row in range(writer.done, rows):
                block = {"a.npy": np.full((row + 1, 2), row), "b.npy": np.array([row])}
                writer.write(row + 1, block)
            if rows == 4:
                writer.finish({"x": 1})
        return before

    assert write({"id": (1, 2)}, 2) == (0, {"a.npy": 0, "b.npy": 0})
    part = tmp_path / ".a.npy.part"
    part.write_bytes(part.read_bytes() + b"half a row")
    assert write({"id": (1, 2)}, 3) == (2, {"a.npy": 3, "b.npy": 2})
    assert write({"id": (1, 3)}, 1)[0] == 0  # of other things
    part.write_bytes(part.read_bytes()[:-1])
    assert write({"id": (1, 3)}, 4)[0] == 0  # not whole
    a, b = np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy")
    assert b.tolist() == [0, 1, 2, 3] and a[:, 0].tolist() == [0, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.npy", "b.npy", "x.json"]
