"""The data stays as it was opened, within its limits, and what cannot go on says so."""

from __future__ import annotations

import dataclasses
import io
import multiprocessing
import os
import pickle
import signal
import sys
import tarfile
import threading
import time

import numpy as np
import pytest
from support.loaders import build_loader
from support.pictures import TOKENIZER, Pictures, encode, photo

from clipx.data import activity, reading, storage, supply, worker
from clipx.data.evaluation import EvaluationSet
from clipx.data.limits import Limits
from clipx.data.sources.files import Files
from clipx.data.sources.folder import Folder
from clipx.data.sources.mixture import Mixture
from clipx.data.sources.table import Table
from clipx.data.sources.webdataset import WebDataset
from clipx.data.supply import Supply
from clipx.data.verify import verify
from clipx.errors import BadSample, DataError, RunError, StorageError, StuckError


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CLIPX_CACHE", str(tmp_path_factory.mktemp("cache")))


JPEG = encode(photo(20, 24))


def write_all(root) -> dict[str, tuple]:
    """Rows of every source of files: {name: (open, the file that has row 1)}."""
    for name in ("a", "b"):
        (root / f"set/{name}").mkdir(parents=True)
        (root / f"set/{name}/1.jpg").write_bytes(JPEG)
    (root / "pairs").mkdir()
    with tarfile.open(root / "x.tar", "w") as tar, tarfile.open(root / "c.tar", "w") as classes:
        for name in ("0", "1"):
            (root / f"pairs/{name}.jpg").write_bytes(JPEG)
            (root / f"pairs/{name}.txt").write_text(f"words of {name}")
            for out, members in (
                (tar, {f"{name}.jpg": JPEG, f"{name}.txt": f"words of {name}".encode()}),
                (classes, {f"{'ab'[int(name)]}/{name}.jpg": JPEG}),
            ):
                for member, data in members.items():
                    info = tarfile.TarInfo(member)
                    info.size = len(data)
                    out.addfile(info, io.BytesIO(data))
    (root / "t.csv").write_text("image,caption\npairs/0.jpg,words of 0\npairs/1.jpg,words of 1\n")
    return {
        "webdataset": (lambda: WebDataset(str(root / "x.tar")), root / "x.tar"),
        "table": (lambda: Table(str(root / "t.csv")), root / "pairs/1.jpg"),
        "files": (lambda: Files(str(root / "pairs")), root / "pairs/1.jpg"),
        "texts": (lambda: Files(str(root / "pairs")), root / "pairs/1.txt"),
        "folder": (lambda: Folder(str(root / "set")), root / "set/b/1.jpg"),
        "classes": (lambda: Folder(str(root / "c.tar")), root / "c.tar"),
    }


KINDS = ("webdataset", "table", "files", "texts", "folder", "classes")


def gone(file):
    file.unlink()
    return "gone since the data was opened (No such file or directory)"


def other_size(file):
    file.write_bytes(file.read_bytes() + b"more")
    return "has changed since the data was opened ("


def other_time(file):
    """The same bytes, written again."""
    status = os.stat(file)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    return "has changed since the data was opened (a new time): its rows may be others"


def a_pipe(file):
    file.unlink()
    os.mkfifo(file)
    return "has changed since the data was opened (0 bytes"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [gone, other_size, other_time, a_pipe])
def test_a_file_that_changes_is_no_bad_row(tmp_path, kind, change):
    opens, file = write_all(tmp_path)[kind]
    source = opens()
    row = source[1]
    expected = change(file)
    for again in (source, pickle.loads(pickle.dumps(source))):  # as a worker has it
        with pytest.raises(StorageError) as error:
            again[1]
        said = str(error.value)
        assert said.startswith(f"{file}: {expected}") and "\n" not in said
        assert "run the same command to continue" in said and not error.value.passing
    assert row.image == JPEG


