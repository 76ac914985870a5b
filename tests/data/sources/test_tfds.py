"""A data set that TFDS prepared is read without TensorFlow, and its faults are reported."""

from __future__ import annotations

import concurrent.futures
import io
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from support.tfds import build

from clipx.data.base import Source, fingerprint
from clipx.data.sources.tfds import Tfds, _roles
from clipx.errors import BadSample, DataError, install_hint

F = tfds.features
ROWS = {"train": 9, "test": 2}


def picture(i: int, kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(i).integers(0, 256, (12, 9 + i, 3), np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


CAPTIONED = {
    "image": F.Image(encoding_format="jpeg"),
    "image/filename": F.Text(),
    "image/id": np.int64,
    "captions": F.Sequence({"id": np.int64, "text": F.Text()}),
    "mask": F.Image(shape=(None, None, 1)),
    "objects": F.Sequence({"bbox": F.BBoxFeature()}),
}


def captioned(i: int) -> dict:
    captions = [{"id": j, "text": f"caption {j} of {i} \N{SNOWMAN}"} for j in range(1 + i % 3)]
    return {
        "image": io.BytesIO(picture(i)),
        "image/filename": f"{i}.jpg",
        "image/id": i,
        "captions": captions,
        "mask": io.BytesIO(b"no picture, and never decoded"),
        "objects": [{"bbox": F.BBox(0.0, 0.0, 1.0, 1.0)}] * (i % 2),
    }


@pytest.fixture(scope="session")
def captions(tmp_path_factory) -> str:
    return build(tmp_path_factory.mktemp("tfds"), "Captioned", CAPTIONED, captioned, ROWS)


@pytest.fixture(scope="session")
def labelled(tmp_path_factory) -> str:
    """Raw grey pixels, and a label of which every third is secret (-1)."""
    features = {
        "pixels": F.Tensor(shape=(6, 8, 1), dtype=np.uint8),
        "label": F.ClassLabel(names=["cat", "dog"]),
        "file_name": F.Text(),
    }

    def row(i):
        pixels = np.full((6, 8, 1), i, np.uint8)
        return {"pixels": pixels, "label": i % 3 - 1, "file_name": f"{i}.png"}

    return build(tmp_path_factory.mktemp("tfds"), "Labelled", features, row, ROWS)


@pytest.fixture(scope="session")
def many(tmp_path_factory) -> str:
    """Two pictures, two kinds of captions and two labels, so that the config must choose."""
    features = {
        "left": F.Image(),
        "right": F.Image(encoding_format="png"),
        "short": F.Text(),
        "long": F.Sequence(F.Text()),
        "colour": F.ClassLabel(names=["red", "blue"]),
        "shape": F.ClassLabel(num_classes=2),
    }

    def row(i):
        return {
            "left": io.BytesIO(picture(i)),
            "right": io.BytesIO(picture(i, "PNG") if i else b""),
            "short": f" short {i}\0" if i else b"\xff",
            "long": ["", f"long {i}"] if i else [],
            "colour": i % 2,
            "shape": i % 2,
        }

    return build(tmp_path_factory.mktemp("tfds"), "Many", features, row, ROWS)


def message(call, error=DataError) -> str:
    with pytest.raises(error) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_rows_have_the_prepared_contents(captions):
    data = Tfds("captioned", "train", data_dir=captions)
    assert isinstance(data, Source) and len(data) == ROWS["train"] and data.classes == ()
    pictures = {picture(i): i for i in range(ROWS["train"])}
    order = [pictures[example.image] for example in map(data.__getitem__, range(len(data)))]
    assert sorted(order) == list(range(ROWS["train"])) != order  # TFDS shuffles once
    for row, i in enumerate(order):
        texts = tuple(f"caption {j} of {i} \N{SNOWMAN}" for j in range(1 + i % 3))
        assert data[row][1:] == (texts, row, f"captioned/1.2.0/train/{row}", None)
        assert type(data[row].image) is bytes
    for row in (-1, ROWS["train"]):
        with pytest.raises(IndexError):
            data[row]


def test_keys_are_those_of_the_examples_and_name_no_folder(captions):
    data = Tfds("captioned", "train", data_dir=captions)
    assert list(data.keys()) == [example.key for example in data]
    parts = [Tfds("captioned", split, data_dir=captions) for split in ("train", "test")]
    assert fingerprint(data) == fingerprint(parts[0]) != fingerprint(parts[1])


def test_splits_may_be_slices_and_sums(captions):
    train = list(Tfds("captioned", "train", data_dir=captions))
    part = list(Tfds("captioned", "train[2:5]", data_dir=captions))
    assert [e.image for e in part] == [e.image for e in train[2:5]]
    assert [e.row for e in part] == [0, 1, 2]
    assert len(Tfds("captioned", "train+test", data_dir=captions)) == sum(ROWS.values())


def test_the_folder_comes_from_the_environment(captions, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", captions)
    assert len(Tfds("captioned:1.2.0", "test")) == ROWS["test"]
    monkeypatch.setenv("SETS", captions)
    monkeypatch.delenv("TFDS_DATA_DIR")
    assert len(Tfds("captioned:1.*.*", "test", data_dir="$SETS")) == ROWS["test"]


def test_raw_pixels_and_labels(labelled):
    data = Tfds("labelled", "train", data_dir=labelled)
    assert data.classes == ("cat", "dog")
    values = [int(example.image[0, 0, 0]) for example in data]
    assert sorted(values) == list(range(ROWS["train"]))
    for value, example in zip(values, data, strict=True):
        assert (example.image == value).all() and example.image.shape == (6, 8, 3)
        assert example.texts == () and example.label == (None, 0, 1)[value % 3]
    named = Tfds("labelled", "train", data_dir=labelled, text="file_name")
    assert [example.texts for example in named] == [(f"{value}.png",) for value in values]


def test_ambiguous_features_must_be_named(many):
    assert message(lambda: Tfds("many", "train", data_dir=many)) == (
        f"{many}/many/1.2.0: several features may be the image; set image = 'left' or "
        "image = 'right'"
    )
    choice = {"data_dir": many, "image": "right"}
    assert "set label = 'colour' or label = 'shape'" in message(
        lambda: Tfds("many", "train", **choice)
    )
    assert Tfds("many", "train", **choice, text="long").classes == ()
    data = Tfds("many", "train", **choice, label="colour", text="long")
    assert data.classes == ("red", "blue")
    pictures = {picture(i, "PNG"): i for i in range(1, ROWS["train"])}
    rows = range(len(data))
    bad = {}
    for row in rows:
        try:
            i = pictures[data[row].image]
            assert (data[row].texts, data[row].label) == ((f"long {i}",), i % 2)
        except BadSample as error:
            bad[row] = str(error)
    ((row, reason),) = bad.items()
    assert reason == f"many/1.2.0/train/{row}: the picture has no bytes"
    choice = {"data_dir": many, "image": "left", "label": "shape"}
    data = Tfds("many", "train", **choice, text="long")
    assert message(lambda: data[row], BadSample) == f"many/1.2.0/train/{row}: empty caption"
    data = Tfds("many", "train", **choice, text="short")
    assert "the caption cannot be read ('utf-8' codec" in message(lambda: data[row], BadSample)
    assert data[(row + 1) % len(data)].texts[0].startswith("short ")
    assert data.classes == ("0", "1")


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"image": "imag"}, "feature image='imag' does not exist; found "),
        ({"image": "imag"}, "; nearest: image"),
        ({"image": "captions"}, "feature image='captions' has another type; found "),
        ({"text": "caption"}, "feature text='caption' does not exist; found "),
        ({"text": "image"}, "captions (Sequence)"),
        ({"label": "objects"}, "feature label='objects' has another type"),
        ({"split": "val"}, "captioned: split 'val': Unknown split 'val'. Should be one of"),
        ({"split": "val"}, "it has train, test"),
        ({"split": "train[:x]"}, "split 'train[:x]': Unrecognized split format"),
        ({"split": "train[3:3]"}, "split 'train[3:3]' has no rows; it has train, test"),
        ({"name": "captioned:3.0.0"}, ", which has captioned:1.2.0"),
        ({"name": "captions"}, "nor a data set that TFDS knows; nearest: captioned"),
        ({"name": "coco_captions"}, "tfds build coco_captions --file_format=array_record --data_d"),
        ({"name": "a set"}, "a set in "),
        ({"name": "mnist", "data_dir": "/no/such"}, "mnist: not prepared in /no/such; set data_d"),
        ({"name": "qqqq", "data_dir": "/no/such"}, "nearest: nothing"),
    ],
)
def test_wrong_keys_are_reported(captions, wrong, reason):
    values = {"name": "captioned", "split": "train", "data_dir": captions} | wrong
    assert reason in message(lambda: Tfds(**values))


