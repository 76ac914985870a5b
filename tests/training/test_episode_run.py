"""A run in episodes: it clusters the rows that it trains on, and resumes inside an episode."""

import json
import shutil

import jax
import numpy as np
import pytest
from support import ROOT
from support.runs import finish

from clipx import cli
from clipx.data import row_arrays
from clipx.data.base import fingerprint
from clipx.errors import ConfigError, DataError
from clipx.train import train
from clipx.training import episodes, loop
from clipx.training.feed import feed, open_data
from clipx.training.initial import open_tokenizer
from clipx.training.run import assemble, restore, with_data
from clipx.training.stop import Stop
from clipx.training.survey import Survey

TWO = jax.devices()[:2]
ROWS, BATCH, EPISODE, STEPS = 160, 16, 4, 10
TOWER = {"width": 16, "depth": 1, "heads": 2, "embed_dim": 8, "dtype": "float32"}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """ProtoCLIP on rendered shapes, with all its options but a frozen tower."""
    config = cli.load_config(str(ROOT / "configs" / "quickstart.py"), [])
    config["objective"] = {
        "name": "protoclip",
        "k": 6,
        "episode_size": EPISODE * BATCH + 3,
        "projection_dim": 6,
        "projection_hidden": 8,
        "external_weight": 1.0,
        "teacher_width": 4,
        "iterations": 3,
        "restarts": 2,
    }
    config["image"] = {"name": "vit", "image_size": 16, "patch": 8, **TOWER}
    config["text"] = {"name": "text", "dropout": 0.1, **TOWER}
    config["data"] = {"source": "shapes", "image_size": 16, "size": ROWS}
    config["train"] = {
        "batch_size": BATCH,
        "total_steps": STEPS,
        "log_every_steps": 1,
        "save_every_steps": 100,
        "episode_pictures": True,
    }
    config["optimizer"] = {"warmup_steps": 1, "learning_rate": 0.01}
    config["evals"] = {}
    config["data"]["teacher"] = str(tmp_path_factory.mktemp("teacher") / "rows.npy")
    write(config)
    return config


def write(config, **changes):
    """Writes a teacher's file of random rows for the config's data."""
    source = assemble(config).source.open()
    about = {"fingerprint": fingerprint(source), "rows": ROWS} | changes
    rows = np.random.default_rng(0).normal(size=(about["rows"], 4)).astype(np.float32)
    with row_arrays.create(config["data"]["teacher"], np.float32, rows.shape, about) as put:
        put(rows)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    assert train(config, str(workdir), TWO) == 0
    return workdir