@pytest.mark.parametrize("kind", ["table", "files"])
def test_a_file_that_is_missing_from_the_start_is_a_bad_row(tmp_path, kind):
    opens, file = write_all(tmp_path)[kind]
    (tmp_path / "t.csv").write_text("image,caption\npairs/0.jpg,a\nno/such.jpg,b\npairs,c\n")
    if kind == "files":
        file.unlink()
        (tmp_path / "pairs/1.jpg").symlink_to("nowhere.jpg")
    source = opens()
    with pytest.raises(BadSample, match=r"cannot be read \(No such file or directory\)"):
        source[1]
    if kind == "table":
        with pytest.raises(BadSample, match="Is a directory"):
            source[2]


def test_short_reads_and_errors_of_the_disk_are_no_bad_rows(tmp_path, monkeypatch):
    opens, file = write_all(tmp_path)["webdataset"]
    source = opens()
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda handle, size, offset: pread(handle, size - 9, offset))
    with pytest.raises(
        StorageError, match=rf"{file}: ended after [\d,]+ of [\d,]+ bytes of a read"
    ):
        source[0]

    def fails(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fails)
    with pytest.raises(StorageError, match=rf"{file}: cannot be read \(Input/output error\); put"):
        source[0]
    real = os.open

    def forbidden(path, *_):
        if str(path).endswith("x.tar"):
            raise PermissionError(13, "Permission denied", path)
        return real(path, *_)

    monkeypatch.setattr(os, "open", forbidden)
    with pytest.raises(StorageError, match=rf"{file}: cannot be read \(Permission denied\)"):
        source[0]
    with pytest.raises(StorageError):  # nor errors of an evaluation's data
        EvaluationSet(source, 8).texts(0)
    assert pickle.loads(pickle.dumps(StorageError("a", "b", True))).passing


def test_errors_of_a_network_are_tried_again_for_a_time(tmp_path, monkeypatch, capfd):
    opens, file = write_all(tmp_path)["table"]
    monkeypatch.setattr(reading, "_mounts", lambda: (("/", "ext4"), (f"{tmp_path}/", "nfs4")))
    assert reading.passing(str(file)) and not reading.passing("/elsewhere")
    source, away = opens(), tmp_path / "away.jpg"
    file.rename(away)
    pauses: list[float] = []

    def sleep(seconds):
        pauses.append(seconds)
        if len(pauses) == 3:
            away.rename(file)

    monkeypatch.setattr(reading.time, "sleep", sleep)
    loader = build_loader(source, TOKENIZER, batch_size=2, timeout=20.0)
    batch = loader.load(0, np.arange(2))
    assert sorted(batch["row"]) == [0, 1] and not batch["bad"].any()
    said = capfd.readouterr().err
    assert f"{file}: gone since the data was opened" in said and "again for 20 s" in said
    assert pauses == [0.5, 1.0, 2.0]
    file.unlink()
    with pytest.raises(StorageError, match=r"tried \d+ times in 0.1 s \(config.data.timeout\)"):
        build_loader(source, TOKENIZER, batch_size=2, timeout=0.1).load(0, np.arange(2))


