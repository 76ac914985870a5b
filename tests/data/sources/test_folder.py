"""The class of a picture is its folder, on disk and in a tar; other layouts are refused."""

from __future__ import annotations

import concurrent.futures
import io
import json
import os
import pathlib
import pickle
import tarfile

import pytest

from clipx.data.base import fingerprint
from clipx.data.sources.folder import Folder
from clipx.errors import BadSample, DataError, StorageError

FILES = ("dog/2.jpg", "dog/10.JPEG", "wild_cat/1.png", "wild_cat/0.webp", "ant/x.gif")


def write(root, files=FILES, top="") -> str:
    """Creates a folder with these files; a name that ends with a slash is an empty folder."""
    for name in files:
        path = root / top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir(exist_ok=True)
        else:
            path.write_bytes(f"picture {name}".encode())
    return str(root)


def pack(path, folder) -> str:
    with tarfile.open(path, "w") as tar:
        tar.add(folder, arcname=".")
    return str(path)


def message(call, error=DataError) -> str:
    with pytest.raises(error) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


def kinds(tmp_path, files, top=""):
    """The same files as a folder and as a tar."""
    folder = write(tmp_path / "set", files, top)
    return folder, pack(tmp_path / "set.tar", folder)


@pytest.mark.parametrize("top", ["", "val", "a/val"])
def test_classes_and_rows_are_sorted_and_the_same_on_disk_and_in_a_tar(tmp_path, top):
    more = ("dog/notes.txt", ".DS_Store", "dog/._2.jpg", ".cache/x.jpg")
    for path in kinds(tmp_path, FILES + more, top):
        data = Folder(path)
        assert data.classes == ("ant", "dog", "wild cat") and len(data) == 5
        rows = [data[i] for i in range(5)]
        keys = ["ant/x.gif", "dog/10.JPEG", "dog/2.jpg", "wild_cat/0.webp", "wild_cat/1.png"]
        assert [row.key for row in rows] == list(data.keys()) == keys
        assert [row.image for row in rows] == [f"picture {key}".encode() for key in keys]
        assert [row.label for row in rows] == [0, 1, 1, 2, 2]
        assert [(row.row, row.texts) for row in rows] == [(i, ()) for i in range(5)]
        for row in (-1, 5):
            with pytest.raises(IndexError):
                data[row]
    assert fingerprint(Folder(str(tmp_path / "set"))) == fingerprint(data)


def test_a_folder_inside_every_class_folder_does_not_count(tmp_path):
    for path in kinds(tmp_path, ("dog/images/1.jpg", "cat/images/1.jpg")):
        assert (Folder(path).classes, Folder(path)[1].key) == (("cat", "dog"), "dog/images/1.jpg")


def test_class_folders_may_be_at_different_depths(tmp_path):
    for path in kinds(tmp_path, ("animal/dog/1.jpg", "animal/cat/1.jpg", "car/1.jpg")):
        assert Folder(path).classes == ("car", "cat", "dog")
        assert [row.key for row in map(Folder(path).__getitem__, range(3))][0] == "car/1.jpg"


def test_folders_of_initials_hold_classes_by_their_path(tmp_path):
    places = ("a/abbey", "a/apartment_building/outdoor", "b/bar", "c/church/indoor")
    places += ("c/church/outdoor",)
    for path in kinds(tmp_path, [f"{place}/x.jpg" for place in places], "sun/images"):
        data = Folder(path)
        assert data.classes == (
            *("abbey", "apartment building outdoor", "bar", "church indoor", "church outdoor"),
        )
        assert [data[i].label for i in range(5)] == list(range(5))
        assert [guess[:2] for guess in data.guesses()] == [("classes_from", "path")]
        saved = Folder(path, classes_from="path")
        assert (saved.classes, list(saved.keys())) == (data.classes, list(data.keys()))
        assert saved.guesses() == ()


def test_folders_of_initials_without_deeper_ones_are_as_before(tmp_path):
    for path in kinds(tmp_path, ("b/bar/1.jpg", "a/x_ray/1.jpg", "a/abbey/1.jpg")):
        assert Folder(path).classes == Folder(path, classes_from="folder").classes
        assert Folder(path).classes == ("abbey", "bar", "x ray")


