"""Failures of real machines: one clear line, no hang, and no saved work lost."""

import json
import subprocess
import time

import jax
import pytest
from support.runs import NO_EVALS, finish, small
from support.shards import pairs, shard

from clipx.errors import CheckpointError, ConfigError, DataError, MetricsError, RunError
from clipx.train import train
from clipx.training import loop, proof
from clipx.training.checkpoint import Checkpoints
from clipx.training.feed import feed

TWO = jax.devices()[:2]


def lines(error):
    return str(error.value).count("\n") + 1


def test_bad_rows_are_replaced_in_training_and_refused_in_evaluation(tmp_path, capsys):
    odd = {"0003.jpg": b"not a picture", "0005.txt": b"  "}
    path = shard(tmp_path / "a.tar", **odd)
    good = shard(tmp_path / "good.tar")
    config = pairs(path)
    config["evals"]["retrieval"]["data"]["path"] = str(good)
    finish(config, tmp_path / "run", TWO)
    said = capsys.readouterr().out
    assert "0003: the picture (13 bytes) cannot be decoded" in said or "0005" in said
    rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[1]["data/bad_fraction"] > 0
    quarantine = (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
    bad = {row["row"]: row["reason"] for row in map(json.loads, quarantine)}
    assert set(bad) <= {3, 5} and len(bad) == len(quarantine) > 0
    assert all(("cannot be decoded" if row == 3 else "empty") in bad[row] for row in bad)
    fewer = shard(tmp_path / "fewer.tar", 40)
    config["data"]["path"] = str(fewer)
    with pytest.raises(ConfigError, match="40 rows\n.*the 48 rows that this run started with"):
        train(config, str(tmp_path / "run"), TWO)
    config["data"]["path"] = str(shard(tmp_path / "other.tar"))
    with pytest.raises(ConfigError, match="fingerprint .*\n.*the data that this run started with"):
        train(config, str(tmp_path / "run"), TWO)
    with pytest.raises(DataError, match="row 5 of the evaluation set: .*0005") as error:
        train(pairs(path), str(tmp_path / "other"), TWO)
    assert lines(error) == 1
    assert Checkpoints(tmp_path / "other").latest == 2  # the trained steps are not lost


def test_too_many_bad_rows_stop_the_run(tmp_path):
    path = shard(tmp_path / "a.tar", **{f"{i:04d}.jpg": b"no" for i in range(0, 40, 2)})
    config = pairs(path)
    config["data"]["max_bad_fraction"] = 0.0
    with pytest.raises(RunError, match="max_bad_fraction=0.0"):
        train(config, str(tmp_path / "run"), TWO)


@pytest.mark.parametrize("kind", ["truncated", "missing", "no match"])
def test_missing_and_truncated_shards(tmp_path, kind):
    path = shard(tmp_path / "a-000000.tar")
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:20_000])
        where, match = path, "a-000000.tar"
    elif kind == "missing":
        where, match = tmp_path / "a-{000000..000002}.tar", "a-000001.tar"
    else:
        where, match = tmp_path / "b-*.tar", "b-"
    with pytest.raises(DataError, match=match):
        train(pairs(where), str(tmp_path / "run"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.fixture
def disk(tmp_path):
    """A disk of 16 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs rights that this machine does not give")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder):
    with open(folder / "ballast", "wb", buffering=0) as file:
        block = b"\0" * 4096
        try:
            while True:
                file.write(block)
        except OSError:
            return


@pytest.mark.slow  # trains twice
# Orbax's threads use an event loop that its own failure has closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_keeps_checkpoints_and_the_run_resumes_with_free_space(disk, monkeypatch):
    save = Checkpoints.save

    def save_and_fill(self, step, *arguments):
        if step == 8:
            self.wait()
            fill(disk)
        return save(self, step, *arguments)

    workdir = disk / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_and_fill)
        with pytest.raises((CheckpointError, MetricsError)) as error:
            train(small(), str(workdir))
    assert lines(error) == 1
    assert "No space left" in str(error.value)
    assert Checkpoints(workdir).latest == 4
    (disk / "ballast").unlink()
    assert train(small(), str(workdir)) == 0


def test_an_error_waits_for_the_checkpoint_that_is_being_written(tmp_path, monkeypatch):
    """Python cannot end cleanly while Orbax writes, and what was saved is kept."""

    def fails(run, data, *, start):
        for step, batch in enumerate(feed(run, data, start=start), start):
            if step == 4:
                raise RunError("broken")
            yield batch

    def slow(*arguments, **named):
        time.sleep(0.5)
        write(*arguments, **named)

    write = proof.write
    with monkeypatch.context() as patch:
        patch.setattr(loop, "feed", fails)
        patch.setattr(proof, "write", slow)
        with pytest.raises(RunError, match="broken"):
            train(small(*NO_EVALS), str(tmp_path), TWO)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["4"]
    assert Checkpoints(tmp_path).newest_proven() == 4


def test_a_read_only_workdir(disk):
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(ConfigError, match="Read-only file system"):
        train(small(), str(disk / "run"))
