"""`config.init_from`: weights in every layout, on any mesh; what is refused, and how; and the
evaluation of models of other libraries."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.exports import CLASS, save
from support.runs import finish, small

from clipx.errors import ConfigError, MissingLibrary
from clipx.interop import huggingface, libraries, load, open_clip, tokenizer
from clipx.models.transformer import unstack_blocks
from clipx.serving.evaluation import evaluate, evaluate_file
from clipx.serving.export import Options, export
from clipx.training import pretrained
from clipx.training.initial import init
from clipx.training.run import assemble, restore, with_data

SCAN = [("image.scan", "true"), ("text.scan", "true")]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Paths by name: a run, one of its checkpoints, its exports, and a weights file."""
    folder = tmp_path_factory.mktemp("sources")
    found = {"workdir": save(folder / "run", small(CLASS, ("text.dropout", "0.0")))}
    for name in ("open_clip", "huggingface"):
        found[name] = folder / name
        export(found["workdir"], Options(name, found[name], verify=False))
    found["checkpoint"] = found["workdir"] / "checkpoints" / "3"
    found["file"] = found["open_clip"] / open_clip.WEIGHTS
    return found


def begin(path, *overrides):
    """(a run that starts from `path`, its state at step 0)."""
    run = assemble(small(CLASS, *overrides, ("init_from", str(path))))
    given = pretrained.open_tokenizer(str(path))
    run = with_data(run, 256, pretrained.tokenizer_for(run.config.tokenizer, given))
    return run, init(run)


def unstacked(state):
    """The towers and the scale, with one entry per block."""
    parts = {k: v for k, v in state.params.items() if k in ("image", "text", "logit_scale")}
    return unstack_blocks(jax.tree.map(np.asarray, parts))


@pytest.mark.parametrize(
    "source, more",
    [
        ("workdir", SCAN),
        ("checkpoint", [("mesh.fsdp", "8")]),
        ("open_clip", [("mesh.fsdp", "2"), ("mesh.tensor", "2"), *SCAN]),
        ("huggingface", []),
        ("file", [("mesh.data", "8")]),
    ],
)
def test_a_run_starts_from(source, more, sources):
    """The towers and the scale are equal to the bit, and sharded as the run's state."""
    run, state = begin(sources[source], *more)
    _, expected = restore(sources["workdir"], devices=jax.devices()[:1])
    jax.tree.map(np.testing.assert_array_equal, unstacked(state), unstacked(expected))
    assert state.step == 0
    jax.tree.map(lambda x, s: x.sharding == s.sharding or pytest.fail(), state, run.state)


def test_heads_are_new_and_a_tower_may_be(sources):
    """An objective with heads; the text tower and the scale are in `init_ignore`."""
    config = small(CLASS, ("init_from", str(sources["open_clip"])), ("text.depth", "2"))
    config["objective"] = {"name": "slip", "augmentation": "none", "ssl_augmentation": "none"}
    config["objective"] |= {"head_width": 12, "head_dim": 6, "logit_scale_init": 1.5}
    config["init_ignore"] = ["text", "logit_*", "mean", "std"]
    state = init(assemble(config))
    given = load.load(sources["open_clip"]).params["image"]
    found = unstack_blocks(jax.tree.map(np.asarray, state.params["image"]))
    jax.tree.map(np.testing.assert_array_equal, found, given)
    assert state.params["logit_scale"] == 1.5
    assert "block_1" in state.params["text"]["transformer"]
    heads = {k: x for k, x in state.params.items() if k not in ("image", "text", "logit_scale")}
    assert len(jax.tree.leaves(heads)) > 4


