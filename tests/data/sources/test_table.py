"""The layout of a table is inferred, and every error says what is wrong and how to fix it."""

from __future__ import annotations

import concurrent.futures
import csv
import json
import os
import pickle
import re
import sys
import tarfile

import pytest

from clipx.data.base import fingerprint
from clipx.data.sources.table import Table
from clipx.data.sources.webdataset import WebDataset
from clipx.errors import BadSample, DataError, install_hint

HOSTILE = {
    "quotes": 'a "quoted" dog, and a comma',
    "newline": "a dog\non two lines",
    "separators": "tab\tsemicolon; bar| comma,",
    "long": "a very long caption " * 500,  # 10 kB
    "right to left": "كلب صغير يركض",
    "emoji": "a dog 🐕‍🦺 at the 🏖️",
    "chinese": "一只狗在沙滩上",
}


@pytest.fixture
def folder(tmp_path):
    """Pictures 0.jpg ... 9.jpg beside the tables that a test writes."""
    pictures(tmp_path, 10)
    return tmp_path


def pictures(folder, count: int):
    folder.mkdir(exist_ok=True)
    for i in range(count):
        (folder / f"{i}.jpg").write_bytes(f"picture {i}".encode())


def write(path, text: str | bytes) -> str:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def said(path, **fields) -> str:
    """The error of opening a table, without its path."""
    with pytest.raises(DataError) as caught:
        Table(path, **fields)
    text = str(caught.value)
    assert "\n" not in text
    return text.removeprefix(f"{path}: ")


def bad(data: Table, row: int) -> str:
    with pytest.raises(BadSample) as caught:
        data[row]
    return str(caught.value)


def texts(data: Table) -> list[tuple[str, ...]]:
    return [data[i].texts for i in range(len(data))]


