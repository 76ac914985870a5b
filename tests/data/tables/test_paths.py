"""Pictures are found under the names that people write, or the error names what works."""

from __future__ import annotations

import re
import shlex

import pytest

from clipx.config.files import parse
from clipx.data.sources.table import Table
from clipx.errors import DataError

COUNT = 8


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "set" / "images").mkdir(parents=True)
    for i in range(COUNT):
        (tmp_path / "set" / "images" / f"p{i:03}.jpg").write_bytes(f"picture {i}".encode())
    return tmp_path / "set"


def write(folder, names, name="t.csv"):
    lines = ["image,caption", *(f"{each},a dog {i}" for i, each in enumerate(names))]
    (folder / name).write_text("\n".join(lines))
    return str(folder / name)


def obey(message, path, **fields):
    """Opens the table again with the flags that a message names last."""
    advice = message.rpartition("set ")[2].split(" or ")[0].split("; for all")[0]
    for word in shlex.split(advice):
        if match := re.fullmatch(r"--config\.data\.(\w+)=(.*)", word):
            value = parse(match[2])
            fields[match[1]] = tuple(value) if isinstance(value, list) else value
    return Table(fields.pop("path", path), **fields)


WRITTEN = {
    "backslashes": r"images\p{:03}.jpg",
    "a drive": r"C:\Users\me\set\images\p{:03}.jpg",
    "a drive and slashes": "D:/set/images/p{:03}.jpg",
    "a share": r"\\server\data\images\p{:03}.jpg",
    "rooted": "/images/p{:03}.jpg",
    "another computer": "/home/you/data/images/p{:03}.jpg",
    "numbers of captions": "images/p{:03}.jpg#0",
    "no ending": "images/p{:03}",
    "another ending": "p{:03}",
    "dots before": "./images/../images/p{:03}.jpg",
}


@pytest.mark.parametrize("kind", WRITTEN)
@pytest.mark.parametrize("root", [False, True], ids=["searched", "given"])
def test_paths_as_people_write_them(folder, kind, root):
    path = write(folder, [WRITTEN[kind].format(i) for i in range(COUNT)])
    where = folder / "images" if kind == "another ending" else folder
    table = Table(path, root=str(where) if root else "")
    assert [table[i].image for i in range(COUNT)] == [b"picture %d" % i for i in range(COUNT)]
    said = next(g.reason for g in table.guesses() if g.field == "image")
    assert ("is found as" in said) == (kind != "dots before")


def test_addresses_of_files(folder):
    (folder / "images" / "a b.jpg").write_bytes(b"x")
    names = [f"file://{folder}/images/p{i:03}.jpg" for i in range(3)]
    table = Table(write(folder, [*names, f"file://{folder}/images/a%20b.jpg"]))
    assert [table[i].image for i in (0, 3)] == [b"picture 0", b"x"]


def test_captions_of_one_picture_stay_together(folder):
    names = [f"p{i // 2:03}.jpg#{i % 2}" for i in range(8)]
    table = Table(write(folder, names))
    assert len(table) == 4 and table[1].texts == ("a dog 2", "a dog 3")


def test_a_name_that_two_pictures_have_is_refused(folder):
    (folder / "images" / "p003.png").write_bytes(b"another")
    with pytest.raises(DataError, match=r"p003.jpg and p003.png have this name, expected one"):
        Table(write(folder, [f"p{i:03}" for i in range(COUNT)]))


def test_paths_with_marks_of_patterns_are_files(folder):
    for name in ("t[1].csv", "{a,b}.csv", "what?.csv"):
        names = [f"images/p{i:03}.jpg" for i in range(COUNT)]
        assert len(Table(write(folder, names, name))) == COUNT


def test_the_root_that_a_message_names_works(folder):
    path = write(folder, [f"p{i:03}.jpg" for i in range(COUNT)])
    with pytest.raises(DataError, match="set --config.data.root=") as caught:
        Table(path, root="elsewhere")
    assert obey(str(caught.value), path)[0].image == b"picture 0"


@pytest.mark.parametrize("names", [("title", "description"), ("findings", "impression")])
def test_columns_that_a_message_names_work(folder, names):
    lines = ["image,brand," + ",".join(names)]
    lines += [f'p{i:03}.jpg,Acme,"a red dog {i}","delivered in {i} days"' for i in range(COUNT)]
    (folder / "t.csv").write_text("\n".join(lines))
    path = str(folder / "t.csv")
    with pytest.raises(DataError) as caught:
        Table(path)
    found = str(caught.value)
    assert all(f"{name}: '" in found for name in names) and "Acme" not in found
    table = obey(found, path)
    assert len(table[0].texts) == 1
    both = found.partition("for all of them: ")[2]
    assert len(obey("set " + both, path)[0].texts) == 2
    fields = {"image": "imag", "captions": names[0]}
    with pytest.raises(DataError, match="no column has that name") as caught:
        Table(path, **fields)
    assert len(obey(str(caught.value), path, **fields)) == COUNT


def test_the_captions_that_a_message_names_work(folder):
    lines = ["image,score,word", *(f"images/p{i:03}.jpg,{i},dog" for i in range(COUNT))]
    (folder / "t.csv").write_text("\n".join(lines))
    with pytest.raises(DataError, match="no column that looks like captions") as caught:
        Table(str(folder / "t.csv"))
    assert obey(str(caught.value), str(folder / "t.csv"))[3].texts == ("dog",)


def test_the_separator_that_a_message_names_works(folder):
    path = write(folder, [f"images/p{i:03}.jpg" for i in range(COUNT)])
    with pytest.raises(DataError, match="set --config.data.separator=,") as caught:
        Table(path, separator="tab")
    assert len(obey(str(caught.value), path)) == COUNT


def test_two_columns_of_pictures_are_asked_about(folder):
    lines = ["before,after,caption"]
    lines += [f"images/p{i:03}.jpg,images/p{i + 1:03}.jpg,a dog" for i in range(4)]
    (folder / "t.csv").write_text("\n".join(lines))
    with pytest.raises(DataError, match="2 columns could be the pictures") as caught:
        Table(str(folder / "t.csv"))
    assert len(obey(str(caught.value), str(folder / "t.csv"))) == 4
    text = (folder / "t.csv").read_text().replace("after", "filename")
    (folder / "t.csv").write_text(text)  # a usual name decides
    assert Table(str(folder / "t.csv"))[0].image == b"picture 1"
