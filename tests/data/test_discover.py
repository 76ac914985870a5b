"""`data.source=auto` finds what lies at a path, says what it took, and names the rest."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
import shlex

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.pictures import encode, photo
from support.shards import shard

from clipx.config import binding
from clipx.config.files import override
from clipx.data.base import Source
from clipx.data.contents import TEST
from clipx.data.discover import discover
from clipx.data.resolve import resolve
from clipx.data.sources.auto import Auto
from clipx.data.sources.files import Files
from clipx.data.sources.webdataset import WebDataset
from clipx.errors import ConfigError, DataError

COUNT = 4
PICTURE = encode(photo(16, 16))
WORDS = [f"a dog number {i}" for i in range(COUNT)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPX_CACHE", str(tmp_path / ".cache"))


def pictures(folder, ends=(".jpg",), stem="p{}"):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(COUNT):
        for end in ends:
            file = folder / (stem.format(i) + end)
            text = json.dumps({"caption": WORDS[i]}) if end == ".json" else WORDS[i]
            file.write_bytes(PICTURE if end in (".jpg", ".PNG") else text.encode())
    return folder


def csv(path, splits=()):
    header = "image,caption" + ",split" * bool(splits)
    rows = [
        f"p{i}.jpg,{text}" + "".join(f",{s}" for s in splits[i : i + 1])
        for i, text in enumerate(WORDS)
    ]
    path.write_text("\n".join([header, *rows]) + "\n")


def parquet(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": PICTURE + bytes([i]), "path": f"{path.stem}{i}.jpg"} for i in range(COUNT)]
    pq.write_table(pa.table({"image": images, "caption": [[text] for text in WORDS]}), path)


def saved_to_disk(folder, shards=2):
    folder.mkdir(parents=True)
    files = [f"data-{i:05}-of-{shards:05}.arrow" for i in range(shards)]
    for n, name in enumerate(files):
        images = [{"bytes": PICTURE + bytes([n, i]), "path": None} for i in range(COUNT)]
        table = pa.table({"image": images, "text": WORDS})
        with pa.OSFile(str(folder / name), "wb") as out, pa.ipc.new_stream(out, table.schema) as to:
            to.write_table(table)
    (folder / "cache-1f.arrow").write_bytes(b"something that is left over")
    (folder / "dataset_info.json").write_text("{}")
    state = {"_data_files": [{"filename": name} for name in files]}
    (folder / "state.json").write_text(json.dumps(state))


def class_folders(folder):
    for name in ("cat", "dog"):
        pictures(folder / name)


def metadata(folder, name="metadata.jsonl"):
    rows = [{"file_name": f"p{i}.jpg", "text": text} for i, text in enumerate(WORDS)]
    (pictures(folder) / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def flickr8k(folder):
    pictures(folder / "Images")
    lines = [f"p{i}.jpg#{n}\t{text}" for i, text in enumerate(WORDS) for n in range(5)]
    (folder / "Flickr8k.token.txt").write_text("\n".join(lines))
    (folder / "Flickr8k.lemma.token.txt").write_text("\n".join(lines))
    (folder / "Flickr_8k.trainImages.txt").write_text("p0.jpg\np1.jpg\n")
    (folder / "readme.txt").write_text("What this is.\n\nWho made it, and when.\n")


def coco(folder):
    (folder / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        pictures(folder / split)
        document = {
            "images": [{"id": i, "file_name": f"p{i}.jpg"} for i in range(COUNT)],
            "annotations": [{"image_id": i, "caption": text} for i, text in enumerate(WORDS)],
        }
        (folder / "annotations" / f"captions_{split}.json").write_text(json.dumps(document))
        (folder / "annotations" / f"instances_{split}.json").write_text("{}")


def shards(folder, names=("train-0", "train-1", "test-0")):
    folder.mkdir(parents=True)
    for name in names:
        shard(folder / f"{name}.tar", COUNT)


def layout(folder):
    """img2dataset's `files`, with what it writes beside."""
    pictures(folder / "00000", (".jpg", ".txt", ".json"))
    (folder / "00000_stats.json").write_text('{"count": 4}')
    urls = {"url": ["http://x.org/a.jpg"] * COUNT, "caption": WORDS, "status": ["success"] * COUNT}
    pq.write_table(pa.table(urls), folder / "00000.parquet")


