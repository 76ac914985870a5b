"""Features of frozen towers are written once, and a run that trains on them is the run without."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json

import jax
import numpy as np
import pytest
from support import runs

from clipx.data.features import FeatureRows
from clipx.data.text import tokenizers
from clipx.embed import embed
from clipx.errors import BadSample, ConfigError, DataError
from clipx.training import embed_rows, embedding, encode, stored
from clipx.training.feed import open_data
from clipx.training.run import assemble, restore
from clipx.training.session import open_session

FROZEN = [
    ("objective.augmentation", "center"),
    ("objective.crop_scale", "None"),
    ("optimizer.freeze", "('^image/(?!projection)', '^text/(?!projection)')"),
    ("optimizer.learning_rate", "0.01"),
    ("train.total_steps", "6"),
    ("train.save_every_steps", "100"),
    ("data.size", "96"),
    *runs.NO_EVALS,
]
CACHED = [("image.cache", "true"), ("text.cache", "true")]


def config(*overrides):
    return runs.small(*FROZEN, *overrides)


def losses(folder):
    return [row["loss"] for row in runs.rows(folder) if "loss" in row]


class After:
    """Asks to stop at the given call."""

    def __init__(self, calls):
        self.left = calls

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def __call__(self):
        self.left -= 1
        return self.left < 0


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embed_rows, "CAPTIONS", 32)
        patch.setattr(encode, "_ROWS", 32)
        yield


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run that computes both frozen towers at each step."""
    folder = tmp_path_factory.mktemp("plain")
    runs.finish(config(), folder, jax.devices()[:1])
    return folder


EIGHT = config(*CACHED, ("train.microbatches", "2"))


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """The same run on features that it writes first, on eight devices in two micro-batches. It is
    stopped twice: while it writes captions, and after three steps."""
    folder = tmp_path_factory.mktemp("cached")
    state, finished = open_session(EIGHT, str(folder)).train(After(3))
    assert int(state.step) == 0 and not finished
    assert (folder / "features" / "image" / "features.json").exists()
    assert not (folder / "features" / "text" / "features.json").exists()
    state, finished = open_session(EIGHT, str(folder)).train(After(3))
    assert int(state.step) == 3 and not finished
    before = {f: f.stat().st_mtime_ns for f in (folder / "features").rglob("*.npy")}
    runs.finish(EIGHT, folder)
    assert before == {f: f.stat().st_mtime_ns for f in (folder / "features").rglob("*.npy")}
    return folder


def test_a_cached_run_is_the_run_without(plain, cached):
    np.testing.assert_allclose(losses(cached), losses(plain), rtol=0, atol=1e-5)
    assert losses(plain)[0] - losses(plain)[-1] > 0.1
    a, b = runs.parameters(plain), runs.parameters(cached)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-4), a, b)
    assert {"patch_embedding", "projection"} < b["image"].keys()  # exports are whole


def test_evaluated_rows_pass_frozen_towers_once(plain, tmp_path, monkeypatch):
    run, state = restore(plain, devices=jax.devices()[:1])
    pictures = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8)
    texts = [f"a red square {i}" for i in range(40)]

    def encoded(run, state):
        encode = run.encode(state)
        return encode.image(pictures, ("backbone", "unit")), encode.text(texts)

    expected = encoded(run, state)
    named = dataclasses.replace(run.data.features, evals=str(tmp_path))
    keeping = dataclasses.replace(run, data=dataclasses.replace(run.data, features=named))
    near = functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-6)
    jax.tree.map(near, encoded(keeping, state), expected)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2 and {np.load(file).shape for file in files} == {(40, 32)}

    def refused(*args):
        raise AssertionError("a tower ran again")

    head = jax.tree.map(lambda x: x, state.params)
    head["image"]["projection"]["kernel"] += 1.0
    with monkeypatch.context() as patch:
        patch.setattr(encode, "_features_of_rows", refused)
        again, texts_again = encoded(keeping, state.replace(params=head))
    assert not np.allclose(again.unit, expected[0].unit)
    near(texts_again.unit, expected[1].unit)
    files[0].write_bytes(files[0].read_bytes()[:200])
    jax.tree.map(near, encoded(keeping, state), expected)
    below = jax.tree.map(lambda x: x, state.params)
    below["text"]["token_embedding"] *= 1.01
    encoded(keeping, state.replace(params=below))
    assert len(list(tmp_path.iterdir())) == 3
    (tmp_path / "file").touch()
    blocked = dataclasses.replace(named, evals=str(tmp_path / "file"))
    blocked = dataclasses.replace(run, data=dataclasses.replace(run.data, features=blocked))
    with pytest.raises(ConfigError, match=r"features.evals\n.*file: File exists"):
        encoded(blocked, state)