def test_a_remote_file_is_looked_at_again(monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    fs = fsspec.filesystem("memory")
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in (("0.jpg", JPEG), ("0.txt", b"words")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    fs.pipe("/plane/x.tar", out.getvalue())
    source = WebDataset("memory://plane/x.tar")
    assert source[0].texts == ("words",)
    fs.pipe("/plane/x.tar", out.getvalue() + bytes(512))
    assert source[0].texts == ("words",)  # not for every row
    monkeypatch.setattr(reading, "_AGAIN", -1.0)
    with pytest.raises(StorageError, match="memory://plane/x.tar: has changed since"):
        source[0]
    fs.store.clear()


def test_stamps_of_many_files_on_a_slow_disk(tmp_path, monkeypatch):
    for i in range(9):
        (tmp_path / str(i)).write_text("x" * i)
    paths = [str(tmp_path / str(i)) for i in range(9)] + ["/no/file", str(tmp_path), "a\0b"]
    before = reading.stamps(paths)
    monkeypatch.setattr(reading, "_FIRST", 2)
    monkeypatch.setattr(reading, "_SLOW", 0.0)
    assert np.array_equal(reading.stamps(paths), before)
    assert before[:, 0].tolist() == [*range(9), -2, -21, -22]


# limits


def test_each_limit_makes_a_row_bad_by_its_name_before_it_is_read(tmp_path, monkeypatch):
    kinds = write_all(tmp_path)
    small = Limits(file_bytes=len(JPEG) - 1)
    pread = os.pread

    def only_texts(handle, size, offset):
        assert size < len(JPEG)
        return pread(handle, size, offset)

    for kind in ("webdataset", "table", "files", "folder", "classes"):
        source = kinds[kind][0]()
        source.limit(small)
        with monkeypatch.context() as patch:
            patch.setattr(os, "pread", only_texts)
            with pytest.raises(BadSample) as error:
                source[0]
        assert error.value.reason == (
            f"a file of {len(JPEG):,} bytes, expected at most {len(JPEG) - 1:,} "
            "(config.data.limits.file_bytes)"
        )
    for kind in ("webdataset", "table", "files"):
        source = kinds[kind][0]()
        source.limit(Limits(caption_characters=9))
        for read in (source.__getitem__, source.glance):
            with pytest.raises(
                BadSample, match="10 characters, .* 9 .config.data.limits.caption_ch"
            ):
                read(0)
    source = kinds["files"][0]()
    source.limit(Limits(pixels=20 * 24 - 1))
    parts = {"x": {"source": "files", "path": str(tmp_path / "pairs")}}
    mixed = Mixture(parts)
    mixed.limit(source.limits)
    for one in (source, mixed):
        report = verify(one)
        said = "24 x 20 pixels, expected at most 479 in total (config.data.limits.pixels); downs"
        assert len(report["bad"]) == 2 and all(said in bad["reason"] for bad in report["bad"])
        with pytest.raises(
            DataError, match="consecutive rows cannot be used; .* pixels, expected at m"
        ):
            build_loader(one, TOKENIZER, batch_size=2, limits=source.limits).load(0, np.arange(2))
        with pytest.raises(DataError, match="row 0 of the evaluation set: .*data.limits.pixels"):
            EvaluationSet(one, 8).picture(0)


def test_a_word_of_20_mb_is_not_tokenised(tmp_path):
    write_all(tmp_path)
    (tmp_path / "pairs/1.txt").write_text("a" * 20_000_000)
    source = Files(str(tmp_path / "pairs"))
    started = time.monotonic()
    batch = build_loader(source, TOKENIZER, batch_size=2).load(0, np.arange(2))
    assert "a caption of 20,000,000 characters" in "".join(batch["bad"])
    assert time.monotonic() - started < 5


# workers and waits


@dataclasses.dataclass(frozen=True)
class Ends(Pictures):
    """Its row 7 ends the process that reads it, if that is a worker."""

    how: int = signal.SIGKILL  # a signal, or minus an exit code
    main: int = dataclasses.field(default_factory=os.getpid)

    def __getitem__(self, row):
        if row == 7 and os.getpid() != self.main:
            if self.how <= 0:
                os._exit(-self.how)
            os.kill(os.getpid(), self.how)
        return super().__getitem__(row)


class EndsAtTheStart(Pictures):
    """A worker that unpickles it ends; it is larger than a pipe."""

    def __reduce__(self):
        return os._exit, (0,), {"ballast": bytes(1 << 17)}


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (Ends(how=signal.SIGKILL), "was ended by SIGKILL: most likely the kernel, for lack of mem"),
        pytest.param(Ends(how=0), "ended by itself with exit code 0", marks=pytest.mark.slow),
        pytest.param(Ends(how=-3), "ended by itself with exit code 3", marks=pytest.mark.slow),
        pytest.param(Ends(how=signal.SIGSEGV), "SIGSEGV: a library", marks=pytest.mark.slow),
        pytest.param(EndsAtTheStart(), "exit code 0", marks=pytest.mark.slow),
    ],
)
def test_a_worker_that_ends_is_one_line(source, said):
    started = time.monotonic()
    with pytest.raises(RunError, match=rf"^a data worker \(process \d+\) .*{said}") as error:
        for _ in build_loader(source, TOKENIZER, batch_size=25, workers=1).batches(0, 9):
            pass
    assert "\n" not in str(error.value) and time.monotonic() - started < 60


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.05, 0.5])
def test_a_worker_that_is_killed_while_it_starts_does_not_hang(delay, monkeypatch):
    """Its data is larger than a pipe: who writes to a dead process would wait for ever."""
    seen, died = [], worker.Workers.died

    def recording(self, **options):
        seen.extend(self._processes)
        return died(self, **options)

    def kill():
        end = time.monotonic() + 30
        while not (seen and seen[0].pid) and time.monotonic() < end:
            time.sleep(0.005)
        time.sleep(delay)
        seen[0].kill()

    monkeypatch.setattr(supply, "_LOOK", 0.02)
    monkeypatch.setattr(supply, "_SILENCE", 0.0)
    monkeypatch.setattr(worker.Workers, "died", recording)
    killer = threading.Thread(target=kill)
    killer.start()
    source = Pictures(words="w" * (1 << 18))
    with pytest.raises(RunError, match="SIGKILL.*no rows had arrived yet"):
        next(build_loader(source, TOKENIZER, batch_size=25, workers=2).batches(0, 9))
    killer.join()