MADE = {
    "table": (lambda f: csv(pictures(f) / "t.csv"), "table", "t.csv", COUNT),
    "imagefolder": (metadata, "table", "metadata.jsonl", COUNT),
    "imagefolder of splits": (
        lambda f: [metadata(f / s) for s in ("train", "test")],
        "table",
        "train/metadata.jsonl",
        COUNT,
    ),
    "flickr8k": (flickr8k, "table", "Flickr8k.token.txt", COUNT),
    "coco": (coco, "table", "annotations/captions_train2017.json", COUNT),
    "parquet of splits": (
        lambda f: [
            parquet(f / "data" / f"{s}-0000{i}.parquet")
            for s in ("train", "test")
            for i in range(2)
        ],
        "table",
        "data/train-0000*.parquet",
        2 * COUNT,
    ),
    "one parquet": (lambda f: parquet(f / "a.parquet"), "table", "a.parquet", COUNT),
    "saved to disk": (saved_to_disk, "table", None, 2 * COUNT),
    "shards": (shards, "webdataset", "train-*.tar", 2 * COUNT),
    "shards in folders": (
        lambda f: shards(f / "a", ("0", "1")),
        "webdataset",
        "a/*.tar",
        2 * COUNT,
    ),
    "files": (layout, "files", "", COUNT),
    "pairs": (lambda f: pictures(f, (".PNG", ".txt")), "files", "", COUNT),
    "two folders": (
        lambda f: [pictures(f / "images"), pictures(f / "text", (".txt",))],
        "files",
        "",
        COUNT,
    ),
    "class folders": (class_folders, "folder", "", 2 * COUNT),
    "class folders of splits": (
        lambda f: [class_folders(f / s) for s in ("train", "val")],
        "folder",
        "train",
        2 * COUNT,
    ),
    "one folder deeper": (
        lambda f: csv(pictures(f / "deep") / "captions.txt"),
        "table",
        "deep/captions.txt",
        COUNT,
    ),
}


@pytest.mark.parametrize("kind", MADE)
def test_a_path_and_nothing_else(tmp_path, kind):
    make, source, path, rows = MADE[kind]
    root = tmp_path / "set"
    make(root)
    found = discover(str(root))
    assert found.source == source
    if path is not None:
        assert found.values["path"] == str(root / path).rstrip("/")
    assert str(root) in found.line("data")
    data = Auto(str(root))
    assert len(data) == rows and data[rows - 1].image[:3] == PICTURE[:3]
    assert source == "folder" or data.glance(0).texts
    guess = data.guesses()[0]
    assert (guess.field, guess.value, guess.reason) == ("source", source, found.what)
    assert len(pickle.loads(pickle.dumps(data))) == rows


def test_evals_take_the_other_split(tmp_path):
    for make, name in ((coco, "val2017"), (shards, "test-0")):
        root = tmp_path / make.__name__
        make(root)
        kept, trained = discover(str(root), wanted=TEST), discover(str(root))
        assert name in kept.values["path"].removeprefix(str(root))
        assert name not in trained.values["path"].removeprefix(str(root))
    csv(pictures(tmp_path / "t") / "t.csv", ["train", "test", "val", "train"])
    assert discover(str(tmp_path / "t")).values["where"] == "split=train"
    found = discover(str(tmp_path / "t" / "t.csv"), wanted=TEST)
    assert found.values["where"] == "split=test" and "not taken: train, val" in found.what
    assert "where" not in discover(str(tmp_path / "t"), {"where": "split=val"}).values
    assert len(Auto(str(tmp_path / "t"))) == 2 and len(Auto(str(tmp_path / "t"), where="split=val"))


def test_files_and_patterns(tmp_path):
    shards(tmp_path / "set", ("a", "b"))
    csv(pictures(tmp_path / "set") / "[1].csv")
    for path, source in (
        ("*.tar", "webdataset"),
        ("{a,b}.tar", "webdataset"),
        ("a.tar", "webdataset"),
        ("[1].csv", "table"),
    ):
        full = str(tmp_path / "set" / path)
        assert discover(full)[:2] == (source, {"path": full})
    both = (str(tmp_path / "set" / "a.tar"), str(tmp_path / "set" / "b.tar"))
    assert len(Auto(both)) == 2 * COUNT
    assert discover("gs://bucket/*.tar")[:2] == ("webdataset", {"path": "gs://bucket/*.tar"})