def test_what_a_class_is_can_be_said(tmp_path):
    files = ("art/dog/1.jpg", "art/cat/1.jpg", "real/dog/2.jpg")
    for path in kinds(tmp_path, files):
        said = message(lambda path=path: Folder(path))
        assert "set classes_from=path if art/dog is a class of its own" in said
        assert said.endswith("or classes_from=folder if both show dog")
        assert (f"such as {path}/art" in said) == os.path.isdir(path)
        pooled, apart = (Folder(path, classes_from=kind) for kind in ("folder", "path"))
        assert (pooled.classes, pooled[2].label) == (("cat", "dog"), 1)
        assert apart.classes == ("art cat", "art dog", "real dog")


def test_names_come_from_a_file(tmp_path, monkeypatch):
    path = write(tmp_path / "set")
    names = tmp_path / "names.json"
    classes = {"dog": "a dog", "ant": "an ant", "wild_cat": "lynx", "more": "not there"}
    names.write_text(json.dumps(classes))
    monkeypatch.setenv("HERE", str(tmp_path))
    assert Folder("$HERE/set", "$HERE/names.json").classes == ("an ant", "a dog", "lynx")

    def said() -> str:
        return message(lambda: Folder(path, str(names))).removeprefix(f"names={names}: ")

    del classes["dog"]
    names.write_text(json.dumps(classes))
    assert said() == "no name for 1 of 3 class folders: dog"
    names.write_text('["dog"]')
    assert said().startswith("expected a JSON object {folder: class name} (")
    names.write_text("{")
    assert said().startswith("expected a JSON object {folder: class name} (Expecting")
    os.remove(names)
    assert said() == "cannot be read (No such file or directory)"


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (("1.jpg", "2.jpg"), "all 2 pictures are in one folder, expected one folder per class"),
        (("all/1.jpg",), "all 1 pictures are in one folder, all, expected one folder per class"),
        (("dog/1.txt", "dog/a/"), "no pictures; found .txt, expected .jpg, .jpeg, .png"),
        (("dog/1.jpg", "x.jpg"), "1 pictures, such as x.jpg, are beside the class folders"),
        (("dog/1.jpg", "cat/"), "all 1 pictures are in one folder"),
        (("dog/1.jpg", "ant/1.jpg", "cat/", "cow/"), "2 class folders have no pictures: cat, cow"),
        (
            ("train/dog/1.jpg", "val/dog/1.jpg", "val/cat/1.jpg"),
            "1 classes have several folders, such as train/dog and val/dog",
        ),
    ],
)
def test_other_layouts_are_refused(tmp_path, files, reason):
    for path in kinds(tmp_path, files):
        said = message(lambda path=path: Folder(path))
        assert said.startswith(f"{path}: {reason}")


def test_empty_and_absent_folders(tmp_path):
    (tmp_path / "none").mkdir()
    path = str(tmp_path / "none")
    assert message(lambda: Folder(path)).startswith(f"{path}: no pictures; found nothing, expected")
    assert message(lambda: Folder(str(tmp_path / "nine"))) == (
        f"{tmp_path}/nine: cannot be read (No such file or directory); nearest in {tmp_path}: none"
    )


@pytest.mark.parametrize("size", [2100, 2560, 3000, 4608])
def test_a_truncated_tar_is_refused_wherever_it_is_cut(tmp_path, size):
    _, path = kinds(tmp_path, FILES)
    os.truncate(path, size)
    said = message(lambda: Folder(path))
    assert said.startswith(f"{path}: truncated or damaged; the last complete member is ")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "an empty file, expected a folder or an uncompressed tar"),
        (b"x" * 4096, "not an uncompressed tar, expected a folder or an uncompressed tar"),
        (b"\x1f\x8b" + bytes(4096), "not an uncompressed tar, expected a folder or an uncompresse"),
        (bytes(10240), "no pictures; found nothing"),
    ],
)
def test_a_file_that_is_not_a_tar(tmp_path, data, reason):
    (tmp_path / "x.tar").write_bytes(data)
    path = str(tmp_path / "x.tar")
    assert message(lambda: Folder(path)).startswith(f"{path}: {reason}")


