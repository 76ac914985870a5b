"""Files that are no data: pipes, devices, programs for printers, and tars that lead nowhere."""

import io
import os
import socket
import struct
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image
from support import ROOT
from support.pictures import encode, photo

from clipx.config import regular
from clipx.data import contents, pictures, raster
from clipx.data.base import Example
from clipx.data.sources.files import Files
from clipx.data.sources.folder import Folder
from clipx.data.sources.table import Table
from clipx.data.sources.webdataset import WebDataset
from clipx.errors import BadSample, DataError


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CLIPX_CACHE", str(tmp_path_factory.mktemp("cache")))


# what is no regular file


def pipe(path):
    os.mkfifo(path)


def unix_socket(path):
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(os.path.relpath(path))  # its path may have 107 characters at most


def endless(path):
    path.symlink_to("/dev/zero")


ODD = [(pipe, "a named pipe"), (unix_socket, "a socket"), (endless, "a character device")]


@pytest.mark.parametrize(("make", "kind"), ODD)
def test_only_regular_files_are_opened(tmp_path, monkeypatch, make, kind):
    """As a picture they are a bad row; as a table, a tar or a list the data set is refused."""
    monkeypatch.chdir(tmp_path)
    expected = f"({kind}, expected a regular file)"
    for folder in ("in/a", "in/b", "pairs"):
        (tmp_path / folder).mkdir(parents=True)
    for place in ("pairs/1.jpg", "pairs/2.txt", "in/a/1.jpg", "t.csv", "t.parquet", "t.json",
                  "x.tar", "names.json"):  # fmt: skip
        make(tmp_path / place)
    for place in ("pairs/2.jpg", "in/b/2.jpg"):
        (tmp_path / place).write_bytes(encode(photo()))
    (tmp_path / "pairs/1.txt").write_text("one")
    (tmp_path / "good.csv").write_text("image,caption\npairs/1.jpg,one\npairs/2.jpg,two\n")
    for source, bad in ((Table("good.csv"), [0]), (Files("pairs"), [0, 1])):
        for row in bad:
            with pytest.raises(BadSample) as error:
                source[row]
            assert expected in error.value.reason
    with pytest.raises(BadSample) as error:
        Folder("in")[0]
    assert expected in error.value.reason
    for open_it in (
        lambda: Table("t.csv"),
        lambda: Table("t.parquet"),
        lambda: Table("t.json"),
        lambda: WebDataset("x.tar"),
        lambda: Folder("x.tar"),
        lambda: Folder("in", "names.json"),
        lambda: list(pictures.Pictures(8)(["pairs/1.jpg"], 1)),
    ):
        with pytest.raises(DataError) as error:
            open_it()
        assert expected in str(error.value)
    assert not contents.class_folders_in("x.tar") and contents.read_json("names.json") is None