@pytest.mark.slow  # `test_a_run_starts_from` and the tests of the optimizer cover its parts
def test_fine_tuning(sources, tmp_path):
    """A frozen image tower, the file's own tokenizer and longer texts. A resumed run does not read
    the file again."""
    folder = shutil.copytree(sources["open_clip"], tmp_path / "model")
    more = [("optimizer.freeze", "('^image/',)"), ("optimizer.layer_decay", "0.75")]
    more += [("train.total_steps", "2"), ("optimizer.warmup_steps", "0"), ("train.best", "")]
    config = small(CLASS, *more, ("init_from", str(folder)), ("tokenizer.context", "24"))
    config["evals"] = {}
    finish(config, tmp_path / "run")
    run, state = restore(tmp_path / "run")
    given = load.load(folder)
    kept = unstack_blocks(jax.tree.map(np.asarray, state.params["image"]))
    jax.tree.map(np.testing.assert_array_equal, kept, given.params["image"])
    text = state.params["text"]
    assert np.any(text["ln_final"]["scale"] != given.params["text"]["ln_final"]["scale"])
    assert text["positional_embedding"].shape == (24, 32)
    assert (
        run.tokenizer.save()["payload"] == pretrained.open_tokenizer(str(folder)).save()["payload"]
    )
    shutil.rmtree(folder)
    finish(config, tmp_path / "run")


def listed(path, *overrides, tokenizer=None, ignore=()):
    """(the names of the refused differences, the caught error)."""
    config = small(CLASS, *overrides, ("init_from", str(path)))
    config["init_ignore"] = list(ignore)
    run = assemble(config)
    with pytest.raises(ConfigError) as caught:
        init(with_data(run, 256, tokenizer))
    assert caught.value.where == "config.init_from"
    return [line.strip().split(":")[0] for line in str(caught.value).splitlines()[2:-2]], caught


@pytest.mark.parametrize(
    "overrides, names",
    [
        ([("image.activation", "gelu_tanh")], ["image.activation"]),
        ([("text.norm_eps", "1e-6"), ("text.pool", "last")], ["text.norm_eps", "text.pool"]),
        ([("image.width", "48")], ["image.class_embedding", "image.ln_post"]),
        ([("text.depth", "2")], ["text.transformer"]),
        ([("objective.std", "(0.5, 0.5, 0.5)")], ["std"]),
        ([("objective.name", "siglip")], ["mean", "std", "logit_bias"]),
        ([("tokenizer.name", "clip_bpe"), ("tokenizer.vocab_size", "None")], ["tokenizer.name"]),
    ],
)
def test_what_differs_is_listed_and_refused(overrides, names, sources):
    found, caught = listed(sources["open_clip"], *overrides)
    assert set(names) <= set(found)
    assert f"config.init_ignore=({', '.join(map(repr, found))},)" in str(caught.value)


def test_another_tokenizer_is_refused(sources):
    """Another SentencePiece model of the same size, and another cleaning."""
    given = pretrained.open_tokenizer(str(sources["workdir"]))
    captions = ["one two three", "four five six seven"] * 40
    other = pretrained.tokenizers.build(given.config, captions)
    assert listed(sources["open_clip"], tokenizer=other)[0] == ["tokenizer"]
    cleaning = ("tokenizer.cleaning", "ascii")
    run = assemble(small(CLASS, cleaning))
    kept = pretrained.tokenizer_for(run.config.tokenizer, given)
    found, _ = listed(sources["open_clip"], cleaning, tokenizer=kept)
    assert found == ["tokenizer.cleaning"]


def changed(folder, tmp_path, **sections):
    """A copy of a folder with changed JSON files."""
    copy = shutil.copytree(folder, tmp_path / "changed")
    for name, values in sections.items():
        file = copy / f"{name}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return copy


def test_another_preprocessing_is_refused(sources, tmp_path):
    """A processor that squashes pictures differs from clipx's, and must be in `init_ignore`."""
    squash = {"size": {"height": 16, "width": 16}, "do_center_crop": False}
    folder = changed(sources["huggingface"], tmp_path, preprocessor_config=squash)
    assert listed(folder)[0] == ["preprocessing"]
    again = load.load(folder)
    assert again.resize == "squash"
    written = huggingface.HuggingFace().configs(again, "")
    assert written[huggingface.PREPROCESSOR]["size"] == squash["size"]