def obey(message):
    """The section that the first flags of a message set."""
    config = {"data": {"source": "auto"}}
    for word in shlex.split(message.rpartition("set ")[2].split("; ")[0].rpartition(": ")[2]):
        match = re.fullmatch(r"--config\.(data\.\w+)=(.*?),?", word)
        if match:
            override(config, match[1], match[2])
    return config["data"]


def test_two_things_are_asked_about_and_each_advice_works(tmp_path):
    layout(tmp_path / "set")
    shard(tmp_path / "set" / "00001.tar", COUNT)
    csv(pictures(tmp_path / "set") / "t.csv")
    with pytest.raises(DataError, match="3 things to read, expected one; set one of: ") as caught:
        Auto(str(tmp_path / "set"))
    opened = []
    for part in str(caught.value).partition("set one of: ")[2].split("; "):
        section = obey("set " + part)
        cls = binding.find("data.sources", section.pop("source"), Source)
        opened.append(len(cls(**section)))
    assert opened == [COUNT, COUNT, COUNT + COUNT]  # the files also count the pictures of t.csv
    auto = {"data": {"source": "auto", "path": str(tmp_path / "set")}}
    with pytest.raises(
        DataError, match="one of: .*--config.evals.own.data.source=webdataset "
    ) as of:
        resolve({"evals": {"own": auto}})
    assert str(of.value) == str(caught.value).replace("config.data.", "config.evals.own.data.")
    with pytest.raises(DataError, match="--config.data.parts.a.source=webdataset "):
        resolve({"data": {"source": "mixture", "parts": {"a": auto["data"]}}})


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
def test_tables_beside_those_of_imagefolder_are_named(tmp_path, name):
    if name.endswith("parquet"):
        pictures(tmp_path)
        rows = [{"file_name": f"p{i}.jpg", "text": text} for i, text in enumerate(WORDS)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    elif name.endswith("csv"):
        csv(pictures(tmp_path) / name)
    else:
        metadata(tmp_path)
    alone = discover(str(tmp_path))
    assert alone.values["path"].endswith(name) and "not taken" not in alone.what
    parquet(tmp_path / "train.parquet")
    csv(tmp_path / "t.csv")
    beside = discover(str(tmp_path))
    assert beside.values == alone.values
    assert beside.what == f"{alone.what} (not taken: t.csv, train.parquet)"
    assert len(Auto(str(tmp_path))) == COUNT


def test_tables_that_do_not_fit_are_named(tmp_path):
    csv(pictures(tmp_path) / "a.csv")
    (tmp_path / "products.csv").write_text("image,title,description\np0.jpg,a dog,it runs\n")
    (tmp_path / "prices.tsv").write_text("item\tprice\na\t3\n")
    found = discover(str(tmp_path))
    assert found.values["path"] == str(tmp_path / "a.csv")
    assert found.what.endswith("a.csv (not taken: prices.tsv, products.csv)")


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda f: f.mkdir(), "found nothing; expected tar shards, a table"),
        (pictures, "found 4 .jpg (such as p0.jpg); expected tar shards, a table"),
        (
            lambda f: (pictures(f) / "a.zip").write_bytes(b"x"),
            "found 4 .jpg, 1 .zip (such as a.zip",
        ),
        (
            lambda f: (pictures(f) / "t.csv").write_text(
                "image,title,description\n" + "".join(f"p{i}.jpg,a dog,it runs\n" for i in range(4))
            ),
            "2 columns could be the caption",
        ),
        (
            lambda f: (pictures(f) / "t.csv").write_text("image,caption\nno/1.jpg,a dog\n"),
            "none of the first 1 pictures exists",
        ),
    ],
)
def test_what_does_not_fit_lists_what_there_is(tmp_path, make, found):
    make(tmp_path / "set")
    with pytest.raises(DataError) as caught:
        Auto(str(tmp_path / "set"))
    assert found in str(caught.value) and "\n" not in str(caught.value)


def test_the_folder_that_other_sources_refuse_is_found_as_they_advise(tmp_path):
    shards(tmp_path / "set", ("a", "b"))
    with pytest.raises(DataError, match="a folder, expected a tar; set ") as caught:
        WebDataset(str(tmp_path / "set"))
    assert obey(str(caught.value).split(", which")[0]) == {"source": "auto"}
    assert len(Auto(str(tmp_path / "set"))) == 2 * COUNT


