"""A shrunk quickstart run, in this process or a new one, and readers of its workdir."""

import json
import os
import socket
import subprocess
import sys
import time

import jax
import numpy as np

from clipx import cli
from clipx.training.run import restore
from clipx.training.session import open_session
from support import ROOT

SMALL = [
    ("image.image_size", "16"),
    ("image.width", "32"),
    ("image.depth", "1"),
    ("image.heads", "2"),
    ("text.width", "32"),
    ("text.depth", "1"),
    ("text.heads", "2"),
    ("image.embed_dim", "16"),
    ("text.embed_dim", "16"),
    ("text.dropout", "0.1"),
    ("data.image_size", "16"),
    ("data.size", "256"),
    ("train.batch_size", "32"),
    ("train.total_steps", "12"),
    ("train.log_every_steps", "1"),
    ("train.save_every_steps", "4"),
    ("optimizer.warmup_steps", "2"),
    ("evals.zero_shot.data.size", "32"),
    ("evals.zero_shot.data.image_size", "16"),
    ("evals.retrieval.limit", "32"),
    ("evals.retrieval.data.source", "shapes"),
    ("evals.retrieval.data.split", "test"),
    ("evals.retrieval.data.image_size", "16"),
]


NO_EVALS = [("evals", "{}"), ("train.best", "")]  # for runs whose weights alone are compared


def small(*overrides):
    return cli.load_config(str(ROOT / "configs" / "quickstart.py"), [*SMALL, *overrides])


def finish(config, workdir, devices=None):
    """Trains to the end as the command does, without its report."""
    assert open_session(config, str(workdir), devices).train()[1]


def parameters(workdir, devices=None):
    _, state = restore(workdir, devices=devices)
    return jax.tree.map(np.asarray, state.params)


def start(workdir, *overrides, devices=8):
    """Starts the training command in a new process with as many CPU devices."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
    arguments = [f"--config.{path}={text}" for path, text in [*SMALL, *overrides]]
    return subprocess.Popen(
        [sys.executable, "-m", "clipx.train", "--config=configs/quickstart.py",
         f"--workdir={workdir}", *arguments],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "too slow"
        time.sleep(0.01)


class StopAt:
    """Asks a run to stop once it has loaded a step, as a signal does: from then on always."""

    def __init__(self, step, loaded):
        self.step, self.loaded = step, loaded

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def __call__(self):
        return self.step in self.loaded


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