def test_one_line_for_what_cannot_be_read(sources, tmp_path, monkeypatch):
    def fails(path, match):
        with pytest.raises(ConfigError, match=match) as caught:
            begin(path)
        assert caught.value.where.startswith("config.init_from")

    fails(tmp_path / "nowhere", "nothing at")
    (tmp_path / "photo.safetensors").write_bytes(b"\xff\xd8\xff" * 99)
    fails(tmp_path / "photo.safetensors", "a complete safetensors file")
    whole = sources["file"].read_bytes()
    (tmp_path / "half").mkdir()
    shutil.copy(sources["open_clip"] / open_clip.CONFIG, tmp_path / "half")
    (tmp_path / "half" / open_clip.WEIGHTS).write_bytes(whole[: len(whole) // 2])
    fails(tmp_path / "half", "a complete safetensors file")
    bert = {"model_type": "bert"}
    fails(changed(sources["huggingface"], tmp_path, config=bert), "'clip' or 'siglip'")
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "foreign.safetensors")
    fails(tmp_path / "foreign.safetensors", "arrays of a CLIP model with open_clip's names")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    fails(tmp_path / "run", "no tokenizer.json|no config.json")
    shutil.copytree(sources["workdir"], tmp_path / "cut")
    (tmp_path / "cut" / "tokenizer.json").write_text('{"config": {"na')
    cut, given = (pretrained.open_tokenizer(str(x)) for x in (tmp_path / "cut", sources["workdir"]))
    assert cut.save() == given.save()  # of the checkpoint
    (tmp_path / "model.pt").write_bytes(b"x")

    def none(name):
        raise MissingLibrary(f"{name} is not installed")

    monkeypatch.setattr(libraries, "require", none)
    fails(tmp_path / "model.pt", "torch is not installed")


def test_a_file_in_half_precision_and_in_parts(sources, tmp_path):
    """A model in two files with an index, one bfloat16 and one float16."""
    import ml_dtypes

    folder = shutil.copytree(sources["huggingface"], tmp_path / "parts")
    arrays = load_file(folder / huggingface.WEIGHTS)
    (folder / huggingface.WEIGHTS).unlink()
    from safetensors.flax import save_file as save_bfloat16

    parts = {"a.safetensors": ml_dtypes.bfloat16, "b.safetensors": np.float16}
    index = {}
    for i, (name, dtype) in enumerate(parts.items()):
        own = {k: jax.numpy.asarray(arrays[k].astype(dtype)) for k in sorted(arrays)[i::2]}
        save_bfloat16(own, folder / name)
        index |= dict.fromkeys(own, name)
    (folder / (huggingface.WEIGHTS + ".index.json")).write_text(json.dumps({"weight_map": index}))
    found, expected = load.load(folder).flat, load.load(sources["huggingface"]).flat
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, rtol=1e-2, atol=1e-4)


def test_evaluation_of_an_export(sources, tmp_path, capsys):
    """An export gives the same numbers as the run."""
    config = json.loads((sources["workdir"] / "config.json").read_text())
    expected = evaluate(sources["workdir"], "latest", config)
    for name in ("open_clip", "huggingface"):
        found = evaluate_file(str(sources[name]), config["evals"])
        assert found == pytest.approx(expected, abs=1e-6)
        entry = sources[name] / "evaluation" / "shapes-test_zero_shot.json"
        assert json.loads(entry.read_text())["pretrained"] == name
    without = shutil.copytree(sources["huggingface"], tmp_path / "without")
    (without / tokenizer.CLIPX).unlink()
    found = evaluate_file(str(without), config["evals"])  # by the folder's own tokenizer.json
    assert found == pytest.approx(expected, abs=1e-6)
    (without / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="a tokenizer that clipx does not have"):
        evaluate_file(str(without), config["evals"])
