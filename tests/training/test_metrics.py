"""metrics.jsonl, the console, TensorBoard, the clock, and the meaning of metrics."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import termios
import time
import types

import jax.numpy as jnp
import numpy as np
import pytest

from clipx.config.binding import find
from clipx.data.threads import progress_bar, shown
from clipx.errors import MetricsError, install_hint
from clipx.evaluators.base import Evaluator
from clipx.training.clock import Clock
from clipx.training.metric_table import metric
from clipx.training.metrics import Metrics, read
from clipx.training.mirrors import Replay


def run(workdir, start, stop, **settings):
    """Logs the steps after `start` up to `stop`, with an evaluation at every tenth."""
    with Metrics(
        workdir, total_steps=40, batch_size=8, steps_per_epoch=10, step=start, **settings
    ) as metrics:
        for step in range(start + 1, stop + 1):
            metrics.progress(step)
            metrics.log(step, {"loss": jnp.float32(1 / step), "skipped": jnp.int32(0)})
            if step % 10 == 0:
                metrics.log(step, {"zero_shot/top1": step / 40})


def test_a_line_is_strict_json_with_the_shortest_digits(tmp_path):
    with Metrics(tmp_path / "new" / "run", total_steps=9, batch_size=32) as metrics:
        metrics.log(
            3, {"loss": jnp.float32(0.1), "a": jnp.bfloat16(2), "b": 7, "c": np.float64(1 / 3)}
        )
        metrics.log(4, {"loss": float("nan"), "up": jnp.inf, "down": -np.inf})
    lines = (tmp_path / "new/run/metrics.jsonl").read_text().splitlines()
    assert lines[0] == (
        '{"step": 3, "examples": 96, "loss": 0.1, "a": 2.0, "b": 7, "c": 0.3333333333333333}'
    )
    assert json.loads(lines[1], parse_constant=pytest.fail)["loss"] == "NaN"
    row = read(tmp_path / "new/run")[1]
    assert math.isnan(row["loss"]) and (row["up"], row["down"]) == (math.inf, -math.inf)


def test_an_array_is_no_metric(tmp_path):
    with (
        Metrics(tmp_path, total_steps=9, batch_size=1) as m,
        pytest.raises(TypeError, match=r"\(2,"),
    ):
        m.log(1, {"loss": jnp.zeros(2)})


@pytest.mark.parametrize("tail", ["", '{"step": 26, "lo', '{"step": 12, "loss": 1.0}'])
def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path, tail):
    run(tmp_path / "whole", 0, 40)
    run(tmp_path / "killed", 0, 25)
    with open(tmp_path / "killed/metrics.jsonl", "a") as file:
        file.write(tail)
    run(tmp_path / "killed", 20, 40)
    run(tmp_path / "killed", 40, 40)
    whole, killed = (tmp_path / n / "metrics.jsonl" for n in ("whole", "killed"))
    assert killed.read_bytes() == whole.read_bytes()


def test_a_half_line_is_repaired_and_never_read(tmp_path):
    run(tmp_path, 0, 5)
    file = tmp_path / "metrics.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"step": 5, "los')
    assert [row["step"] for row in read(tmp_path)] == [1, 2, 3, 4, 5]
    run(tmp_path, 5, 5)
    assert file.read_bytes() == whole


def test_an_evaluation_repeated_where_the_run_was_saved_is_not_written_twice(tmp_path):
    run(tmp_path, 0, 10)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with Metrics(tmp_path, total_steps=40, batch_size=8, steps_per_epoch=10, step=10) as metrics:
        metrics.log(10, {"zero_shot/top1": 0.25})
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_run_from_step_0_removes_all_lines(tmp_path):
    with Metrics(tmp_path, total_steps=9, batch_size=8) as metrics:
        metrics.log(0, {"zero_shot/top1": 0.5})
    with Metrics(tmp_path, total_steps=9, batch_size=8) as metrics:
        metrics.log(0, {"zero_shot/top1": 0.25})
    assert [row["zero_shot/top1"] for row in read(tmp_path)] == [0.25]


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path):
    run(tmp_path, 0, 5)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Metrics(tmp_path, total_steps=40, batch_size=8, step=5) as metrics:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
        try:
            with pytest.raises(MetricsError, match="cannot write .*metrics.jsonl: ") as error:
                metrics.log(6, {"loss": 1.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "\n" not in str(error.value)
        assert (tmp_path / "metrics.jsonl").read_bytes() == before
        metrics.log(6, {"loss": 1.0})  # room again
    assert [row["step"] for row in read(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_workdir_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MetricsError, match="cannot write .*file/run/metrics.jsonl: Not a dir"):
        run(tmp_path / "file" / "run", 0, 1)


def test_only_process_0_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    run(tmp_path / "run", 0, 10)
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_plain_lines_without_a_terminal(tmp_path, capsys):
    run(tmp_path, 9, 10)
    with Metrics(tmp_path, total_steps=4000, batch_size=8, step=10) as metrics:
        metrics.log(10, {"zero_shot/top1": 0.5, "zero_shot/class/red": 0.5})
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[0] == "step 10/40  epoch 1.00  loss 0.1"
    assert lines[1] == "step 10/40  epoch 1.00  zero_shot/top1 25.0 %"


def test_the_time_left_leaves_compilation_out(tmp_path, capsys, monkeypatch):
    seconds = iter([100.0, 110.0])
    monkeypatch.setattr("clipx.training.metrics.time.monotonic", lambda: next(seconds))
    with Metrics(tmp_path, total_steps=40, batch_size=8) as metrics:
        for step in range(1, 12):
            metrics.progress(step)
        metrics.log(11, {"loss": 1.0})
    assert capsys.readouterr().out.endswith("loss 1  00:29 left\n")


def test_a_bar_on_a_terminal(tmp_path):
    program = (
        "import sys; from clipx.training.metrics import Metrics\n"
        "with Metrics(sys.argv[1], total_steps=4, batch_size=8) as m:\n"
        "    m.progress(1); m.log(1, {'loss': 2.5}); m.log(1, {'knn/top1': 0.5}); m.progress(4)\n"
    )
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE, stderr=theirs, timeout=60
    )
    os.close(theirs)
    seen = os.read(ours, 100_000).decode()
    os.close(ours)
    assert done.returncode == 0
    assert "4/4" in seen and "loss=2.5" in seen and "step 1/4  knn/top1 50.0 %" in seen
    assert done.stdout == b""


def test_a_killed_run_leaves_a_readable_file(tmp_path):
    program = (
        "import sys; from clipx.training.metrics import Metrics\n"
        "with Metrics(sys.argv[1], total_steps=4, batch_size=8) as m:\n"
        "    for step in range(10**9): m.log(step, {'loss': 1.0})\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE, text=True
    ) as process:
        for _ in range(50):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert [row["step"] for row in read(tmp_path)][:50] == list(range(50))


def test_tensorboard_absent_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(MetricsError, match=re.escape(install_hint("tensorboard"))):
        run(tmp_path, 0, 1, tensorboard=True)


def test_tensorboard_gets_every_finite_number(tmp_path, monkeypatch):
    seen = []

    class Writer:
        def __init__(self, folder, purge_step):
            seen.append((folder, purge_step))

        def add_scalar(self, key, value, step):
            seen.append((key, value, step))

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            seen.append("closed")

    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=Writer))
    with Metrics(tmp_path, total_steps=9, batch_size=8, step=3, tensorboard=True) as metrics:
        metrics.log(4, {"loss": 2.0, "bad": math.nan})
    assert seen == [(str(tmp_path / "tensorboard"), 4), ("loss", 2.0, 4), "closed"]


def test_the_clock_counts_by_part():
    now = [0.0]

    def wait(seconds):
        now[0] += seconds

    clock = Clock({"train": 100.0}, now=lambda: now[0])
    with clock.time("data"):
        wait(2)
    wait(6)
    with clock.time("evaluate"):
        wait(50)
    with clock.time("save"):
        wait(5)
    with clock.time("episode"):
        wait(7)
    assert (clock.total("episode"), clock.total()) == (7, 170)
    assert clock.interval(images=80) == {"images_per_second": 10, "data_wait_fraction": 0.25}
    assert clock.totals == {"train": 106, "data": 2, "evaluate": 50, "save": 5, "episode": 7}
    assert (clock.total("episode"), clock.total()) == (7, 170)
    wait(4)
    assert clock.interval(images=80) == {"images_per_second": 20, "data_wait_fraction": 0}
    assert Clock(clock.totals).totals["train"] == 110


EVALS = {"cifar10": {"evaluator": "linear_probe"}, "voc": {}, "loss": {"evaluator": "retrieval"}}


@pytest.mark.parametrize(
    "key, better, shown, detail",
    [
        ("loss", "less", "number", False),
        ("loss/contrastive", "less", "number", False),
        ("chance_loss", None, "number", False),
        ("batch/R@1", "more", "percent", False),
        ("clusters/text_inertia", "less", "number", False),
        ("cifar10/top1", "more", "percent", False),
        ("cifar10/cost", None, "number", False),
        ("voc/mAP", "more", "percent", False),
        ("voc/class/a/b", "more", "percent", True),
        ("loss/mean_recall", "more", "percent", False),  # of an eval named "loss"
        ("loss/image_to_text_median_rank", "less", "number", False),
        ("knn/k200/top5", "more", "percent", False),  # an eval that the config does not have
        ("flickr/text_to_image_R@10", "more", "percent", False),  # of an unknown evaluator
        ("bias/a photo of a doctor/b_after", None, "number", False),
        ("grounding/testA/pointing", "more", "percent", False),
        ("clustering/ami", "more", "number", False),
        ("modality_gap/text_std", None, "number", False),
        ("mine/whatever", None, "number", False),
        ("whatever", None, "number", False),
    ],
)
def test_what_a_metric_means(key, better, shown, detail):
    known = metric(key, EVALS)
    assert (known.better, known.shown, known.detail) == (better, shown, detail)


def test_the_names_of_clip_benchmark():
    names = {"zero_shot": "top1", "linear_probe": "top1", "retrieval": "text_to_image_R@5"}
    found = {}
    for name, key in names.items():
        evaluator = find("evaluators", name, Evaluator)
        found[evaluator.task] = metric(f"{name}/{key}", {}).benchmark
    assert found == {
        "zeroshot_classification": "acc1",
        "linear_probe": "lp_acc1",
        "zeroshot_retrieval": "image_retrieval_recall@5",
    }


def test_the_speed_of_logged_steps_is_measured_over_several():
    """Two steps that were computed ahead are fetched at once: the second took no time."""
    now = [0.0]
    clock = Clock(now=lambda: now[0])
    rates = []
    for seconds in (1, 1, 1, 2, 0):
        now[0] += seconds
        rates.append(clock.interval(images=8, window=16)["images_per_second"])
    assert rates == [8, 8, 8, 16 / 3, 8]
    assert clock.interval(images=80, window=16)["images_per_second"] > 1e9  # enough alone


def test_older_names_are_read_by_the_new_ones(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "loss": 2.0, "loss/chance": 4.5}\n')
    assert read(tmp_path) == [{"step": 3, "loss": 2.0, "chance_loss": 4.5}]


def test_shares_are_percentages_on_the_console(tmp_path, capsys):
    with Metrics(tmp_path, total_steps=9, batch_size=8, evals={"a": {"evaluator": "knn"}}) as m:
        m.log(1, {"loss": 2.0, "batch/R@1": 0.125})
        m.log(1, {"a/k20/top1": 0.25})
    assert "batch/R@1 12.5 %" in (out := capsys.readouterr().out) and "a/k20/top1 25.0 %" in out
    assert read(tmp_path)[0]["batch/R@1"] == 0.125


class Sent:
    """Where a replay sends lines."""

    def __init__(self):
        self.lines = []

    def send(self, step, values):
        self.lines.append((step, *values))

    def close(self):
        self.lines.append("closed")


@pytest.mark.parametrize("stops", [(7,), (3, 5), (0, 1, 2, 6)])
def test_a_replay_sends_each_line_once(tmp_path, stops):
    """However often the run is killed, and whatever of its last lines is written again."""
    rows = [{"step": 0, "examples": 0, "a": 1}] + [
        row
        for step in range(1, 5)
        for row in ({"step": step, "loss": 2.0}, {"step": step, "eval": 0.5})
    ]
    sent = Sent()
    for stop in (*stops, len(rows)):
        replay = Replay(tmp_path / "x.json", sent)
        replay.replay(rows[: max(stop - 2, 0)])  # up to the last checkpoint
        for row in rows[max(stop - 2, 0) : stop]:
            replay.send(row)
    assert sent.lines == [(row["step"], *(k for k in row if k not in HEAD)) for row in rows]


HEAD = ("step", "examples", "epoch")


def test_a_replay_that_is_forgotten_is_sent_again(tmp_path):
    rows = [{"step": step, "loss": 2.0} for step in range(1, 7)]
    for step, again in ((0, [1, 2, 3, 4, 5, 6]), (4, [5, 6]), (6, [])):
        sent = Sent()
        replay = Replay(tmp_path / "x.json", sent, again_after=step)
        replay.replay(rows)
        assert [step for step, _ in sent.lines] == again


def test_wandb_absent_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MetricsError, match=re.escape(install_hint("wandb"))):
        run(tmp_path, 0, 1, wandb="project")


def offline_records(file):
    """The records of a .wandb file: LevelDB's log format behind a header of seven bytes. Blocks of
    32 KiB hold pieces of records: checksum (4 bytes), length (2), and 1 for a whole record, or 2, 3
    and 4 for its first, middle and last piece."""
    data, at, record = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        piece = data[at + 7 : at + 7 + length]
        at += 7 + length
        record = piece if kind in (1, 2) else record + piece
        if kind in (1, 4):
            yield record


@pytest.mark.slow
@pytest.mark.parametrize("stop", [25, 30])
def test_the_records_of_weights_and_biases(tmp_path, monkeypatch, stop):
    """Offline records of a run that was killed at a step and goes on from its checkpoint at 20: one
    id, and each step once, with all its numbers."""
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "run"
    run(folder, 0, stop, wandb="project", config={"seed": 3})
    run(folder, 20, 40, wandb="project", config={"seed": 3})
    files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2 and len({file.stem for file in files}) == 1
    steps, names = [], set()
    for data in itertools.chain.from_iterable(map(offline_records, files)):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = {x.key or ".".join(x.nested_key): x.value_json for x in record.history.item}
            step = int(items.get("_step", record.history.step.num))
            steps.append(step)
            names |= {(step, name) for name in items if name[0] != "_"}
    assert steps == list(range(1, 41))
    expected = {(step, name) for step in range(1, 41) for name in ("loss", "skipped")}
    assert names == expected | {(step, "zero_shot/top1") for step in (10, 20, 30, 40)}


def test_lines_in_place_of_a_bar(capsys, monkeypatch):
    """One each ten seconds, with the time that is left."""
    now = [0.0]
    monkeypatch.setattr("clipx.data.threads.time.monotonic", lambda: now[0])
    with progress_bar(1000, "verify") as bar:
        for _ in range(10):
            now[0] += 4
            bar.update(20)
    assert capsys.readouterr().err.splitlines() == [
        "verify: 60/1,000 rows, 00:12 so far, about 03:08 left",
        "verify: 120/1,000 rows, 00:24 so far, about 02:56 left",
        "verify: 180/1,000 rows, 00:36 so far, about 02:44 left",
    ]


def test_something_that_tells_nothing_is_shown(capsys, monkeypatch):
    monkeypatch.setattr("clipx.data.threads._SILENT", 0.03)
    monkeypatch.setattr("clipx.data.threads._POLL", 0.01)
    with shown("compiling"):
        time.sleep(0.2)
    with shown("evaluating x", lambda: 7, 5), shown("y", silent=True):
        time.sleep(0.2)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "compiling: 00:00 so far" and not any("y:" in line for line in lines)
    assert lines[-1].startswith("evaluating x: 5/5 rows")