def test_a_link_in_a_tar_leads_to_its_picture_or_is_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("dog/1.jpg", "cat/1.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
        link = tarfile.TarInfo("cat/2.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "cat/1.jpg"
        tar.addfile(link)
    assert [row.image for row in Folder(str(tmp_path / "x.tar"))] == [b"x"] * 3
    with tarfile.open(tmp_path / "x.tar", "a") as tar:
        link = tarfile.TarInfo("cat/3.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/data/3.jpg"
        tar.addfile(link)
    said = message(lambda: Folder(str(tmp_path / "x.tar")))
    assert said.startswith(f"{tmp_path}/x.tar: cat/3.jpg is a link to no file of the archive")


def test_tars_one_behind_the_other_are_read_whole_and_their_members_counted(tmp_path):
    packed = [
        pathlib.Path(pack(tmp_path / f"{i}.tar", write(tmp_path / str(i), files))).read_bytes()
        for i, files in enumerate(
            [FILES, ("cow/1.jpg", "dog/3.jpg", "dog/2.jpg", "cow/notes.txt", "cow/.DS_Store")]
        )
    ]
    both = tmp_path / "both.tar"
    both.write_bytes(b"".join(packed))
    data = Folder(str(both))
    assert data.classes == ("ant", "cow", "dog", "wild cat") and len(data) == 7
    assert data.account().lines() == [
        "3 of 10 members left out:",
        "  1: a later member has the same name, and counts in its place (./dog/2.jpg)",
        "  1: a name that starts with a dot (./cow/.DS_Store)",
        "  1: an ending that is not read: .txt (./cow/notes.txt)",
    ]
    both.write_bytes(both.read_bytes() + b"and more")
    said = message(lambda: Folder(str(both)))
    assert "8 bytes after the end of the archive, from byte" in said


def test_a_bad_picture_is_named_and_its_neighbours_are_fine(tmp_path):
    folder = write(tmp_path / "set")
    open(tmp_path / "set" / "dog" / "2.jpg", "wb").close()
    path = pack(tmp_path / "set.tar", folder)
    for data in (Folder(folder), Folder(path)):
        bad = message(lambda data=data: data[2], BadSample)
        assert bad == "dog/2.jpg: the picture has no bytes"
        assert data[1].key == "dog/10.JPEG"
    data = Folder(folder)
    os.remove(tmp_path / "set" / "dog" / "2.jpg")
    said = message(lambda: data[2], StorageError)
    assert said.startswith(f"{folder}/dog/2.jpg: gone since the data was opened")
    data = Folder(path)
    os.remove(path)
    assert message(lambda: data[0], StorageError).startswith(f"{path}: gone since the data was")


def test_it_pickles_and_reads_from_many_threads(tmp_path):
    for path in kinds(tmp_path, FILES):
        data = Folder(path)
        copy = pickle.loads(pickle.dumps(data))
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            read = list(pool.map(copy.__getitem__, list(range(5)) * 50))
        assert read == [data[i] for i in range(5)] * 50


@pytest.mark.skipif("TINY_IMAGENET" not in os.environ, reason="TINY_IMAGENET names no folder")
def test_tiny_imagenet():
    data = Folder("$TINY_IMAGENET/val.tar", "$TINY_IMAGENET/classnames.json")
    assert len(data) == 1000 and len(data.classes) == 20
    assert data.classes[0] == "goldfish, Carassius auratus"
    assert (data[0].key, data[0].label) == ("n01443537/val_1230.JPEG", 0)
    assert all(data[i].image[:2] == b"\xff\xd8" for i in range(0, 1000, 7))


@pytest.mark.skipif("CIFAR10" not in os.environ, reason="CIFAR10 names no folder")
def test_cifar10():
    data = Folder("$CIFAR10/test.tar")
    assert (data.classes[0], data.classes[9], len(data.classes)) == ("airplane", "truck", 10)
    assert [data[i].label for i in range(2000)] == [i // 200 for i in range(2000)]
    assert all(data[i].image[1:4] == b"PNG" for i in range(0, len(data), 7))
