"""A run whose text tower comes from others' files: it starts from them, and goes on without."""

import json
import shutil

import jax
import numpy as np
import pytest
from support import encoders, runs

from clipx.errors import ConfigError
from clipx.reporting import comparison
from clipx.training.initial import init
from clipx.training.run import assemble
from clipx.training.session import open_session

ONE = jax.devices()[:1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of transformers, and its weights in clipx's layout."""
    path = tmp_path_factory.mktemp("encoders") / "bert"
    params = encoders.write_bert(path, "bert", encoders.bert_tower("bert", depth=2))
    encoders.write_tokenizer(path, "bert")
    return path, params


def config(path, **typed):
    text = {"name": "auto", "init_from": str(path), "embed_dim": 16, "pool": "mean", **typed}
    return runs.small(("train.total_steps", "2"), *runs.NO_EVALS) | {
        "text": text,
        "tokenizer": {"name": "auto", "context": 12},
    }


def test_it_starts_from_the_files_and_goes_on_without(folder, tmp_path):
    path, params = shutil.copytree(folder[0], tmp_path / "bert"), folder[1]
    made = config(path)
    state = init(assemble(made))
    for name in ("token_embedding", "positional_embedding"):
        np.testing.assert_array_equal(state.params["text"][name], params[name])
    runs.finish(made, tmp_path / "run", ONE)
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (saved["text"]["name"], saved["text"]["depth"]) == ("bert", 2)
    assert saved["tokenizer"]["name"] == "huggingface"
    shutil.rmtree(path)
    session = open_session(made, str(tmp_path / "run"), ONE)
    assert session.run.objective.text.width == 32
    (tmp_path / "run" / "report.html").touch()
    assert comparison.finished(tmp_path / "run", made)
    with pytest.raises(ConfigError, match="nothing at"):
        open_session(made, str(tmp_path / "new"))


def test_what_is_typed_stands_or_is_refused(folder):
    path, params = folder
    one = init(assemble(config(path, depth=1)))
    kernel = params["block_0"]["mlp"]["fc"]["kernel"]
    np.testing.assert_array_equal(one.params["text"]["block_0"]["mlp"]["fc"]["kernel"], kernel)
    assert "block_1" not in one.params["text"]
    other = config(path, activation="relu", norm_eps=1e-5)
    with pytest.raises(ConfigError, match="(?s)text.activation.*text.norm_eps"):
        init(assemble(other))
    init(assemble(other | {"init_ignore": ("text.activation", "text.norm_eps")}))
    with pytest.raises(ConfigError, match="config.text.init_from"):
        assemble(config(""))