def test_a_data_set_without_pictures_or_without_captions(tmp_path):
    words = build(tmp_path, "Words", {"text": F.Text()}, lambda i: {"text": "a"}, ROWS)
    assert message(lambda: Tfds("words", "train", data_dir=words)) == (
        f"{words}/words/1.2.0: no picture; found text (Text); expected an Image feature"
    )
    features = {"image": F.Image(), "file_name": F.Text()}
    alone = build(
        tmp_path,
        "Alone",
        features,
        lambda i: {"image": io.BytesIO(picture(i)), "file_name": "a"},
        ROWS,
    )
    said = message(lambda: Tfds("alone", "train", data_dir=alone))
    assert "no captions and no label; found file_name (Text), image (Image); set text or" in said


def test_a_depth_map_is_not_a_picture():
    depth = {"image": F.Image(shape=(None, None, 1), dtype=np.float32), "text": F.Text()}
    with pytest.raises(DataError, match=r"^here: no picture; found image \(Image\), text"):
        _roles(Tfds, F.FeaturesDict(depth), "here")


def test_another_file_format_says_how_to_convert_it(tmp_path):
    folder = build(tmp_path, "Drawn", CAPTIONED, captioned, ROWS)
    info = tmp_path / "drawn" / "1.2.0" / "dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"fileFormat": "tfrecord"}))
    said = message(lambda: Tfds("drawn", "train", data_dir=folder))
    assert said.startswith(f"{info.parent}: prepared as tfrecord, expected array_record")
    assert said.endswith(
        f"tfds convert_format --dataset_version_dir={info.parent} --out_file_format=array_record"
    )
    info.write_text("{")
    assert "cannot be opened" in message(lambda: Tfds("drawn", "train", data_dir=folder))


