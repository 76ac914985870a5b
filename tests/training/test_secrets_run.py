"""Passwords in URLs and in variables reach no file, no file name and no line of a run."""

import contextlib
import io
import json

import jax
import pytest
from support.shards import pairs, shard

from clipx import dataset
from clipx.config import secrets
from clipx.errors import ConfigError, DataError
from clipx.serving.evaluation import evaluate
from clipx.train import train
from clipx.training.workdir import read_config

PASSWORD, TOKEN, LOGIN = "h7nter-zwei", "t0ken-vier", "log1n-sechs"
PATH = f"memory://me:{PASSWORD}@bucket/train.tar?token={TOKEN}"
HELD = "memory://${CLIPX_TEST_LOGIN}@bucket/test.tar"


@pytest.fixture(autouse=True)
def bucket(tmp_path, monkeypatch):
    """Files of a bucket in memory, whose names have the secrets; one picture is none."""
    fsspec = pytest.importorskip("fsspec")
    fs = fsspec.filesystem("memory")
    monkeypatch.setenv("CLIPX_TEST_LOGIN", f"me:{LOGIN}")
    for url, odd in ((PATH, {"0003.jpg": b"none"}), (secrets.expand(HELD), {})):
        data = shard(tmp_path / "a.tar", 32, **odd)
        fs.pipe(url.removeprefix("memory:/"), data.read_bytes())
    (tmp_path / "a.tar").unlink()
    yield
    fs.store.clear()


def leaks(folder, said):
    """Where the secrets are in the files of a folder, in their names and in what was printed."""
    held = {"what was printed": said.encode()}
    for file in folder.rglob("*"):
        held[f"the name {file}"] = str(file.relative_to(folder)).encode()
        if file.is_file():
            held[str(file)] = file.read_bytes()
    assert len(held) > 20
    return [
        (where, secret)
        for where, data in held.items()
        for secret in (PASSWORD, TOKEN, LOGIN)
        if secret.encode() in data
    ]


@pytest.mark.slow  # trains, evaluates, reports; tests/config/test_secrets.py covers the function
def test_no_secret_of_a_run_leaves_it(tmp_path):
    config = pairs(PATH)
    config["data"]["max_bad_fraction"] = 0.1
    config["evals"]["retrieval"]["data"]["path"] = HELD
    said, device = io.StringIO(), jax.devices()[:1]
    run, page = tmp_path / "run", tmp_path / "preview.html"
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), secrets.guarded():
        assert train(config, str(run), device) == 0
        config["train"]["total_steps"] = 2  # as it was: the run goes on, and is done
        assert train(config, str(run), device) == 0
        evaluate(run, "latest", read_config(run))
        dataset.preview(config, str(page), 4)
        print(f"a path as a command may name it: {PATH}")
        with pytest.raises((ConfigError, DataError)) as refused:
            train(config | {"data": config["data"] | {"path": PATH + "x"}}, str(run), device)
        print(refused.value)
    assert leaks(tmp_path, said.getvalue()) == []
    assert "config.data.path: its password or signature is stored nowhere" in said.getvalue()
    saved = json.loads((run / "config.json").read_text())
    assert saved["data"]["path"] == "memory://***@bucket/train.tar?token=***"
    assert saved["evals"]["retrieval"]["data"]["path"] == HELD  # opens the file, as just seen
    assert (run / "quarantine.jsonl").exists() and (run / "report.html").exists()
    (name,) = (file.name for file in run.glob("evaluation_2/*"))
    assert name == "bucket-test_retrieval.json"
    with pytest.raises(DataError, match="was not stored with the run; name it by a variable"):
        dataset.preview(saved, str(page), 4)