def table(path, rows: list[dict]) -> str:
    """Writes `rows` in the format of the file name's ending."""
    path = str(path)
    if path.endswith("jsonl"):
        with open(path, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    elif path.endswith("parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.endswith("tsv") else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


FORMATS = ["csv", "tsv", "jsonl", "parquet"]


@pytest.mark.parametrize("ending", FORMATS)
def test_rows_of_a_picture_are_one_example_in_every_format(folder, ending):
    order = [3, 3, 1, 0, 3, 1]
    rows = [{"id": i, "filepath": f"{p}.jpg", "caption": f"c{i}"} for i, p in enumerate(order)]
    data = Table(table(folder / f"t.{ending}", rows))
    assert [tuple(data[i]) for i in range(3)] == [
        (b"picture 3", ("c0", "c1", "c4"), 0, "3.jpg", None),
        (b"picture 1", ("c2", "c5"), 1, "1.jpg", None),
        (b"picture 0", ("c3",), 2, "0.jpg", None),
    ]
    assert len(data) == 3 and list(data.keys()) == ["3.jpg", "1.jpg", "0.jpg"]
    assert data.classes == ()
    for row in (-1, 3):
        with pytest.raises(IndexError):
            data[row]


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_captions_are_read_unchanged(folder, ending, name):
    caption = HOSTILE[name]
    rows = [{"image": f"{i}.jpg", "text": text} for i, text in enumerate(["a", caption, "b"])]
    data = Table(table(folder / f"t.{ending}", rows))
    assert texts(data) == [("a",), (caption.strip(),), ("b",)]


def test_nuls_are_removed(folder):
    data = Table(write(folder / "t.csv", "image,text\n0.jpg,a\0 dog\0\n1.jpg,\0\n"))
    assert data[0].texts == ("a dog",)
    assert bad(data, 1) == "1.jpg: empty caption"
    data = Table(write(folder / "t.jsonl", json.dumps({"image": "0.jpg\0", "text": "\0a\0"})))
    assert data[0].texts == ("a",)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_cell_may_be_a_list(folder, ending):
    rows = [
        {"image": "0.jpg", "captions": ["one", " ", "two"]},
        {"image": "1.jpg", "captions": []},
        {"image": "0.jpg", "captions": ["three"]},
        {"image": "2.jpg", "captions": None},
    ]
    data = Table(table(folder / f"t.{ending}", rows))
    assert data[0].texts == ("one", "two", "three")
    assert [bad(data, i) for i in (1, 2)] == ["1.jpg: empty caption", "2.jpg: empty caption"]


def test_a_cell_of_csv_may_hold_a_list_as_json_or_python_writes_it(folder):
    rows = [
        {"raw": json.dumps(["one, two", "3"]), "filename": "0.jpg"},
        {"raw": str(["it's", "so"]), "filename": "1.jpg"},
        {"raw": '["not a list]', "filename": "2.jpg"},
    ]
    data = Table(table(folder / "t.csv", rows))
    assert texts(data) == [("one, two", "3"), ("it's", "so"), ('["not a list]',)]


@pytest.mark.parametrize(
    ("header", "image", "captions"),
    [
        (("filepath", "caption"), "filepath", ["caption"]),
        (("title", "filepath"), "filepath", ["title"]),  # open_clip's
        (("id", "file_name", "sentence", "split"), "file_name", ["sentence"]),
        (("url", "image", "TEXT"), "image", ["TEXT"]),
        (("description", "image", "caption"), "image", ["caption"]),
        (("image", "caption_0", "caption_1", "text"), "image", ["text"]),
        (("image", "caption_0", "caption_1"), "image", ["caption_0", "caption_1"]),
        (("a", "b", "where_it_is", "said"), "where_it_is", ["said"]),  # by content
    ],
)
def test_columns_are_found_by_name_and_content(folder, header, image, captions):
    cells = {name: f"words of {name}" for name in header}
    cells |= {"id": "7", "a": "x", "b": "12.5", "url": "http://x.org/0.jpg", "split": "train"}
    cells |= {image: "0.jpg"}
    data = Table(table(folder / "t.csv", [{name: cells[name] for name in header}]))
    assert data[0].texts == tuple(f"words of {name}" for name in captions)


def test_paths_without_an_extension_are_recognised_by_their_files(folder):
    (folder / "photo-a").write_bytes(b"x")
    data = Table(write(folder / "t.csv", "id,name,text\n1,photo-a,a dog\n2,photo-b,a cat\n"))
    assert data[0].image == b"x" and data[0].texts == ("a dog",)


def test_columns_may_be_named(folder):
    path = write(folder / "t.csv", "filepath,other,caption,more\n0.jpg,1.jpg,a b,c d\n")
    data = Table(path, image="other", captions=("more", "caption"))
    assert data[0][:2] == (b"picture 1", ("c d", "a b"))
    assert Table(path, captions="more")[0].texts == ("c d",)


@pytest.mark.parametrize("separator", [",", "\t", ";", "|", "| "])
def test_separators_are_found(folder, separator):
    rows = [("image", "n", "comment"), ("0.jpg", "1", '"a, b; c| d\te"'), ("1.jpg", "2", "a dog")]
    path = write(folder / "t.csv", "".join(separator.join(row) + "\r\n" for row in rows))
    assert texts(Table(path)) == [("a, b; c| d\te",), ("a dog",)]
    name = {"\t": "tab"}.get(separator, separator.strip())
    assert texts(Table(path, separator=name)) == texts(Table(path))


def test_quotes_in_tsv_that_do_not_quote_cells_are_text(folder):
    lines = ["image\tcaption", '0.jpg\t"Foo" bar', '1.jpg\tan 8" disc', '2.jpg\t"open', "3.jpg\tx"]
    data = Table(write(folder / "t.tsv", "\n".join(lines)))
    assert texts(data) == [('"Foo" bar',), ('an 8" disc',), ('"open',), ("x",)]


def test_marks_blank_lines_and_missing_line_ends_do_no_harm(folder):
    path = write(folder / "t.csv", "\ufeffimage, caption\r\n\r\n0.jpg, a dog\r\n \r\n1.jpg,b")
    assert texts(Table(path)) == [("a dog",), ("b",)]


@pytest.mark.parametrize("place", ["images", "img", "", "zz"])
def test_the_root_is_found(tmp_path, place):
    for name in ("a", "images", "zz"):
        (tmp_path / name).mkdir()
    pictures(tmp_path / place, 2)
    path = write(tmp_path / "t.csv", "image,caption\n0.jpg,a\n./1.jpg,b\n9.jpg,c\n")
    data = Table(path)
    assert [data[i].image for i in range(2)] == [b"picture 0", b"picture 1"]
    assert list(data.keys()) == ["0.jpg", "1.jpg", "9.jpg"]
    missing = os.path.join(tmp_path, place, "9.jpg") if place else os.path.join(tmp_path, "9.jpg")
    assert bad(data, 2) == f"9.jpg: {missing} cannot be read (No such file or directory)"


def test_the_root_may_be_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PICTURES", str(tmp_path / "far" / "away"))
    (tmp_path / "far").mkdir()
    pictures(tmp_path / "far" / "away", 1)
    path = write(tmp_path / "t.csv", "image,caption\n0.jpg,a\n")
    assert Table(path, root="$PICTURES")[0].image == b"picture 0"
    monkeypatch.chdir(tmp_path / "far" / "away")
    assert Table(path)[0].image == b"picture 0"  # as written


def test_keys_and_fingerprint_do_not_depend_on_the_folder(tmp_path):
    prints = set()
    for name in ("one", "another"):
        (tmp_path / name).mkdir()
        pictures(tmp_path / name / "a", 2)
        pictures(tmp_path / name / "ab", 2)
        files = [tmp_path / name / "a" / "1.jpg", tmp_path / name / "ab" / "0.jpg"]
        lines = [f"{file},a dog" for file in files]
        data = Table(write(tmp_path / f"{name}.csv", "\n".join(["image,caption", *lines])))
        assert list(data.keys()) == ["a/1.jpg", "ab/0.jpg"]
        assert [data[i].key for i in range(2)] == ["a/1.jpg", "ab/0.jpg"]
        prints.add(fingerprint(data))
    assert len(prints) == 1


def test_several_tables_each_with_its_own_pictures(tmp_path):
    for name in ("a", "b"):
        pictures(tmp_path / name, 2)
        (tmp_path / name / "0.jpg").write_bytes(name.encode())
        order = ("image", "caption") if name == "a" else ("caption", "image")
        row = {"image": "0.jpg", "caption": f"in {name}"}
        table(tmp_path / name / "t.csv", [{key: row[key] for key in order}])
    for path in (f"{tmp_path}/?/t.csv", f"{tmp_path}/{{a,b}}/t.csv"):
        data = Table(path)
        assert [data[i][:2] for i in range(2)] == [(b"a", ("in a",)), (b"b", ("in b",))]
    both = (f"{tmp_path}/a/t.csv", table(tmp_path / "a" / "u.csv", [row | {"caption": "more"}]))
    assert texts(Table(both)) == [("in a", "more")]
    write(tmp_path / "b" / "t.csv", "picture,caption\n0.jpg,in b\n")
    assert f"{tmp_path}/b/t.csv: image='image', but no column" in said(f"{tmp_path}/?/t.csv")


@pytest.mark.parametrize("ending", FORMATS)
def test_where_keeps_rows(folder, ending):
    rows = [{"image": f"{i}.jpg", "caption": "a", "split": s} for i, s in enumerate("xyx")]
    path = table(folder / f"t.{ending}", rows)
    assert list(Table(path, where="split=x").keys()) == ["0.jpg", "2.jpg"]
    assert said(path, where="split=z") == "no row has split=z; the values of split are 'x', 'y'"
    assert "where='slit', but no column has that name" in said(path, where="slit=x")
    assert said(path, where="slit=x").endswith("; set --config.data.where=split=VALUE")
    assert said(path, where="split") == "where='split': expected column=value"


def test_labels_are_numbers_or_names(folder):
    path = write(folder / "t.csv", "image,kind,n\n0.jpg,dog,2\n1.jpg,cat,0\n2.jpg,,\n")
    data = Table(path, label="kind")
    assert data.classes == ("cat", "dog")
    assert [data[i].label for i in range(3)] == [1, 0, None]
    assert texts(data) == [(), (), ()]
    data = Table(path, label="kind", classes=("dog", "cow", "cat"))
    assert [data[i].label for i in range(3)] == [0, 2, None]
    data = Table(path, label="n")
    assert (data.classes, [data[i].label for i in range(3)]) == ((), [2, 0, None])
    data = Table(path, label="n", classes=("a", "b", "c"), captions="kind")
    assert (data[0].label, data[0].texts) == (2, ("dog",))
    assert said(path, label="kind", classes=("dogs", "cat")) == (
        "label='kind': 'dog' is not one of the 2 classes; nearest: 'dogs'"
    )
    error = "label='n': '2' is not one of the 2 classes"
    assert said(path, label="n", classes=("a", "b")) == error
    path = write(folder / "t.csv", "image,kind\n0.jpg,dog\n0.jpg,cat\n")
    error = "0.jpg: the labels 'dog' and 'cat', expected one label per picture"
    assert said(path, label="kind") == error
    path = write(folder / "t.csv", "image,kind\n0.jpg,\n")
    assert said(path, label="kind") == "label='kind': every cell of the column is empty"


def test_a_bad_row_is_named_and_its_neighbours_are_fine(folder):
    (folder / "1.jpg").write_bytes(b"")
    lines = ["image,caption", "0.jpg,a", "1.jpg,b", "no/2.jpg,c", "3.jpg,", ",e", "  ,f", "6.jpg,g"]
    data = Table(write(folder / "t.csv", "\n".join(lines)))
    assert [data[i].texts for i in (0, 6)] == [("a",), ("g",)]
    assert bad(data, 1) == "1.jpg: the picture has no bytes"
    assert bad(data, 2).startswith(f"no/2.jpg: {folder}/no/2.jpg cannot be read (No such file")
    assert bad(data, 3) == "3.jpg: empty caption"
    assert bad(data, 4) == "t.csv line 6: the path of the picture is empty"
    assert bad(data, 5) == "t.csv line 7: the path of the picture is empty"
    assert list(data.keys())[3:6] == ["3.jpg", "t.csv line 6", "t.csv line 7"]


def test_it_pickles_and_reads_from_many_threads(folder):
    rows = [{"image": f"{i % 7}.jpg", "caption": f"c{i}"} for i in range(30)]
    data = Table(table(folder / "t.jsonl", rows))
    copy = pickle.loads(pickle.dumps(data))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        read = list(pool.map(copy.__getitem__, list(range(7)) * 50))
    assert read == [data[i] for i in range(7)] * 50


def test_the_error_for_a_wrong_separator_names_the_right_one(folder):
    path = write(folder / "t.csv", "filepath,title\n0.jpg,a dog\n")
    assert said(path, separator="tab") == (
        "one column, 'filepath,title', with separator 'tab'; separator ',' gives the columns "
        "filepath, title; set --config.data.separator=,"
    )
    path = write(folder / "t.csv", "filepath\ttitle\n0.jpg\ta dog\n")
    assert said(path, separator=",").endswith("set --config.data.separator=tab")
    path = write(folder / "t.csv", "filepath~title\n0.jpg~a dog\n")
    assert said(path).startswith("one column, 'filepath~title', expected a column of pictures and")
    assert texts(Table(path, separator="~")) == [("a dog",)]
    with pytest.raises(DataError, match="separator='comma': expected one character or tab"):
        Table(path, separator="comma")


def test_the_error_for_a_missing_column_names_the_nearest(folder):
    path = write(folder / "t.csv", "filepath,title,n\n0.jpg,a dog,1\n")
    found = "columns found: filepath (0.jpg), title (a dog), n (1)"
    assert said(path, image="filpath") == (
        f"image='filpath', but no column has that name; {found}; best guesses for image: filepath, "
        "for captions: title; set --config.data.image=filepath --config.data.captions=title"
    )
    assert "for captions: title; set" in said(path, captions=("title", "caption"))
    assert said(path, label="titel").endswith("for label: title; set --config.data.label=title")
    path = write(folder / "t.csv", "image,text,text\n0.jpg,a dog,b\n")
    assert said(path, captions="text").startswith("captions='text', but 2 columns have that name")


def test_the_error_for_unclear_columns_lists_those_that_fit(folder):
    path = write(folder / "t.csv", "code,img id,words here\n77,12,a dog\n88,13,a cat\n")
    assert said(path) == (
        "no column that looks like paths of pictures; columns found: code (77), img id (12), words "
        "here (a dog)"
    )
    path = write(folder / "t.csv", "image,code,word\n0.jpg,7,dog\n")
    assert said(path) == (
        "no column that looks like captions; columns found: image (0.jpg), code (7), word (dog); "
        "best guesses for image: image, for captions: word; "
        "set --config.data.image=image --config.data.captions=word"
    )


def test_the_error_for_missing_pictures_lists_the_folders_tried(tmp_path):
    tmp_path = tmp_path / "only"
    (tmp_path / "far").mkdir(parents=True)
    path = write(tmp_path / "t.csv", "image,caption\nno/0.jpg,a\nno/1.jpg,b\n")
    assert said(path) == (
        "none of the first 2 pictures exists; the first path tried is no/0.jpg; roots tried: "
        f"as written, {tmp_path}, {tmp_path}/far, {tmp_path.parent}; name the folder that holds "
        "them: --config.data.root=FOLDER"
    )
    pictures(tmp_path / "far" / "no", 1)
    assert said(path, root=f"{tmp_path}/near") == (
        f"none of the first 2 pictures exists; the first path tried is {tmp_path}/near/no/0.jpg; "
        f"roots tried: {tmp_path}/near; set --config.data.root={tmp_path}/far"
    )
    path = write(tmp_path / "t.csv", "caption,url\na dog,http://x.org/0.jpg\n")
    download = (
        "download them first, for example with img2dataset, whose shards the source webdataset "
        "reads"
    )
    assert said(path, image="url") == (
        f"URLs (http://x.org/0.jpg), expected paths of pictures; {download}"
    )
    assert said(path).startswith(
        f"no column that looks like paths of pictures (url has URLs; {download}); columns found"
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "image,caption\n0.jpg,a\n1.jpg,b,c\n",
            "line 3 has 3 cells, expected 2 (image, caption); ",
        ),
        ('image,caption\n0.jpg,"a\nb"\n\n1.jpg\n', "line 5 has 1 cells, expected 2 (image"),
        (
            'image,caption\n0.jpg,"a, b"\n1.jpg,"b\n2.jpg,c\n',
            "line 3: unexpected end of data; the file",
        ),
        (
            'image,caption\n0.jpg,"a, b"\n1.jpg,"b" c\n',
            "line 3: ',' expected after '\"'; the file is t",
        ),
        (b"image,caption\n0.jpg,a\n1.jpg,caf\xe9\n", "line 3 is not UTF-8 (byte 0xe9); if it is l"),
        ("", "an empty file, expected a first line with column names"),
        ("\n\n", "an empty file, expected a first line with column names"),
        ("image,caption\n", "no column that looks like paths of pictures; columns found: image (e"),
        ("caption\na dog\n", "one column, 'caption', expected a column of pictures and one of cap"),
    ],
)
def test_a_damaged_table_is_refused_with_its_line(folder, text, reason):
    assert said(write(folder / "t.csv", text)).startswith(reason)