def test_missing_and_truncated_files_are_refused_at_open(tmp_path):
    folder = build(tmp_path, "Drawn", CAPTIONED, captioned, ROWS)
    (file,) = (tmp_path / "drawn" / "1.2.0").glob("*train.array*")
    os.truncate(file, file.stat().st_size - 100)
    said = message(lambda: Tfds("drawn", "train", data_dir=folder))
    assert said.startswith(f"{file}: truncated or damaged (")
    assert len(Tfds("drawn", "test", data_dir=folder)) == ROWS["test"]
    (other,) = file.parent.glob("*test.array*")
    file.write_bytes(other.read_bytes())
    said = message(lambda: Tfds("drawn", "train", data_dir=folder))
    assert said == f"{file}: 2 rows, expected 9; copy it again"
    file.unlink()
    said = message(lambda: Tfds("drawn", "train", data_dir=folder))
    assert said == f"{file}: no such file; copy the data set again"


def test_a_missing_package_is_named(captions, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    said = message(lambda: Tfds("captioned", "train", data_dir=captions))
    assert said.startswith("data source tfds: a package is missing")
    assert said.endswith(install_hint("tfds"))


def test_it_pickles_and_reads_from_many_threads(captions):
    data = Tfds("captioned", "train", data_dir=captions)
    copy = pickle.loads(pickle.dumps(data))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(copy.__getitem__, list(range(9)) * 20)) == list(data) * 20


def test_a_worker_needs_neither_tensorflow_nor_jax(captions, tmp_path):
    data = Tfds("captioned", "train", data_dir=captions)
    (tmp_path / "source").write_bytes(pickle.dumps(data))
    (tmp_path / "rows").write_bytes(pickle.dumps(list(data)))
    code = (
        "import pickle, sys\n"
        "sys.modules['jax'] = None\n"
        "data, rows = (pickle.load(open(name, 'rb')) for name in ('source', 'rows'))\n"
        "assert list(data) == rows\n"
        f"from clipx.data.sources.tfds import Tfds\n"
        f"assert list(Tfds('captioned', 'train', {captions!r})) == rows\n"
        "assert not {'tensorflow', 'jaxlib', 'torch'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_features_that_were_found_are_said(captions, labelled):
    found = {guess.field: guess.value for guess in Tfds("captioned", "train", captions).guesses()}
    assert found and all(found)
    source = Tfds("captioned", "train", captions, **found)
    assert source.guesses() == () and source[1] == Tfds("captioned", "train", captions)[1]
    found = {guess.field: guess.value for guess in Tfds("labelled", "train", labelled).guesses()}
    assert found == {"image": "pixels", "label": "label"}