def test_a_cached_run_keeps_what_its_evals_compute(cached):
    folder = open_session(EIGHT, str(cached)).run.data.features.evals
    assert folder == str(cached / "features" / "evals")
    data = json.loads((cached / "config.json").read_text())["data"]
    assert data["features"]["evals"] is None


@pytest.mark.slow
def test_a_cached_run_that_was_stopped_ends_in_the_same_bits(cached, tmp_path):
    runs.finish(EIGHT, tmp_path)
    for name in ("image/backbone", "text/backbone", "text/offsets", "text/ids"):
        a, b = (np.load(f / "features" / f"{name}.npy") for f in (cached, tmp_path))
        assert np.array_equal(a, b)
    jax.tree.map(np.testing.assert_array_equal, *map(runs.parameters, (cached, tmp_path)))


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """Features of all rows, by the command, and the overrides that name them."""
    folder = tmp_path_factory.mktemp("features")
    for tower in ("image", "text"):
        assert embed(config(), str(folder / tower), tower=tower) == 0
    return [(f"data.features.{tower}", str(folder / tower)) for tower in ("image", "text")]


def test_the_command_writes_what_a_cached_run_writes(features, cached):
    for name in ("image/backbone", "text/backbone", "text/ids"):
        side, file = name.split("/")
        a = np.load(f"{dict(features)[f'data.features.{side}']}/{file}.npy")
        b = np.load(cached / "features" / f"{name}.npy")
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_a_share_of_the_rows_takes_them_from_the_features_of_all(features):
    data = open_data(assemble(config(*features, ("data.fraction", "0.5"))))
    batch = {
        name: x.images(np.arange(48), np.zeros((48, 1)), False) if name == "image" else None
        for name, x in data.features.items()
    }
    rows = [data.source[i].row for i in range(48)]
    whole = np.load(f"{features[0][1]}/backbone.npy")
    assert np.array_equal(batch["image"]["image_features"][:, 0], whole[rows, 0])


@pytest.mark.parametrize(
    "overrides, said",
    [
        ([("objective.mean", "(0, 0, 0)")], "mean=[0.0, 0.0, 0.0], as this run has it"),
        ([("image.dtype", "bfloat16")], "dtype=bfloat16"),
        ([("data.size", "128")], "made for other data, with fingerprint"),
        ([("objective.augmentation", "none")], "clipx.embed --views=1"),
        ([("seed", "1")], "features of weights"),
    ],
)
def test_features_of_another_run_are_refused(features, tmp_path, overrides, said):
    with pytest.raises((ConfigError, DataError)) as error:
        open_session(config(*features[:1], *overrides), str(tmp_path)).train()
    assert said in str(error.value) and "clipx.embed" in str(error.value)


def test_features_fit_a_tokenizer_wherever_it_lies(plain, features):
    saved = json.loads((plain / "tokenizer.json").read_text())
    run, rows = assemble(config()), FeatureRows(dict(features)["data.features.text"])

    def refuse(**changes):
        tokenizer = tokenizers.load(saved | {"config": saved["config"] | changes})
        stored.refuse_other(run.objective, tokenizer, run.data, "text", rows)
        return tokenizer

    moved = refuse(path="another/place.model")
    with pytest.raises(ConfigError, match="features made with tokenizer="):
        refuse(context=9)
    text = json.dumps(moved.save(), sort_keys=True).encode()
    rows.about["preprocessing"]["tokenizer"] = hashlib.sha256(text).hexdigest()[
        :12
    ]  # older folders
    refuse(path="another/place.model")
    with pytest.raises(ConfigError, match="features made with tokenizer="):
        refuse(path="a/third.model")