def test_a_header_and_no_rows(folder):
    path = write(folder / "t.csv", "image,caption\n")
    assert said(path, image="image", captions="caption") == "no rows"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"image": "0.jpg", "text": "a"}\n{"image": \n', "line 2 is not JSON (Expecting value"),
        ('{"image": "0.jpg", "text": "a"}\n[1]\n', "line 2 is a list, expected a JSON object"),
        ('[{"image": "0.jpg", "text": "a"}, 7]', "entry 2 is a int, expected an object"),
        ('[{"image": "0.jpg", "text": "a"}', "line 1 is not JSON (Expecting ',' delimiter"),
        ("", "an empty file, expected one JSON object per line"),
        (
            '{"image": "0.jpg", "text": "a"}\n{"image": "0.jpg", "text": {"en": "b"}}\n',
            "line 2: column text holds a dict, expected a string or a list of strings",
        ),
        (
            '{"image": "0.jpg", "text": "a"}\n{"image": {"bytes": 1}, "text": "b"}\n',
            "line 2: column image holds a dict, expected a path",
        ),
    ],
)
def test_damaged_json_lines_are_refused_with_their_line(folder, text, reason):
    assert said(write(folder / "t.jsonl", text)).startswith(reason)


def test_numbers_and_missing_cells_of_json_lines(folder):
    rows = [{"image": "0.jpg", "text": 2020}, {"image": "1.jpg", "text": float("nan")}]
    rows += [{"text": "no picture"}, {"image": "2.jpg", "text": "\ud800 half a pair"}]
    data = Table(table(folder / "t.jsonl", rows))
    assert [data[i].texts for i in (0, 3)] == [("2020",), ("? half a pair",)]
    assert bad(data, 1) == "1.jpg: empty caption"
    assert bad(data, 2) == "t.jsonl line 3: the path of the picture is empty"