def logged(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def state(workdir):
    return jax.tree.map(np.asarray, restore(workdir, devices=TWO)[1])


def test_each_episode_is_refreshed_once_and_its_time_is_logged(whole):
    refreshes = [row for row in logged(whole) if "episode/seconds" in row]
    assert [row["step"] for row in refreshes] == [0, EPISODE, 2 * EPISODE]
    assert all(0 < row["episode/share_of_time"] < 1 for row in refreshes)
    training = [row for row in logged(whole) if "loss" in row]
    assert [row["clusters/episode"] for row in training] == [i // EPISODE for i in range(STEPS)]
    assert training[EPISODE]["loss/external"] > 0
    memory = state(whole).memory
    assert set(memory["labels"]) == {"image", "text", "external"}
    for labels in memory["labels"].values():
        assert labels.shape == (EPISODE * BATCH,) and len(np.unique(labels)) > 1


def test_episodes_are_in_the_report(whole):
    assert [path.stem for path in episodes.files(whole)] == ["000000", "000001", "000002"]
    assert "<h2>Episodes" in (whole / "report.html").read_text()


def test_the_survey_has_the_rows_of_training_at_the_positions_of_the_labels(config):
    run = assemble(config)
    data = open_data(run)
    run = with_data(run, len(data), open_tokenizer(run, data.source))
    survey = Survey(run, data).batches(start=EPISODE)
    positions = []
    for (batch, _), seen in zip(feed(run, data, start=EPISODE), survey):
        for name in ("row", "position", "text"):
            np.testing.assert_array_equal(getattr(batch, name), getattr(seen, name))
        assert (np.asarray(batch.image) != np.asarray(seen.image)).any()
        np.testing.assert_array_equal(seen.extra["teacher"], data.teacher[np.asarray(seen.row)])
        positions.append(np.asarray(seen.position))
        if len(positions) == EPISODE:
            break
    # row p of the features that `refresh` takes is the row at position p
    buffer = np.zeros((BATCH, EPISODE), int)
    for step, of_step in enumerate(positions):
        buffer[:, step] = of_step
    np.testing.assert_array_equal(buffer.reshape(-1), np.arange(EPISODE * BATCH))


@pytest.fixture(scope="module")
def stopped(config, tmp_path_factory):
    """A run that was stopped during the survey of its second episode, and again inside it."""
    workdir, surveyed, loaded = tmp_path_factory.mktemp("stopped"), [], []
    survey = Survey.batches

    def counted_survey(self, *, start):
        for batch in survey(self, start=start):
            surveyed.append(batch)
            yield batch

    def counted_feed(run, data, *, start):
        for batch in feed(run, data, start=start):
            loaded.append(batch)
            yield batch

    class StopByCount(Stop):
        def __call__(self):
            return len(surveyed) == EPISODE + 2 or len(loaded) == 6

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Survey, "batches", counted_survey)
        patch.setattr(loop, "feed", counted_feed)
        for step, episode in ((EPISODE, 0), (6, 1)):
            assert train(config, str(workdir), TWO, stop=StopByCount()) == cli.EXIT_PREEMPTED
            saved = state(workdir)
            assert (saved.step, saved.memory["episode"]) == (step, episode)
            surveyed.clear()
    return workdir


def test_stopped_in_episodes_it_ends_in_the_same_bits(config, whole, stopped, tmp_path):
    """Law 7 on one topology, memory included."""
    shutil.copytree(stopped, tmp_path / "run")
    finish(config, tmp_path / "run", TWO)
    steps = [row["step"] for row in logged(tmp_path / "run") if "episode/seconds" in row]
    assert steps == [0, EPISODE, 2 * EPISODE]
    jax.tree.map(np.testing.assert_array_equal, state(tmp_path / "run"), state(whole))


@pytest.mark.slow
def test_on_other_devices_it_ends_near(config, whole, stopped, tmp_path):
    """Law 7 on another topology."""
    shutil.copytree(stopped, tmp_path / "run")
    finish(config, tmp_path / "run", jax.devices()[:4])
    ended, expected = (jax.tree.leaves(state(x).params) for x in (tmp_path / "run", whole))
    for x, y in zip(ended, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-4)


def test_a_teacher_for_other_data_or_of_the_wrong_length_is_refused(config, tmp_path):
    for changes, expected in (
        ({"fingerprint": "0" * 12}, "made for other data"),
        ({"rows": ROWS - 1}, f"{ROWS - 1} rows"),
    ):
        other = config | {"data": {**config["data"], "teacher": str(tmp_path / "other.npy")}}
        write(other, **changes)
        with pytest.raises(DataError, match=expected):
            train(other, str(tmp_path / "run"))


def test_a_teacher_and_an_objective_that_reads_one_go_together(config):
    without = config | {"data": {k: v for k, v in config["data"].items() if k != "teacher"}}
    with pytest.raises(ConfigError, match="clipx.teacher"):
        assemble(without)
    with pytest.raises(ConfigError, match="the objective protoclip does not read a teacher"):
        assemble(config | {"objective": {**config["objective"], "external_weight": 0.0}})
    other = config | {"objective": {"name": "clip"}, "data": without["data"]}
    with pytest.raises(ConfigError, match="clip has no episodes"):
        assemble(other)


def test_an_episode_longer_than_the_data_is_several_epochs_of_it(config, tmp_path):
    """Labels belong to positions, so a row may occur twice."""
    objective = {**config["objective"], "episode_size": 2 * ROWS, "with_replacement": False}
    run = assemble(
        config | {"objective": objective, "train": {**config["train"], "total_steps": 2}}
    )
    data = open_data(run)
    run = with_data(run, len(data), open_tokenizer(run, data.source))
    survey = Survey(run, data).batches(start=0)
    seen = [jax.device_get((batch.row, batch.position)) for batch in survey]
    rows, positions = (np.concatenate(x) for x in zip(*seen))
    assert (np.bincount(rows) == 2).all()
    np.testing.assert_array_equal(np.sort(positions), np.arange(2 * ROWS))


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_a_runs_batches_are_pairs_of_its_clusters(config, tmp_path, fraction):
    """CLIP-Lite's cluster negatives, from the file to the batch."""
    path = str(tmp_path / "clusters.npy")
    clusters = np.random.default_rng(0).integers(5, size=ROWS).astype(np.int32)
    about = {"fingerprint": fingerprint(assemble(config).source.open()), "rows": ROWS}
    with row_arrays.create(path, np.int32, clusters.shape, about) as put:
        put(clusters)
    data = {"source": "shapes", "image_size": 16, "size": ROWS, "clusters": path}
    clip_lite = config | {
        "objective": {"name": "clip_lite", "width": 8},
        "data": data | {"fraction": fraction},
        "train": {"batch_size": BATCH, "total_steps": 4},
    }
    run = assemble(clip_lite)
    data = open_data(run)
    run = with_data(run, len(data), open_tokenizer(run, data.source))
    batches = [jax.device_get(batch.row) for batch, _ in feed(run, data, start=0)]
    pairs = clusters[np.concatenate(batches)].reshape(-1, 2)
    # a cluster of odd size leaves one row over, which is paired with a row of another cluster
    assert np.mean(pairs[:, 0] == pairs[:, 1]) > 0.85
    with pytest.raises(ConfigError, match="whole pairs"):
        groups = {"objective": {**clip_lite["objective"], "groups": 8}}
        assemble(clip_lite | groups | {"train": {"batch_size": 24, "total_steps": 4}})
    with_replacement = config | {"data": config["data"] | {"clusters": path}}
    with pytest.raises(ConfigError, match="with replacement, every row is sampled on its own"):
        assemble(with_replacement)