def test_a_pipe_that_takes_a_files_place_does_not_block(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("a")
    status = os.stat(tmp_path / "a")
    (tmp_path / "a").unlink()
    os.mkfifo(tmp_path / "a")
    monkeypatch.setattr(os, "stat", lambda path: status)
    with pytest.raises(OSError, match="a named pipe"):
        regular.only(tmp_path / "a")


# pictures


POSTSCRIPT = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 8 8
%%EndComments
(touched) (w) file closefile showpage
%%EOF
"""
WMF = b"\xd7\xcd\xc6\x9a\0\0" + struct.pack("<4hHI", 0, 0, 100, 100, 96, 0) + b"\x01\0\x09\0" * 9


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (POSTSCRIPT, "PostScript"),
        (b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 30, len(POSTSCRIPT)) + bytes(18) + POSTSCRIPT,
         "PostScript"),
        (WMF, "a Windows metafile"),
        (b"%PDF-1.4 ", "PDF"),
        (b"\n<svg xmlns='http://www.w3.org/2000/svg'/>", "HTML, XML or SVG"),
        (b"\0\0\x01\0\x01\0\x10\x10" + bytes(60), "expected JPEG, PNG"),
        (b"", "it starts with b''"),
    ],
)  # fmt: skip
def test_what_is_no_raster_picture_reaches_no_decoder(monkeypatch, data, said):
    def refuse(*_, **__):
        raise AssertionError("a decoder was asked")

    monkeypatch.setattr(Image, "open", refuse)
    monkeypatch.setattr("cv2.imdecode", refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    example, out = Example(data, (), 0, "a.jpg"), np.empty((1, 8, 8, 3), np.uint8)
    for look in (
        lambda: pictures.header(example),
        lambda: pictures.decode(example),
        lambda: pictures.evaluation(example, 8),
        lambda: pictures.views(example, ((0.5, 1.0),), np.full((1, 10, 4), 0.5), (False,), out),
    ):
        with pytest.raises(BadSample) as error:
            look()
        assert said in error.value.reason and "cannot be decoded" in error.value.reason


@pytest.mark.parametrize(
    "kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "MPO"]
)
def test_every_raster_format_goes_to_its_own_decoder(kind):
    data = encode(photo(20, 24), kind)
    assert raster.kind(data) == {"MPO": "JPEG"}.get(kind, kind)
    assert pictures.header(Example(data, (), 0, "a"))[:2] == (24, 20)
    off = pictures.decode(Example(data, (), 0, "a")).astype(int) - photo(20, 24)
    assert np.abs(off).mean() < 12


def test_big_tiff_and_floats_are_known():
    assert raster.kind(b"II+\0\x08\0\0\0") == "TIFF" and raster.kind(b"Pf\n2 2\n1.0\n") == "PPM"


# tars


def header(name="a.jpg", size=0, kind=tarfile.REGTYPE) -> bytes:
    """A header with a right checksum, whatever its size is."""
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    if size < 0 or size >= 8**11:
        block[124:136] = bytes([0x80 if size >= 0 else 0xFF]) + size.to_bytes(
            11, "big", signed=size < 0
        )
    else:
        block[124:136] = b"%011o\0" % size
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(**values) -> bytes:
    body = b""
    for name, value in values.items():
        record = f" {name}={value}\n".encode()
        size = len(record) + 1
        while len(str(size)) + len(record) != size:
            size = len(str(size)) + len(record)
        body += str(size).encode() + record
    return header("p", len(body), tarfile.XHDTYPE) + body.ljust(-(-len(body) // 512) * 512, b"\0")


def good(*names) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
        return out.getvalue()


END = bytes(1024)
PAIR, PAIRS = good("x.jpg", "x.txt")[:2048], good("w.jpg", "w.txt", "x.jpg", "x.txt")[:4096]
HOSTILE = {
    "negative": header(size=-1024),
    "back to the start": header(size=-len(PAIRS) - 512),
    "small negative": header(size=-1),
    "beyond the file": header(size=1 << 40),
    "beyond any file": header(size=(1 << 80)),
    "negative in pax": pax(size="-2048") + header("b.jpg"),
    "absurd in pax": pax(size="9" * 30) + header("b.jpg"),
    "a long name that reads all": header("n", 1 << 40, tarfile.GNUTYPE_LONGNAME) + header("b.jpg"),
    "a negative long name": header("n", -4096, tarfile.GNUTYPE_LONGNAME) + header("b.jpg"),
    "a chain of headers": pax(a="b") * 3000 + header("b.jpg"),
    "an extended header of 1 GB": header("p", 1 << 30, tarfile.XHDTYPE) + header("b.jpg"),
    "sparse without its map": header("s.jpg", 0, tarfile.GNUTYPE_SPARSE)[:482]
    + b"\1"
    + header("s.jpg", 0, tarfile.GNUTYPE_SPARSE)[483:],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_headers_of_tars_do_not_lead_astray(tmp_path, name):
    """Behind a whole pair, the tar counts as damaged; as the first header, it is no tar."""
    (tmp_path / "x.tar").write_bytes(PAIRS + HOSTILE[name] + END)
    for open_it in (WebDataset, Folder):
        with pytest.raises(DataError, match="truncated or damaged; the last complete member is x."):
            open_it(str(tmp_path / "x.tar"))
    kept = WebDataset(str(tmp_path / "x.tar"), truncated="keep")
    assert kept[0].image == b"abc" and len(kept) in (1, 2)
    (tmp_path / "y.tar").write_bytes(HOSTILE[name] + END)
    for open_it in (WebDataset, Folder):
        with pytest.raises(DataError) as error:
            open_it(str(tmp_path / "y.tar"))
        assert "\n" not in str(error.value) and "y.tar" in str(error.value)
    contents.class_folders_in(str(tmp_path / "x.tar"))


def test_a_member_may_not_end_behind_its_file(tmp_path):
    (tmp_path / "x.tar").write_bytes(PAIRS + header("y.jpg", 5000))
    with pytest.raises(DataError, match="truncated or damaged; the last complete member is x.txt"):
        WebDataset(str(tmp_path / "x.tar"))


def test_names_and_links_longer_than_paths_are_left_out(tmp_path):
    """A link of half a million folders would take hours to follow."""
    link = pax(linkpath="a/" * 50_000 + "x.jpg") + header("l.jpg", 0, tarfile.SYMTYPE)
    name = pax(path="a/" * 50_000 + "x.jpg") + header("n.jpg")
    (tmp_path / "x.tar").write_bytes(PAIR + link + name + END)
    source = WebDataset(str(tmp_path / "x.tar"))
    (skipped,) = source.account().skipped
    assert skipped[:2] == ("a name or a link of more than 4,096 characters", 2) and len(source) == 1


def test_links_in_circles_end(tmp_path):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for a, b in (("a.jpg", "b.jpg"), ("b.jpg", "a.jpg"), ("d", "d/d"), ("c.jpg", "d/c.jpg")):
            info = tarfile.TarInfo(a)
            info.type, info.linkname = tarfile.SYMTYPE, b
            tar.addfile(info)
    (tmp_path / "x.tar").write_bytes(PAIR + out.getvalue())
    source = WebDataset(str(tmp_path / "x.tar"))
    assert len(source) == 1
    assert source.account().skipped[0][:2] == ("a link that leads to no file of the archive", 4)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it counts the files of /proc")
def test_a_whole_run_over_postscript_starts_no_program(tmp_path):
    """Ghostscript on the path would leave a mark."""
    for i in range(4):
        (tmp_path / f"{i}.jpg").write_bytes(POSTSCRIPT)
        (tmp_path / f"{i}.txt").write_text("words")
    for name in ("gs", "gswin64c"):
        (tmp_path / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-m", "clipx.dataset", "verify", "--config=clip:small",
         "--config.data.source=files", f"--config.data.path={tmp_path}"],
        cwd=ROOT, env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2 and not (tmp_path / "ran").exists()
    assert "which is PostScript" in done.stdout
