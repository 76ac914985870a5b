"""Csv and its relatives: quotes that are letters, damaged rows, first lines, encodings."""

from __future__ import annotations

import pytest

from clipx.data.sources.table import Table
from clipx.errors import DataError

SEPARATORS = {"comma": ",", "tab": "\t", "bar": " | ", "semicolon": ";"}


@pytest.fixture
def folder(tmp_path):
    """24 pictures, 0.jpg ... 23.jpg."""
    for i in range(24):
        (tmp_path / f"{i}.jpg").write_bytes(f"picture {i}".encode())
    return tmp_path


def rows(folder, texts, separator=",", header="image{0}caption", name="t.csv", end="\n"):
    """Writes a table with one line for each text."""
    lines = [header.replace("{0}", separator)] * bool(header)
    lines += [f"{i}.jpg{separator}{text}" for i, text in enumerate(texts)]
    (folder / name).write_bytes((end.join(lines) + end).encode())
    return str(folder / name)


def texts(table):
    return [table[i].texts for i in range(len(table))]


def guess(table, field):
    return next((g.value for g in table.guesses() if g.field == field), None)


PLAIN = [f"a dog number {i}" for i in range(24)]
OPEN_LATER = [*PLAIN[:4], '"the best dog', *PLAIN[5:9], 'a cat of the year"', *PLAIN[10:]]
OPEN_AT_ONCE = [*PLAIN[:4], '"the best', 'of all"', *PLAIN[6:]]
NEVER_CLOSED = [*PLAIN[:4], '"an open one', *PLAIN[5:]]
TEXT_BEHIND = [*PLAIN[:4], '"Hot dogs" says a sign', *PLAIN[5:]]
TWO_OPEN = [*PLAIN[:4], '"one', *PLAIN[5:8], '"two', *PLAIN[9:]]


@pytest.mark.parametrize(
    "captions", [OPEN_LATER, OPEN_AT_ONCE, NEVER_CLOSED, TEXT_BEHIND, TWO_OPEN]
)
@pytest.mark.parametrize("separator", SEPARATORS.values(), ids=SEPARATORS)
def test_no_quote_swallows_rows(folder, separator, captions):
    table = Table(rows(folder, captions, separator))
    assert texts(table) == [(text,) for text in captions]
    assert guess(table, "quotes") == "letters" and not table.account().lines()


@pytest.mark.parametrize("separator", SEPARATORS.values(), ids=SEPARATORS)
def test_quoted_cells_of_several_lines_are_read_as_they_were(folder, separator):
    several = f'first line{separator}\nthen 7.jpg, and 3 more\n\nand ""it"" too'
    captions = [f'"{several}"' if i % 3 == 0 else text for i, text in enumerate(PLAIN)]
    table = Table(rows(folder, captions, separator))
    expected = several.replace('""', '"').strip()
    assert table[0].texts == table[21].texts == (expected,)
    assert len(table) == 24 and guess(table, "quotes") is None


def test_a_row_that_swallows_others_is_refused_where_quotes_enclose_cells(folder):
    captions = [f'"a dog, number {i}"' for i in range(24)]
    captions[5:10] = ['"a dog, and', "a", "b", "c", 'a cat"']
    path = rows(folder, captions)
    with pytest.raises(DataError, match="t.csv: line 7: a quote opens here and closes 4 lines"):
        Table(path)
    assert len(Table(path, quotes="cells")) == 20  # what the message says for lines that are meant
    captions[5] = '"a dog, and""'
    with pytest.raises(DataError, match="line 7"):
        Table(rows(folder, captions))
    assert len(Table(rows(folder, PLAIN), quotes="letters")) == 24


def test_what_is_given_is_not_guessed(folder):
    table = Table(rows(folder, OPEN_LATER), quotes="letters", separator=",", image="image")
    assert [g.field for g in table.guesses()] == ["captions"]
    with pytest.raises(DataError, match="line 6: unexpected end of data"):
        Table(rows(folder, NEVER_CLOSED), quotes="cells")