def test_damaged_parquet_and_parquet_without_pyarrow(folder, monkeypatch):
    path = table(folder / "t.parquet", [{"image": "0.jpg", "text": "a"}])
    os.truncate(path, 100)
    assert said(path).startswith("cannot be read as parquet (")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    why = "import of pyarrow halted; None in sys.modules"
    assert said(path) == f"parquet needs pyarrow ({why}); {install_hint('parquet')}"


def test_other_files_are_refused(folder):
    assert said(str(folder)).startswith("a folder, expected a table that is a local file")
    ends = "expected a file name that ends in one of .csv, .tsv"
    assert said(str(folder / "0.jpg")).startswith(ends)
    packed = said(write(folder / "t.csv.gz", b"x"))
    assert packed.startswith(ends) and packed.endswith("; decompress it")
    assert said(str(folder / "t.cvs")).startswith("no file matches; nearest in")
    assert said(()).startswith("data path: nothing given")


def test_a_table_of_many_rows_is_a_few_flat_arrays(folder):
    rows = [{"image": f"{i}.jpg", "caption": f"words {i}"} for i in range(5000)]
    data = Table(table(folder / "t.csv", rows))
    assert len(data) == 5000 and data._key(4999) == "4999.jpg"
    size = len("4999.jpg") + len("words 4999")
    assert len(pickle.dumps(data)) < 5000 * (size + 48)
    assert not re.search(r"list|dict", " ".join(type(v).__name__ for v in vars(data).values()))


@pytest.mark.skipif("FLICKR8K" not in os.environ, reason="FLICKR8K names no folder of shards")
def test_flickr8k_is_the_same_from_its_csv_as_from_its_shards(tmp_path):
    shards = WebDataset("$FLICKR8K/val-000000.tar")
    names = [f"{shards[i].key.split('/')[1]}.jpg" for i in range(40)]
    with tarfile.open(os.path.expandvars("$FLICKR8K/val-000000.tar")) as tar:
        for name in names:
            tar.extract(name, tmp_path / "pictures", filter="data")
    data = Table("$FLICKR8K/captions.csv", root=str(tmp_path / "pictures"), where="split=val")
    assert len(data) == 1000
    rows = {key: row for row, key in enumerate(data.keys())}
    for i, name in enumerate(names):
        assert data[rows[name]][:2] == shards[i][:2] and len(shards[i].texts) == 5
    here = tmp_path / "captions.csv"
    here.symlink_to(os.path.expandvars("$FLICKR8K/captions.csv"))
    assert Table(str(here), where="split=val")[rows[names[0]]].image == shards[0].image
