"""Json as people publish it: documents of several kinds, pretty-printed or on one line."""

from __future__ import annotations

import json

import pytest

from clipx.data.base import fingerprint
from clipx.data.sources.table import Table
from clipx.errors import DataError

NAMES = [f"{i:012}.jpg" for i in range(6)]
WORDS = [f"a dog number {i}" for i in range(6)]
COCO = {
    "info": {"year": 2017},
    "licenses": [{"id": 1, "name": "free"}],
    "images": [{"id": i, "file_name": name, "height": 8} for i, name in enumerate(NAMES)],
    "annotations": [
        {"id": 50 + i, "image_id": i, "caption": text}
        for i, text in reversed(list(enumerate(WORDS)))
    ],
}
KARPATHY = {
    "dataset": "flickr8k",
    "images": [
        {
            "filename": name,
            "imgid": i,
            "split": ("train", "test")[i % 2],
            "sentences": [{"raw": text, "tokens": text.split()}, {"raw": "x y", "tokens": []}],
        }
        for i, (name, text) in enumerate(zip(NAMES, WORDS))
    ],
}
ROWS = [{"id": f"x{i}", "image": n, "caption": t} for i, (n, t) in enumerate(zip(NAMES, WORDS))]
DOCUMENTS = {
    "coco": COCO,
    "list": ROWS,
    "list in a dict": {"version": "1.0", "data": ROWS},
    "by name": dict(zip(NAMES, WORDS)),
    "columns": {"image": NAMES, "caption": WORDS},
    "pandas": {
        "image": {str(i): name for i, name in enumerate(NAMES)},
        "caption": {str(i): text for i, text in enumerate(WORDS)},
    },
    "objects by name": {n: {"caption": t, "score": 1} for n, t in zip(NAMES, WORDS)},
}


@pytest.fixture
def folder(tmp_path):
    for name in NAMES:
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


def dumped(folder, value, *, name="t.json", indent=None):
    (folder / name).write_text(json.dumps(value, indent=indent))
    return str(folder / name)


def pairs(table):
    return {table[i].image.decode(): table[i].texts for i in range(len(table))}


@pytest.mark.parametrize("indent", [None, 2], ids=["one line", "pretty"])
@pytest.mark.parametrize("kind", DOCUMENTS)
def test_documents_are_read_as_published(folder, kind, indent):
    table = Table(dumped(folder, DOCUMENTS[kind], indent=indent))
    assert pairs(table) == {name: (text,) for name, text in zip(NAMES, WORDS)}
    assert not table.account().lines()


def test_coco_is_read_in_the_order_of_its_annotations(folder):
    """The same rows as a jsonl with one line for each annotation."""
    names = {image["id"]: image["file_name"] for image in COCO["images"]}
    rows = [{"image": names[a["image_id"]], "caption": a["caption"]} for a in COCO["annotations"]]
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines, table = Table(str(folder / "t.jsonl")), Table(dumped(folder, COCO))
    assert list(table.keys()) == list(lines.keys()) == NAMES[::-1]
    assert fingerprint(table) == fingerprint(lines)


def test_what_coco_does_not_join_is_counted(folder):
    notes = [*COCO["annotations"][1:], {"image_id": 77, "caption": "of no image"}]
    table = Table(dumped(folder, COCO | {"annotations": notes}))
    assert len(table) == 5 and table.account().found == 7
    assert table.account().lines() == [
        "2 of 7 rows left out:",
        "  1: annotations of no image (entry 6)",
        f"  1: images without an annotation ({NAMES[5]})",
    ]


def test_karpathys_splits(folder):
    path = dumped(folder, KARPATHY)
    assert pairs(Table(path)) == {name: (text, "x y") for name, text in zip(NAMES, WORDS)}
    table = Table(path, where="split=test")
    assert list(table.keys()) == NAMES[1::2]
    assert table.account().lines()[1] == "  3: other rows than where=split=test"
    (folder / "val2014").mkdir()  # COCO's have a folder beside the name
    for name in NAMES:
        (folder / name).rename(folder / "val2014" / name)
    images = [image | {"filepath": "val2014"} for image in KARPATHY["images"]]
    table = Table(dumped(folder, KARPATHY | {"images": images}))
    assert list(table.keys()) == [f"val2014/{name}" for name in NAMES]
    assert len(pairs(table)) == 6


def test_coco_beside_its_folder_of_images(folder):
    (folder / "annotations").mkdir()
    (folder / "train2017").mkdir()
    for name in NAMES:
        (folder / name).rename(folder / "train2017" / name)
    table = Table(dumped(folder, COCO, name="annotations/captions_train2017.json"))
    assert len(pairs(table)) == 6


def test_json_by_lines_is_read_by_lines(folder):
    for name in ("t.json", "t.jsonl"):
        (folder / name).write_text("\n".join(map(json.dumps, ROWS)))
        assert len(Table(str(folder / name))) == 6
        (folder / name).write_text(json.dumps(ROWS[0]))
        assert pairs(Table(str(folder / name))) == {NAMES[0]: (WORDS[0],)}


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([1, 2], "entry 1 is a int, expected an object"),
        ("text", "a str; expected one JSON object per line, a list of objects, COCO's"),
        ({"a": ROWS, "b": ROWS}, "2 lists of objects (a, b); expected one JSON object per line"),
        ({"a.jpg": 3}, "one object with the keys a.jpg; expected one JSON object per line"),
        ([], "no rows; expected one JSON object per line"),
    ],
)
def test_other_documents_are_refused(folder, value, reason):
    with pytest.raises(DataError) as caught:
        Table(dumped(folder, value, indent=1))
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_a_left_out_name_with_half_a_surrogate_pair_can_be_printed(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"x")
    images = [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "\ud83d.jpg"}]
    notes = [{"image_id": 1, "caption": "a dog runs"}]
    (tmp_path / "c.json").write_text(json.dumps({"images": images, "annotations": notes}))
    lines = Table(str(tmp_path / "c.json")).account().lines()
    assert lines[1] == r"  1: images without an annotation (\ud83d.jpg)" and "".join(lines).encode()