@pytest.mark.parametrize("separator", SEPARATORS.values(), ids=SEPARATORS)
def test_a_row_that_lacks_a_cell_is_left_out_and_named(folder, separator):
    path = rows(folder, PLAIN, separator)
    text = (folder / "t.csv").read_text().replace(f"20.jpg{separator}", "20.jpg ")
    (folder / "t.csv").write_text(text)
    table = Table(path)
    assert len(table) == 23 and table.account().found == 24
    assert table.account().lines() == [
        "1 of 24 lines left out:",
        "  1: another number of cells than 2 (line 22)",
    ]
    (folder / "t.csv").write_text(text.replace("19.jpg" + separator, "19.jpg "))
    with pytest.raises(DataError, match="line 21 has 1 cells, expected 2 "):
        Table(path)  # two of 24 are more than a few


def test_cells_that_are_empty_at_the_end_do_no_harm(folder):
    assert len(Table(rows(folder, [f"{text},," for text in PLAIN]))) == 24


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]
)
def test_encodings_and_line_ends(folder, encoding, end):
    captions = ['"a dog, and\nä cat"', *PLAIN[1:]]
    path = rows(folder, captions, end=end)
    with open(path, encoding="utf-8", newline="") as file:
        text = file.read()
    with open(path, "w", encoding=encoding, newline="") as file:
        file.write(text.replace("\n", end) if end == "\r" else text)
    table = Table(path)
    assert texts(table)[1:] == [(text,) for text in PLAIN[1:]]
    assert [" ".join(t.split()) for t in table[0].texts] == ["a dog, and ä cat"]


def test_marks_inside_the_file_are_no_text(folder):
    """Files that were written with a byte order mark, one after the other."""
    lines = ["\ufeff\ufeffimage,caption", "0.jpg,\ufeffa dog", "\ufeffimage,caption", "1.jpg,a cat"]
    path = folder / "t.csv"
    path.write_text("\n".join([*lines, *(f"{i}.jpg,a dog" for i in range(2, 24))]))
    table = Table(str(path))
    assert texts(table)[:2] == [("a dog",), ("a cat",)] and len(table) == 24
    assert table.account().lines()[1] == "  1: the names of the columns once more (line 3)"


@pytest.mark.parametrize("separator", SEPARATORS.values(), ids=SEPARATORS)
@pytest.mark.parametrize("name", ["{}.jpg", "{}.jpg#0", "ROCO_{:05}", "img {}.PNG"])
def test_a_first_line_that_is_a_row(folder, separator, name):
    end = "" if "." in name else ".jpg"
    for i in range(8):
        (folder / (name.format(i).partition("#")[0] + end)).write_bytes(b"x")
    lines = [f"{name.format(i)}{separator}a dog with number {i}" for i in range(8)]
    (folder / "t.txt").write_text("\n".join(lines))
    table = Table(str(folder / "t.txt"))
    assert texts(table) == [(f"a dog with number {i}",) for i in range(8)]
    assert guess(table, "image") == "column_1" and guess(table, "captions") == ["column_2"]


def test_a_cell_above_the_limit_of_csv_is_one_line(folder):
    with pytest.raises(DataError, match="line 3: field larger than field limit"):
        Table(rows(folder, ["a", "b" * 200_000, "c"]))


def test_a_file_in_another_encoding_names_a_command_that_works(folder):
    path = rows(folder, PLAIN)
    for kind, byte in (("latin1", b"\xe9"), ("cp1252", b"\x93")):
        (folder / "t.csv").write_bytes(b"image,caption\n0.jpg,caf" + byte + b"\n")
        with pytest.raises(DataError) as caught:
            Table(path)
        found = str(caught.value)
        assert f"iconv -f {kind} -t utf-8 {path} > {folder}/utf8-t.csv" in found
        new = folder / "utf8-t.csv"
        new.write_text((folder / "t.csv").read_bytes().decode(kind))
        assert found.endswith(f"set --config.data.path={new}")
        assert Table(str(new))[0].texts[0].startswith("caf")


def test_a_quote_that_opens_in_the_first_line_is_told_in_one_line(folder):
    (folder / "t.csv").write_text(
        'image| n| "caption\n' + "".join(f"{i}.jpg| 1| a\n" for i in range(24))
    )
    table = Table(str(folder / "t.csv"), captions='"caption')
    assert len(table) == 24 and guess(table, "quotes") == "letters"
