"""Law 8: every config parses, binds, assembles and traces one step, and opens no data."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import ROOT, configs
from support.pixels import Examples

from clipx.config import files
from clipx.config.binding import bind, find
from clipx.evaluators.base import Evaluator
from clipx.training import schema
from clipx.training.assemble import bind_objective
from clipx.training.run import assemble
from clipx.training.schema import Config
from clipx.training.step import make_train_step
from clipx.types import Encoded

FOLDER = ROOT / "configs"
FILES = sorted(path for path in FOLDER.glob("*.py") if path.stem != "common")


SPECS = [f"{file.name}:{variant}".rstrip(":") for file in FILES for variant in files.variants(file)]


@pytest.fixture(autouse=True)
def closed(monkeypatch):
    def refuse(*_):
        raise AssertionError("a data source was opened")

    monkeypatch.setattr(schema.SourceSpec, "open", refuse)


TRACED = set()  # kinds of runs that this process has traced
FIRST = {f"{file.name}:{files.variants(file)[0]}".rstrip(":") for file in FILES}
MARKED_SPECS = [
    pytest.param(spec, marks=() if spec in FIRST else pytest.mark.slow) for spec in SPECS
]


def kind(run):
    """A key that is equal for runs whose steps consist of the same operations. It ignores names of
    sizes, and replaces each number by whether it is 0, because a 0 may turn a term off. Shapes that
    do not fit are caught by `assemble`, which traces the forward pass of every config."""
    text = re.sub(r"\b(variant|init_from|dtype) = '[^']*'", r"\1", repr(run.objective))
    text = re.sub(r"\d+(\.\d+)?(e-\d+)?", lambda number: str(float(number[0]) != 0), text)
    return text, run.config.train.microbatches


@pytest.mark.parametrize("spec", SPECS)
def test_binds(spec):
    bound = bind(Config, configs.load(f"{FOLDER}/{spec}"))
    objective, sections = bind_objective(bound)
    assert objective.image and sections["objective"]["name"]
    assert all(schema.EvalSpec.check(name, section) for name, section in bound.evals.items())


@pytest.mark.slow  # `test_traces` assembles the first variant of each file
@pytest.mark.parametrize("spec", SPECS)
def test_assembles(spec):
    run = assemble(configs.shrunk(f"{FOLDER}/{spec}"), jax.devices()[:1])
    assert run.state.params and run.complete["objective"]["name"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["clip", "siglip", "clip_lite", "declip", "protoclip"])
@pytest.mark.parametrize("variant", files.variants("pretrained"))
def test_assembles_for_each_method(variant, method):
    run = assemble(configs.shrunk(f"{FOLDER}/pretrained.py:{variant}", method), jax.devices()[:1])
    assert run.complete["objective"]["name"] == method


@pytest.mark.parametrize("spec", MARKED_SPECS)
def test_traces(spec):
    run = assemble(configs.shrunk(f"{FOLDER}/{spec}"), jax.devices())
    assert run.mesh.size == 8
    if kind(run) in TRACED:
        return
    TRACED.add(kind(run))
    step = make_train_step(
        run.objective,
        run.optimizer,
        seed=run.config.seed,
        microbatches=run.config.train.microbatches,
    )
    with jax.set_mesh(run.mesh):
        state, metrics = jax.eval_shape(step, run.state, run.batch)
    before, after = (
        jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (run.state, state)
    )
    assert before == after
    assert {"loss", "chance_loss", "grad_norm", "skipped"} <= set(metrics)
    assert all(x.shape == () for x in metrics.values())


@pytest.mark.parametrize(
    "spec", [s if s == "clip.py" else pytest.param(s, marks=pytest.mark.slow) for s in SPECS]
)
def test_devices_change_no_shape(spec):
    config = configs.shrunk(f"{FOLDER}/{spec}")
    one, eight = (assemble(config, jax.devices()[:n]) for n in (1, 8))
    assert (one.mesh.size, eight.mesh.size) == (1, 8)
    assert jax.tree.map(jnp.shape, one.state) == jax.tree.map(jnp.shape, eight.state)
    assert one.complete == eight.complete


@pytest.mark.slow  # `test_traces` does without the layers that are alike
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_assembles_in_full(file):
    run = assemble(configs.load(f"{file}:{files.variants(file)[0]}".rstrip(":")), jax.devices()[:1])
    assert jax.tree.leaves(run.state.params)


@pytest.mark.slow  # full-size towers
@pytest.mark.parametrize(
    "spec, count",
    [
        ("clip.py", 151_277_313),
        ("clip.py:rn50", 102_007_137),
        ("clip_lite.py:bert_2layers", 85_277_875),
    ],
)
def test_published_size(spec, count):
    """The parameter counts of OpenAI's and the authors' models."""
    run = assemble(configs.load(f"{FOLDER}/{spec}"), jax.devices()[:1])
    assert sum(x.size for x in jax.tree.leaves(run.state.params)) == count


class Alike:
    """Encodes every picture and text as the same row."""

    def image(self, pictures, fields=()):
        return Encoded(**{f: np.ones((len(pictures), 2), np.float32) for f in fields or ("unit",)})

    text = image

    def similarity(self, images, texts, query="image"):
        return images.unit @ texts.unit.T


@functools.cache
def metrics_of(name):
    """The names of the metrics that an evaluator returns for eight pictures."""
    examples = Examples(list(range(8)), classes=tuple("abcdefgh"))
    cls = find("evaluators", name, Evaluator)
    given = {"examples", "train_examples"} & {field.name for field in dataclasses.fields(cls)}
    return cls(**dict.fromkeys(given, examples))(Alike()).keys()


@pytest.mark.parametrize("spec", SPECS)
def test_evals_score_what_best_asks_for(spec):
    """`train.best` names an eval of the config and one of its metrics."""
    config = files.load(f"{FOLDER}/{spec}")
    if not config["train"]["best"]:
        return
    name, metric = config["train"]["best"].split("/")
    assert name in config["evals"]
    assert metric in metrics_of(config["evals"][name].get("evaluator", name))
