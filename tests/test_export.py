"""`clipx.export`: the files of a folder, the proof, and one line for what is refused."""

import functools
import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from support.exports import CAPTIONS, CLASS, save
from support.libraries import with_open_clip, with_transformers
from support.runs import small

from clipx.errors import CheckpointError, ConfigError, MissingLibrary, NotProven, RunError
from clipx.interop import card, libraries, load, open_clip, tokenizer, verify
from clipx.serving.export import Options, export
from clipx.training.run import restore


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A CLIP run of two small transformers with a class token."""
    return save(tmp_path_factory.mktemp("clip"), small(CLASS))


def test_a_folder_without_a_proof(workdir, tmp_path, monkeypatch):
    """Without the libraries the folder is written, and says that it is not verified."""

    def none(name):
        raise MissingLibrary(f"{name} is not installed")

    monkeypatch.setattr(libraries, "require", none)
    found = export(workdir, Options("open_clip", tmp_path / "a", license="mit"))
    assert found.proof is None
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {
        *("README.md", open_clip.CONFIG, open_clip.WEIGHTS),
        *("tokenizer.json", "tokenizer_config.json", tokenizer.CLIPX),
    }
    text = (tmp_path / "a" / "README.md").read_text()
    assert "Not verified: torch is not installed." in text
    assert "license: mit" in text and "96 (3 steps at batch 32)" in text
    assert "not verified: torch is not installed" in str(found)
    assert str(found).endswith(f"written to {tmp_path / 'a'}")
    _, state = restore(workdir)
    again = load.load(tmp_path / "a")
    np.testing.assert_array_equal(
        again.params["image"]["ln_post"]["scale"],
        np.asarray(state.params["image"]["ln_post"]["scale"]),
    )
    with pytest.raises(ConfigError, match="interop"):
        export(workdir, Options("open_clip", tmp_path / "b", verify=True))
    with pytest.raises(ConfigError, match="--pt.*\n.*torch is not installed"):
        export(workdir, Options("open_clip", tmp_path / "b", pt=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_a_refused_export_leaves_no_files(workdir, tmp_path, monkeypatch):
    """An existing folder, an unknown format, a failed proof, a full disk, a broken checkpoint."""

    def options(format_="huggingface", out="a", **more):
        return Options(format_, tmp_path / out, **more)

    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="there already"):
        export(workdir, options(out="there"))
    with pytest.raises(ConfigError, match="'tflite'"):
        export(workdir, options("tflite"))
    with pytest.raises(ConfigError, match="--format=onnx\n.*a format with a torch file"):
        export(workdir, options("onnx", pt=True))
    with pytest.raises(ConfigError, match=r"one of \[3\]"):
        export(workdir, options(step="2"))
    with pytest.raises(ConfigError, match="config.json"):
        export(tmp_path / "nowhere", options())
    monkeypatch.setattr(verify, "needs", lambda *_, **__: None)

    def refuse(*_):
        raise NotProven("the least cosine of a picture is 0.5")

    monkeypatch.setattr(verify, "prove", refuse)
    with pytest.raises(RunError, match="was not kept: the least cosine"):
        export(workdir, options())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(verify, "prove", full)
    with pytest.raises(RunError, match="No space left"):
        export(workdir, options())
    cut = shutil.copytree(workdir, tmp_path / "there" / "cut")
    for file in (cut / "checkpoints" / "3" / "state").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(CheckpointError, match="checkpoint 3 is damaged .* has 500 of its"):
        export(cut, options())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]


def test_a_format_that_cannot_hold_a_model_names_one_that_can(tmp_path):
    folder = save(tmp_path / "run", small())
    with pytest.raises(ConfigError, match="pools by the mean") as caught:
        export(folder, Options("huggingface", tmp_path / "a", verify=False))
    assert "--format=open_clip" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@with_transformers
def test_huggingface_proves_a_run(workdir, tmp_path):
    found = export(workdir, Options("huggingface", tmp_path / "a", verify=True)).proof
    assert found.logits < verify.RELATIVE
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["architectures"] == ["CLIPModel"]
    assert "Loaded by torch" in (tmp_path / "a" / "README.md").read_text()


def recipe(folder: pathlib.Path, monkeypatch) -> dict:
    """The names that the model card's own code defines, run in the card's folder."""
    text = (folder / "README.md").read_text()
    code, found = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[1], {}
    monkeypatch.chdir(folder)
    exec(code, found)
    return found


def test_the_cards_recipe_projects_as_protoclip_does(tmp_path, monkeypatch):
    config = small(CLASS, ("train.best", ""), ("objective.name", "protoclip"))
    config["objective"] = {"name": "protoclip", "augmentation": "none", "k": 5, "episode_size": 64}
    config["objective"] |= {"projection_dim": 6, "projection_hidden": 12}
    folder = save(tmp_path / "run", config)
    export(folder, Options("open_clip", tmp_path / "a", verify=False, with_heads=True))
    found = recipe(tmp_path / "a", monkeypatch)
    run, state = restore(folder, devices=jax.devices()[:1])
    rows = np.random.default_rng(0).normal(size=(2, 3, 16)).astype(np.float32)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    heads = functools.partial(run.objective.apply, method=lambda m, a, b: m.heads(a, b))
    own = jax.jit(heads)(variables, *rows)
    for side in (0, 1):
        np.testing.assert_allclose(found["project"](side, rows[side]), own[side], atol=1e-5)
    assert found["heads"]["memory/centroids/image"].shape == (5, 6)


BARE = [CLASS, ("image.embed_dim", "0"), ("text.embed_dim", "0"), ("train.best", "")]


@with_open_clip
@pytest.mark.parametrize("critic", ["dot", "concat"])
def test_the_cards_recipe_scores_as_the_run_does(critic, tmp_path, monkeypatch):
    """CLIP-Lite's towers are exported and proven. Its critic, written beside them and read by the
    card's own code, gives the objective's scores."""
    config = small(*BARE, ("text.width", "24"))
    config["objective"] = {"name": "clip_lite", "width": 40, "critic": critic}
    config["evals"] = {}
    config["optimizer"] = {"rules": [{"pattern": ".*"}]}  # one critic has no scale to bound
    folder = save(tmp_path / "run", config)
    # one proof is enough here: the tests of the formats test the proof
    proven = critic == "dot"
    export(folder, Options("open_clip", tmp_path / "a", verify=proven, with_heads=True))
    text = (tmp_path / "a" / "README.md").read_text()
    assert "by a head of its own" in text and "zeros fill them up to 32" in text
    score = recipe(tmp_path / "a", monkeypatch)["score"]
    run, state = restore(folder)
    pictures, captions = np.stack(verify.pictures(16)), CAPTIONS[:3]
    encode = run.encode(state)
    images, texts = encode.image(pictures), encode.text(captions)
    said = verify.ours(load.load(tmp_path / "a"), pictures, run.tokenizer(captions))
    scores = score(said.image, said.text)
    own = encode.similarity(images, texts)
    if critic == "dot":
        own = own * np.exp(load_file(card.HEADS)["params/image_text/logit_scale"])
    np.testing.assert_allclose(scores, own, rtol=2e-3, atol=2e-3)