def test_every_key_of_the_sources_that_are_found_is_one_of_auto():
    own = binding.fields(Auto)
    for name in ("webdataset", "table", "files", "folder"):
        cls = binding.find("data.sources", name, Source)
        assert set(binding.fields(cls)) <= set(own), name
    assert all(f.default in (None, ()) for name, f in own.items() if name != "path")


def test_a_config_is_resolved_everywhere(tmp_path):
    csv(pictures(tmp_path / "t") / "t.csv", ["train", "test", "val", "train"])
    shards(tmp_path / "w")
    auto = {"source": "auto", "path": str(tmp_path / "t")}
    config = {
        "data": {"source": "mixture", "workers": 2, "parts": {"a": {**auto, "weight": 1.0}}},
        "evals": {
            "retrieval": {"data": {**auto, "captions": "caption", "root": None}},
            "probe": {"data": {"source": "auto", "path": ""}, "train_data": {**auto}},
            "other": {"data": {"source": "shapes"}},
        },
        "seed": 3,
    }
    said, before = [], json.dumps(config)
    out = resolve(config, say=said.append)
    table = {"source": "table", "path": str(tmp_path / "t" / "t.csv")}
    assert out["data"]["parts"]["a"] == {**table, "where": "split=train", "weight": 1.0}
    retrieval = out["evals"]["retrieval"]["data"]
    assert retrieval == {**table, "where": "split=test", "captions": "caption"}
    assert out["evals"]["probe"]["train_data"]["where"] == "split=train"
    assert out["evals"]["probe"]["data"] == {"source": "webdataset", "path": ""}  # not read
    assert json.dumps(config) == before and out["seed"] == 3
    assert [line.split(":")[0] for line in said] == [
        "data.parts.a.source=auto",
        "evals.retrieval.data.source=auto",
        "evals.probe.train_data.source=auto",
    ]
    again = resolve(out, say=said.append)
    assert again == out and len(said) == 3


@pytest.mark.parametrize("odd", [{"path": 5}, {"where": 5}, {"image": ["a"]}, {"path": [1]}])
def test_settings_of_a_wrong_type_are_errors_of_the_config(tmp_path, odd):
    csv(pictures(tmp_path) / "t.csv")
    (key,) = odd
    with pytest.raises(ConfigError) as caught:
        resolve({"data": {"source": "auto", "path": str(tmp_path), "workers": 2, **odd}})
    assert caught.value.where.startswith(f"config.data.{key}")


def test_a_run_that_goes_on_takes_what_it_found_before(tmp_path):
    csv(pictures(tmp_path / "t") / "t.csv")
    config = {"data": {"source": "auto", "path": str(tmp_path / "t")}}
    saved = resolve(config, say=lambda _: None)
    csv(tmp_path / "t" / "another.csv")
    with pytest.raises(DataError, match="2 things to read"):
        resolve(config, say=lambda _: None)
    assert resolve(config, saved, say=lambda _: None) == saved


def test_files_account_for_everything(tmp_path):
    root = tmp_path / "set"
    layout(root)
    (root / "00000" / "p9.txt").write_text("of no picture")
    (root / "00000" / ".p8.jpg").write_bytes(b"x")
    (root / "00000" / "p7.jpg").write_bytes(PICTURE)
    data = Files(str(root))
    assert len(data) == COUNT + 1 and list(data.keys())[0] == "00000/p0"
    account = data.account()
    assert account.found == 3 * COUNT + 5 and account.used == 3 * COUNT + 1
    assert account.lines()[1:] == [
        "  1: files with an ending that is not read (00000.parquet)",
        "  2: texts without a picture of the same name (00000/p9.txt, 00000_stats.json)",
        "  1: hidden files (00000/.p8.jpg)",
    ]
    assert [data[i].texts for i in range(COUNT)] == [(text,) for text in WORDS]
    with pytest.raises(Exception, match="no caption"):
        data[COUNT]


def test_lines_of_texts_are_captions_where_all_have_several(tmp_path):
    for i in range(COUNT):
        pictures(tmp_path, (".jpg",))
        (tmp_path / f"p{i}.txt").write_text(f"one {i}\ntwo {i}\n")
    data = Files(str(tmp_path))
    assert data[1].texts == ("one 1", "two 1")
    assert [g.field for g in data.guesses()] == ["txt_lines"]
    assert dataclasses.replace(data, txt_lines="one")[1].texts == ("one 1\ntwo 1",)
