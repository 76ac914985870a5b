"""What a run says when it starts, of its weights, its vocabulary and its exports."""

import types

import jax
import pytest
from support.runs import small

from clipx.errors import ConfigError, DataError
from clipx.training import notes
from clipx.training.run import assemble
from clipx.training.session import open_session


@pytest.fixture(scope="module")
def run():
    return assemble(small(("objective.name", "siglip")), jax.devices()[:1])


def opened(run, *, pieces=None, vocab_size=300, path="", mask=False, extended=0):
    config = types.SimpleNamespace(
        tokenizer=types.SimpleNamespace(path=path, mask=mask),
        train=types.SimpleNamespace(extended_from=extended),
    )
    return types.SimpleNamespace(
        config=config,
        tokenizer=types.SimpleNamespace(pieces=pieces, vocab_size=vocab_size),
        state=types.SimpleNamespace(params={}),
        objective=run.objective,
    )


def test_fewer_pieces_than_asked_for(run):
    (line,) = notes.of_run(opened(run, pieces=120, vocab_size=301, mask=True), new=True)
    assert "120 pieces for a vocabulary of 300" in line
    assert "config.tokenizer.vocab_size=121 " in line
    for quiet in ({"pieces": 300}, {"pieces": None}, {"pieces": 9, "path": "a.model"}):
        assert notes.of_run(opened(run, **quiet), new=True) == []
    assert notes.of_run(opened(run, pieces=120), new=False) == []
    (line,) = notes.of_run(opened(run, pieces=120, extended=1500), new=False)
    assert line.startswith("extended at step 1,500")


def test_what_transformers_will_not_take(run):
    """What the line names is what SiglipModel takes."""
    given = types.SimpleNamespace(**vars(opened(run)) | {"state": run.state})
    (line,) = notes.of_run(given, new=True)
    for part in ("SiglipModel", "config.image.pool=attention", "config.text.pool=last"):
        assert part in line
    image = run.objective.image.clone(pool="attention", pre_norm=False, embed_dim=0)
    text = run.objective.text.clone(pool="last", causal=False, mask_padding=False)
    given.objective = types.SimpleNamespace(image=image, text=text)
    assert notes.of_run(given, new=True) == []


def test_what_is_loaded_new_and_resized(run):
    params = run.state.params
    assert notes.weights(run, {}, []) == []
    loaded = {"image": params["image"], "logit_scale": params["logit_scale"]}
    (line,) = notes.weights(run, loaded, ["image.position_embedding from 4 to 8"])
    count = sum(x.size for x in jax.tree.leaves(loaded))
    total = sum(x.size for x in jax.tree.leaves(params))
    assert f"{count:,} of {total:,} parameters loaded, {total - count:,} new" in line
    assert "text/token_embedding" in line and "logit_bias 1" in line and "image/" not in line
    assert line.endswith("resized: image.position_embedding from 4 to 8")


@pytest.mark.parametrize("wrong", [("data.size", "8"), ("evals.zero_shot.classes", "('a',)")])
def test_a_start_that_fails_leaves_no_checkpoints(wrong, tmp_path):
    with pytest.raises((ConfigError, DataError)):
        open_session(small(wrong), str(tmp_path / "run"), jax.devices()[:1])
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_source_names_its_key(tmp_path):
    """The training data, an eval's, and what is no tar."""
    table = tmp_path / "train.csv"
    table.write_text("image,caption\n" + "a.jpg,b\n" * 500)
    tar = {"source": "webdataset", "path": str(table)}
    with pytest.raises(DataError, match=r"^config\.data\.path: .*train.csv.*not a tar"):
        assemble(small() | {"data": tar}, jax.devices()[:1]).open_parts()
    none = tar | {"path": str(tmp_path / "x-*.tar")}
    for source in ("webdataset", "auto"):
        config = small() | {"data": none | {"source": source}}
        with pytest.raises(DataError, match=r"^config\.data\.path: .*no file matches"):
            open_session(config, str(tmp_path / "run"), jax.devices()[:1])
    evals = {"retrieval": {"data": none}}
    run = assemble(small(("train.best", "")) | {"evals": evals}, jax.devices()[:1])
    with pytest.raises(DataError, match=r"^config\.evals\.retrieval\.data\.path: "):
        run.evaluators()