def test_wrong_flags(features, tmp_path):
    random = runs.small(*FROZEN, ("objective.augmentation", "flip"))
    for changes, said in (
        ({"out": features[0][1]}, "--overwrite"),
        ({"config": random}, "augmentation=center"),
        ({"tower": "text", "views": 2}, "0 for texts"),
        ({"views": 2}, "without --views"),
    ):
        options = {"config": config(), "out": str(tmp_path / "f"), "tower": "image", **changes}
        with pytest.raises(ConfigError) as error:
            embed(**options)
        assert said in str(error.value)


class Broken:
    """A source of which row 5 cannot be read."""

    def __init__(self, source):
        self._source, self.limits = source, source.limits

    def __len__(self):
        return len(self._source)

    def __getitem__(self, row):
        if row == 5:
            raise BadSample("five", "the picture is broken")
        return self._source[row]


def test_stored_crops_are_the_objectives_own_by_seed_row_and_number(tmp_path, monkeypatch):
    crops = runs.small(*FROZEN, ("objective.augmentation", "mocov2"))
    embedder = embedding.open_embedder(
        crops, "image", tmp_path / "a", views=3, tokens=True, tell=print
    )
    found = embedder.write()
    assert found.views == 3 and found.about["crops"][0]["flip"]
    stored = np.load(tmp_path / "a" / "backbone.npy")
    flat = stored.reshape(-1, stored.shape[-1])
    assert len(np.unique(flat.round(4), axis=0)) > 0.9 * len(flat)  # some show no shape
    assert np.load(tmp_path / "a" / "tokens.npy").shape == (96, 3, 4, 32)
    monkeypatch.setattr(encode, "_ROWS", 16)
    source = Broken(embedder.source)
    again = dataclasses.replace(
        embedder, folder=tmp_path / "b", tokens=False, views=2, source=source
    )
    found = again.write()
    other = np.load(tmp_path / "b" / "backbone.npy")
    assert not other[5].any() and np.load(tmp_path / "b" / "bad.npy").nonzero()[0].tolist() == [5]
    with pytest.raises(BadSample, match=r"no features: see .*quarantine\.jsonl"):
        found.check(5)
    assert json.loads((tmp_path / "b" / "quarantine.jsonl").read_text())["key"] == "five"
    stored[5] = 0
    np.testing.assert_allclose(other, stored[:, :2], rtol=0, atol=1e-5)


OBJECTIVES = {  # (fields of the objective, towers that are stored, crops of each picture)
    "siglip": ({}, ("image", "text"), 0),
    "clip_lite": ({"width": 16, "text_terms": True}, ("image", "text"), 0),
    "protoclip": (
        {"k": 4, "episode_size": 64, "projection_dim": 8, "projection_hidden": 16,
         "warmup_episodes": 0, "iterations": 3, "restarts": 1}, ("image", "text"), 0,
    ),
    "filip": ({"token_width": 8, "contrast_clean_caption": True}, ("image", "text"), 0),
    "slip": ({"head_width": 16, "head_dim": 8}, ("image", "text"), 4),
    "declip": ({"simsiam_width": 16, "queue_size": 64}, ("image",), 5),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains_on_stored_features(name, tmp_path):
    fields, towers, views = OBJECTIVES[name]
    base = config(("data.features.views", str(views)))
    base["objective"] = {"name": name, **fields}
    base["tokenizer"] |= {"mask": True}
    base["data"] |= {"text_augment": {"operations": ("swap", "delete")}}
    base["optimizer"]["freeze"] = tuple(f"^{side}/(?!projection)" for side in towers)
    base["optimizer"].pop("rules", None)
    if not views:
        base["objective"]["augmentation"] = "center"
        runs.finish(base, tmp_path / "plain", jax.devices()[:1])
    base["data"] |= {"workers": 2 * (name == "siglip")}
    for side in towers:
        base[side] |= {"cache": True}
    runs.finish(base, tmp_path / "cached")
    if views:
        assert np.isfinite(losses(tmp_path / "cached")).all()
    else:
        a, b = (losses(tmp_path / kind) for kind in ("plain", "cached"))
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