def test_loaders_that_start_together_start_one_after_the_other():
    """Both put something of their own in place of the main module, which must come back."""
    with worker._ONE_AT_A_TIME:  # loaders of other tests may still start
        main, entered = sys.modules["__main__"], []

    one, other = worker.Workers(0, 1.0), worker.Workers(0, 1.0)

    def second():
        with other.starting():
            entered.append("second")

    thread = threading.Thread(target=second)
    with one.starting():
        thread.start()
        time.sleep(0.05)
        entered.append("first")
    thread.join()
    one.close(), other.close()
    assert entered == ["first", "second"] and sys.modules["__main__"] is main
    assert "Process" not in vars(multiprocessing.get_context("spawn"))


def test_a_read_that_never_ends_has_a_name(monkeypatch):
    monkeypatch.setattr(supply, "_LOOK", 0.02)
    release = threading.Event()

    def load():
        yield 1
        with activity.doing("reading /mnt/a.tar"):
            release.wait(30)

    chunks = Supply(load, 2, None, 0.3)
    assert next(chunks) == 1
    with pytest.raises(StuckError, match="reading /mnt/a.tar has not ended for .*timeout=0.3"):
        next(chunks)
    chunks.close()  # does not wait for the thread
    release.set()


@dataclasses.dataclass(frozen=True)
class Waits(Pictures):
    """Its row 7 is never read to its end."""

    seconds: float = 60

    def __getitem__(self, row):
        if row == 7:
            with activity.doing("reading the seventh"):
                time.sleep(self.seconds)
        return super().__getitem__(row)


def test_a_read_that_never_ends_ends_an_evaluation(monkeypatch):
    monkeypatch.setattr(supply, "_LOOK", 0.02)
    batches = EvaluationSet(Waits(seconds=1), 8, timeout=0.3).batches(5)
    next(batches)
    with pytest.raises(StuckError, match="reading the seventh has not ended for"):
        next(batches)


@pytest.mark.slow
def test_a_read_that_never_ends_in_a_worker_has_a_name():
    batches = build_loader(Waits(), TOKENIZER, batch_size=25, workers=2, timeout=1.0).batches(0, 9)
    started = time.monotonic()
    with pytest.raises(StuckError, match="reading the seventh has not ended for"):
        list(batches)
    assert time.monotonic() - started < 30  # the worker is ended, too


def test_a_slow_supply_is_patient_and_ends_when_it_is_left():
    def load():
        try:
            for i in range(4):
                time.sleep(0.05)
                yield i
        finally:
            ended.append(True)

    ended: list[bool] = []
    assert list(Supply(load, 4, None, 30.0)) == [0, 1, 2, 3] and ended
    ended.clear()
    chunks = Supply(load, 4, None, 30.0)
    assert next(chunks) == 0
    chunks.close()
    assert ended

    def fails():
        yield 0
        raise ValueError("an error that is not foreseen")

    chunks = Supply(fails, 2, None, 30.0)
    assert next(chunks) == 0
    with pytest.raises(ValueError, match="not foreseen"):
        next(chunks)


def test_the_state_of_a_file_names_what_is_none(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="a named pipe, expected a regular file"):
        storage.of_file(str(tmp_path / "pipe"))
