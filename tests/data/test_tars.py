"""Every member of a tar, and every byte after it, is accounted for."""

import io
import json
import subprocess
import tarfile

import numpy as np
import pytest

from clipx.data import tars
from clipx.data.base import fingerprint
from clipx.data.sources.webdataset import WebDataset
from clipx.errors import BadSample, DataError


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CLIPX_CACHE", str(tmp_path_factory.mktemp("cache")))


def archive(*members, form=tarfile.GNU_FORMAT) -> bytes:
    """A tar of (name, bytes), or of `TarInfo`s without data."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
    return out.getvalue()


def other(name, kind, target="") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def pairs(names, word="a"):
    for name in names:
        yield f"{name}.jpg", f"{word} picture {name}".encode()
        yield f"{name}.txt", f"{word} {name}".encode()


def opened(tmp_path, data: bytes, **settings) -> WebDataset:
    path = tmp_path / "x.tar"
    path.write_bytes(data)
    return WebDataset(str(path), **settings)


def rows(data) -> dict[str, tuple[bytes, tuple[str, ...]]]:
    return {row.key.partition("/")[2]: (row.image, row.texts) for row in data}


EMPTY = archive()
AB, CD = archive(*pairs("ab")), archive(*pairs("cd"))


@pytest.mark.parametrize(
    "data",
    [
        AB + CD,
        AB + bytes(512) * 7 + CD + bytes(5120),
        AB + EMPTY + EMPTY + CD,
        EMPTY + AB + archive(*pairs("c")) + archive(*pairs("d")),
        archive(*pairs("ab"), form=tarfile.PAX_FORMAT) + CD + bytes(100),
        AB[: 4096 + 1024] + CD,
    ],
)
def test_archives_one_behind_the_other_are_read_whole(tmp_path, data):
    source = opened(tmp_path, data)
    read, keys = list(source), fingerprint(source)
    assert source.account().lines() == []
    whole = opened(tmp_path, archive(*pairs("abcd")))
    assert read == list(whole) and keys == fingerprint(whole)


@pytest.mark.parametrize("tail", [b"text\n", b"\x1f\x8b" + bytes(600), bytes(512) + b"x" * 2048])
def test_bytes_after_the_end_are_refused_or_named(tmp_path, tail):
    with pytest.raises(DataError) as error:
        opened(tmp_path, AB + tail)
    said = str(error.value)
    size = len(tail.lstrip(b"\0"))
    assert f"{size:,} bytes after the end of the archive, from byte" in said and "\n" not in said
    kept = opened(tmp_path, AB + tail, truncated="keep")
    assert set(rows(kept)) == {"a", "b"}
    assert "bytes after the end" in "".join(kept.account().lines())
    end = int(said.partition("truncate -s ")[2].split()[0])
    assert set(rows(opened(tmp_path, (AB + tail)[:end]))) == {"a", "b"}  # the fix works


def test_a_cut_further_archive_is_refused_or_named(tmp_path):
    data = AB + CD[:2000]
    with pytest.raises(DataError, match="truncated or damaged; the last complete member is c.txt"):
        opened(tmp_path, data)
    kept = opened(tmp_path, data, truncated="keep")
    assert set(rows(kept)) == {"a", "b"}
    assert kept.account().lines()[0] == "2 of 6 members left out:"
    assert "the shard is cut off or damaged" in kept.account().lines()[1]


def unpacked(tmp_path, data: bytes) -> dict[str, bytes]:
    """The files that `tar x` writes."""
    (tmp_path / "y.tar").write_bytes(data)
    (tmp_path / "out").mkdir()
    command = ["tar", "xf", str(tmp_path / "y.tar"), "--ignore-zeros", "-C", str(tmp_path / "out")]
    subprocess.run(command, check=True)
    return {
        path.relative_to(tmp_path / "out").as_posix(): path.read_bytes()
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("data", "replaced"),
    [
        (archive(*pairs("ab"), ("a.txt", b"new a"), ("a.txt", b"newer a")), 2),  # tar -r
        (archive(*pairs("aab"), *pairs("b", "new")), 4),
        (AB + archive(*pairs("b", "new")) + archive(*pairs("c")), 2),
        (archive(("./a.jpg", b"1"), ("./a.txt", b"old"), ("a.txt", b"new"), *pairs("b")), 1),
        (archive(*pairs("ab"), other("a.jpg", tarfile.SYMTYPE, "b.jpg")), 1),
        (archive(*pairs("ab"), other("b.jpg", tarfile.LNKTYPE, "a.jpg"), ("a.jpg", b"new")), 2),
    ],
)
def test_of_equal_names_the_last_counts_as_in_tar(tmp_path, data, replaced):
    source = opened(tmp_path, data)
    files = unpacked(tmp_path, data)
    read = {k.removeprefix("./"): v for k, v in rows(source).items()}
    expected = {
        name[:-4]: (files[name], (files[f"{name[:-4]}.txt"].decode(),))
        for name in files
        if name.endswith(".jpg")
    }
    assert read == expected
    (said,) = source.account().lines()[1:]
    assert said.startswith(f"  {replaced}: a later member has the same name")


@pytest.mark.parametrize("order", ["apart", "some", "shuffled"])
def test_members_of_one_sample_may_lie_apart(tmp_path, order):
    members = list(pairs(map(str, range(10, 30))))
    if order == "apart":
        moved = members[::2] + members[1::2]
    elif order == "some":
        moved = members[:7] + members[8:] + [members[7]]
    else:
        moved = [members[i] for i in np.random.default_rng(0).permutation(len(members))]
    assert rows(opened(tmp_path, archive(*moved))) == rows(opened(tmp_path, archive(*members)))


def test_pairs_whose_folders_differ_are_refused_about_the_whole_shard(tmp_path):
    members = [(f"{'images' if name.endswith('jpg') else 'captions'}/{name}", data)
               for name, data in pairs("abc")]  # fmt: skip
    with pytest.raises(DataError) as error:
        opened(tmp_path, archive(*members))
    said = str(error.value)
    assert "3 have pictures alone, such as images/a, and 3 captions or labels alone, such" in said
    unpacked(tmp_path, archive(*members))
    flags = ["--transform=s,.*/,,", "--sort=name"]  # as the message says
    command = ["tar", "cf", str(tmp_path / "z.tar"), *flags, "images", "captions"]
    subprocess.run(command, check=True, cwd=tmp_path / "out")
    assert len(WebDataset(str(tmp_path / "z.tar"))) == 3


def test_links_lead_to_members_or_are_named(tmp_path):
    data = archive(
        ("store/one", b"1"),
        other("pictures", tarfile.SYMTYPE, "store"),
        other("a.jpg", tarfile.SYMTYPE, "./pictures/one"),
        other("b.jpg", tarfile.LNKTYPE, "store/one"),
        other("sub/c.jpg", tarfile.SYMTYPE, "../a.jpg"),
        other("d.jpg", tarfile.SYMTYPE, "/etc/d.jpg"),
        other("e.jpg", tarfile.SYMTYPE, "e.jpg"),
        other("f.jpg", tarfile.LNKTYPE, "nothing"),
        *((f"{name}.txt", name.encode()) for name in ("a", "b", "sub/c", "d", "e", "f")),
    )
    source = opened(tmp_path, data)
    assert [source[i].image for i in range(3)] == [b"1"] * 3
    for row in (3, 4, 5):
        with pytest.raises(BadSample, match="no picture"):
            source[row]
    said = source.account().lines()
    assert said[0] == "5 of 14 members left out:"
    assert "  4: a link that leads to no file of the archive (x.tar/f.jpg" in "\n".join(said)
    assert "  1: a name without an ending (x.tar/store/one)" in said


def test_what_is_no_file_or_has_an_odd_name_is_named(tmp_path):
    long = "x" * 150
    data = archive(
        *pairs(["a", f"{long}/b"]),
        other("folder", tarfile.DIRTYPE),
        other("pipe.jpg", tarfile.FIFOTYPE),
        ("._a.jpg", b"mac"),
        (".DS_Store", b"mac"),
        ("README", b"words"),
        ("a.JPG", b"another"),
        ("a.5mm.jpg", b"dots"),
        *((f"a.{i}x", b"") for i in range(10)),
        ("a.\udcff\n", b"no text"),
    )
    source = opened(tmp_path, data)
    assert set(rows(source)) == {"a", f"{long}/b"}
    account = source.account()
    reasons = {s.reason: s for s in account.skipped}
    assert account.used == 4 and account.found == 4 + sum(s.count for s in account.skipped)
    assert reasons["macOS's own data, in names that start with ._"].examples == ("x.tar/._a.jpg",)
    assert reasons["a second file of the same kind in one sample"].examples == ("x.tar/a.JPG",)
    assert any(reason.startswith("dots in the name: the key ends at") for reason in reasons)
    assert reasons["an ending that is not read, one of many"].count == 3
    for reason in ("a name without an ending", "a name that starts with a dot"):
        assert reasons[reason].count == 1
    "\n".join(account.lines()).encode()  # can be printed
    assert all("\n" not in line for line in account.lines())


def test_dots_that_take_all_pictures_are_said_and_lists_are_short(tmp_path):
    members = [(f"2023.05.{i:02}{end}", b"x") for i in range(31) for end in (".jpg", ".txt")]
    with pytest.raises(DataError) as error:
        opened(tmp_path, archive(*members))
    said = str(error.value)
    assert "62 of 62 members are left out: dots in the name: the key ends at the first" in said
    assert "and 54 more endings" in said and len(said) < 600


def test_sparse_files_are_named(tmp_path):
    (tmp_path / "holes.jpg").touch()
    with open(tmp_path / "holes.jpg", "r+b") as file:
        file.truncate(1 << 20)
        file.seek(1 << 19)
        file.write(b"data")
    (tmp_path / "holes.txt").write_text("a hole")
    for form in ("gnu", "pax"):
        command = ["tar", "cSf", "h.tar", f"--format={form}", "holes.jpg", "holes.txt"]
        subprocess.run(command, check=True, cwd=tmp_path)
        with pytest.raises(DataError, match="no pictures.*: a sparse file, stored in pieces"):
            WebDataset(str(tmp_path / "h.tar"))


def test_accounts_of_several_shards_add_up_and_are_cached(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.tar").write_bytes(archive(*pairs("a"), ("a.cap", b""), ("b.npy", b"")))
    for _ in range(2):
        lines = WebDataset(str(tmp_path / "*.tar")).account().lines()
        assert lines == [
            "6 of 12 members left out:",
            "  3: an ending that is not read: .cap (0.tar/a.cap, 1.tar/a.cap, 2.tar/a.cap)",
            "  3: an ending that is not read: .npy (0.tar/b.npy, 1.tar/b.npy, 2.tar/b.npy)",
        ]


def test_an_ordinary_tar_is_read_as_it_always_was(tmp_path):
    members = [
        *pairs("ab"),
        ("a/b.json", json.dumps({"captions": ["x"]}).encode()),
        ("a/b.png", b"p"),
    ]
    source = opened(tmp_path, archive(other("a", tarfile.DIRTYPE), *members))
    assert list(source.keys()) == ["x.tar/a", "x.tar/b", "x.tar/a/b"]
    assert source.account().lines() == [] and source.guesses() == ()
    assert fingerprint(source) == "ee73db656bb0"


def test_names_as_tar_writes_them():
    assert [tars.normal(name) for name in ("a", "./a", "a//b/./c", "/a", "a/.", "a.b/c")] == [
        "a", "a", "a/b/c", "a", "a", "a.b/c"
    ]  # fmt: skip
