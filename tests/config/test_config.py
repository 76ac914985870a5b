"""A wrong config gives one readable block: where, what was found, what was expected, and a fix."""

import dataclasses
import os
import subprocess
import sys
from typing import Any, Literal

import jax
import pytest
from absl import flags
from absl.testing import flagsaver
from support import ROOT

from clipx import cli, train
from clipx.config import binding as configs
from clipx.config.binding import bind, check, find
from clipx.config.durations import duration
from clipx.config.files import load, override, parse
from clipx.errors import ConfigError
from clipx.models.base import Tower
from clipx.objectives.base import Objective
from clipx.training import schema
from clipx.training.run import assemble, with_data
from clipx.training.workdir import refuse_other_config, write_json

QUICKSTART = str(ROOT / "configs" / "quickstart.py")
CLIP_SMALL = str(ROOT / "configs" / "clip.py") + ":small"


def fault(call, *args, **kwargs) -> ConfigError:
    """The `ConfigError` that a call raises, checked for its printed lines."""
    with pytest.raises(ConfigError) as error:
        call(*args, **kwargs)
    lines = str(error.value).splitlines()
    assert lines[0] == f"config error at {error.value.where}"
    assert [line[:12] for line in lines if line.startswith("  found:")] == ["  found:    "]
    assert any(line.startswith("  expected: ") for line in lines)
    return error.value


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int
    name: Literal["adamw", "sgd"] = "adamw"

    def __post_init__(self):
        if self.size < 0:
            raise ConfigError("Inner.size", str(self.size), "at least 0")


@dataclasses.dataclass(frozen=True)
class Outer:
    rate: float = 1.0
    count: int | None = None
    flag: bool = False
    path: str | tuple[str, ...] = ""
    label: str = ""
    span: tuple[float, float] = (0.0, 1.0)
    inner: Inner | None = None
    inners: tuple[Inner, ...] = ()
    table: dict[str, int] = dataclasses.field(default_factory=dict)
    free: dict[str, Any] = dataclasses.field(default_factory=dict)


@pytest.mark.parametrize(
    "section, expected",
    [
        ({}, Outer()),
        ({"rate": 2}, Outer(rate=2.0)),
        ({"count": None}, Outer()),
        ({"count": 3}, Outer(count=3)),
        ({"path": ["a", "b"]}, Outer(path=("a", "b"))),
        ({"path": "a=b c"}, Outer(path="a=b c")),
        ({"span": [1, 2]}, Outer(span=(1.0, 2.0))),
        ({"inner": {"size": 1, "name": "sgd"}}, Outer(inner=Inner(1, "sgd"))),
        ({"inner": None}, Outer()),
        ({"inners": [{"size": 1}, {"size": 2}]}, Outer(inners=(Inner(1), Inner(2)))),
        ({"table": {"a": 1}}, Outer(table={"a": 1})),
        ({"free": {"a": [1, {"b": None}]}}, Outer(free={"a": (1, {"b": None})})),
    ],
)
def test_bind(section, expected):
    bound = bind(Outer, section)
    assert bound == expected
    assert isinstance(bound.rate, float)


@pytest.mark.parametrize(
    "section, where, found, expected, fix",
    [
        ({"rat": 1}, "rat", "unknown key 'rat'", "one of rate, count", "did you mean 'rate'?"),
        ({"zzz": 1}, "zzz", "unknown key 'zzz'", "one of rate, count", ""),
        ({"rate": "fast"}, "rate", "'fast' (str)", "float", ""),
        ({"rate": True}, "rate", "True (bool)", "float", ""),
        ({"rate": None}, "rate", "None", "float", ""),
        ({"count": 1.5}, "count", "1.5 (float)", "int | None", ""),
        ({"count": 1e4}, "count", "10000.0 (float)", "int | None", "c.count=10000"),
        ({"count": True}, "count", "True (bool)", "int | None", ""),
        ({"flag": 1}, "flag", "1 (int)", "true or false", ""),
        ({"flag": "yes"}, "flag", "'yes' (str)", "true or false", ""),
        ({"label": 2020}, "label", "2020 (int)", "str", """--c.label="'2020'\""""),
        ({"path": 2020}, "path", "2020 (int)", "str | tuple[str, ...]", """--c.path="'2020'\""""),
        ({"path": ["a", 1]}, "path[1]", "1 (int)", "str", "quote it"),
        ({"label": None}, "label", "None", "str", ""),
        ({"span": [1]}, "span", "(1,) (tuple)", "tuple[float, float]", ""),
        ({"span": [1, "b"]}, "span[1]", "'b' (str)", "float", ""),
        ({"span": 1}, "span", "1 (int)", "tuple[float, float]", ""),
        ({"inner": {"size": 1, "name": "adam"}}, "inner.name", "'adam'", "one of 'adamw', 'sgd'",
         "did you mean 'adamw'?"),
        ({"inner": {"size": 1, "name": 3}}, "inner.name", "3", "one of 'adamw', 'sgd'", ""),
        ({"inner": {"siz": 1}}, "inner.siz", "unknown key 'siz'", "size, name", "'size'"),
        ({"inner": {}}, "inner.size", "nothing", "int", "set c.inner.size"),
        ({"inner": {"size": -1}}, "inner.size", "-1", "at least 0", ""),
        ({"inner": 3}, "inner", "3 (int)", "Inner", ""),
        ({"inners": {"size": 1}}, "inners", "{'size': 1}", "tuple[", ""),
        ({"inners": [{"size": 1}, {"size": "x"}]}, "inners[1].size", "'x' (str)", "int", ""),
        ({"table": {"a": "x"}}, "table.a", "'x' (str)", "int", ""),
        ({"table": [1]}, "table", "(1,) (tuple)", "dict[str, int]", ""),
    ],
)  # fmt: skip
def test_wrong_sections(section, where, found, expected, fix):
    error = fault(bind, Outer, section, where="c")
    assert error.where == f"c.{where}"
    assert found in error.found and expected in error.expected
    assert fix in error.fix and bool(fix) == bool(error.fix)


def test_wrong_sections_and_keys_of_others():
    error = fault(bind, Outer, [1], where="c")
    assert (error.where, error.found) == ("c", "(1,)") and "a section with keys" in error.expected
    given = fault(bind, Inner, {"size": 1, "name": "sgd"}, where="c", name="adamw")
    assert given.where == "c.name" and "other sections" in given.fix
    beside = fault(check, Inner, {"size": 1, "worker": 1}, where="c", beside=("workers",))
    assert beside.expected == "one of size, name, workers" and "'workers'" in beside.fix


def test_the_block():
    """A printed error has its five lines in order."""
    error = ConfigError("config.a", "1", "2", "say 2", file="configs/a.py")
    assert str(error) == (
        "config error at config.a\n"
        "  file:     configs/a.py\n"
        "  found:    1\n"
        "  expected: 2\n"
        "  fix:      say 2"
    )


@pytest.mark.parametrize("package, base, near, name", [
    ("objectives", Objective, "siglip", "sigclip"),
    ("models", Tower, "vit", "vti"),
    ("data.sources", schema.Source, "webdataset", "webdatasets"),
    ("evaluators", schema.Evaluator, "retrieval", "retreival"),
])  # fmt: skip
def test_find(package, base, near, name):
    assert base in find(package, near, base).__mro__
    error = fault(find, package, name, base)
    assert error.found == repr(name) and error.fix == f"did you mean {near!r}?"
    known = error.expected.removeprefix("one of ").split(", ")
    assert near in known and not {"base", "layers", "pipeline", "tokenizers"} & set(known)
    for other in ("base", "", 3, None):
        fault(find, package, other, base)


def amounts(**given):
    return {f"total_{unit}": given.get(unit) for unit in ("steps", "epochs", "examples")}


def test_duration():
    def steps(rows=1000, **given):
        return duration(amounts(**given), "total", where="c").steps(batch_size=32, rows=rows)

    assert steps(steps=7) == 7
    assert steps(examples=100) == 3
    assert steps(epochs=1.5) == round(1.5 * 31)
    assert steps(epochs=1.5, rows=None) is None
    assert duration(amounts(), "total", where="c", optional=True) is None
    few = fault(steps, epochs=1, rows=31)
    assert few.where == "c.total_epochs" and "31 rows" in few.found and "32" in few.expected
    assert fault(steps, examples=31).where == "c.total_examples"
    many = fault(steps, examples=2**60)
    assert many.where == "c.total_examples" and "at most 2,147,483,647 steps" in many.expected


@pytest.mark.parametrize(
    "given, where, found",
    [
        ({}, "total_*", "none of them"),
        ({"steps": 1, "epochs": 2.0}, "total_*", "total_steps=1, total_epochs=2.0"),
        ({"steps": 1, "epochs": 2, "examples": 3}, "total_*", "total_examples=3"),
    ],
)
def test_wrong_durations(given, where, found):
    error = fault(duration, amounts(**given), "total", where="c")
    assert error.where == f"c.{where}" and found in error.found


@pytest.mark.parametrize(
    "text, value",
    [
        ("5", 5),
        ("-1", -1),
        ("1_000_000", 1_000_000),
        ("1e-3", 1e-3),
        ("None", None),
        ("true", True),
        ("False", False),
        ("'2020'", "2020"),
        ("", ""),
        ("a=b c", "a=b c"),
        ("data/{000..005}.tar", "data/{000..005}.tar"),
        ("a photo of a {}.", "a photo of a {}."),
        ("(0.5, 1)", [0.5, 1]),
        ("['a', 'b']", ["a", "b"]),
        ("{'data': -1}", {"data": -1}),
        ("{1, 2}", "{1, 2}"),
        ("{[]: 1}", "{[]: 1}"),
        ("...", "..."),
        ("1or2", "1or2"),
        ("2024-01-01", "2024-01-01"),
        ("0012", "0012"),
        ("(" * 300, "(" * 300),
    ],
)
def test_parse(text, value):
    found = parse(text)
    assert found == value and type(found) is type(value)


def test_override():
    config = {"train": {"batch_size": 8}, "name": "a", "off": None}
    override(config, "train.batch_size", "16")
    override(config, "optimizer.clip_norm", "None")
    override(config, "evals.zero_shot.data.source", "shapes")
    assert config["train"] == {"batch_size": 16}
    assert config["optimizer"] == {"clip_norm": None}
    assert config["evals"] == {"zero_shot": {"data": {"source": "shapes"}}}
    for path, where in (("name.x", "config.name"), ("off.x.y", "config.off"),
                        ("train.batch_size.x", "config.train.batch_size")):  # fmt: skip
        error = fault(override, config, path, "1")
        assert error.where == where and error.expected == "a section"


def test_load(tmp_path):
    file = tmp_path / "mine.py"
    (tmp_path / "neighbour.py").write_text("LIST = (1, (2, 3))")
    file.write_text(
        "import neighbour\nfrom ml_collections import ConfigDict\nVARIANTS = ('', 'big')\n"
        "def get_config(variant=''):\n"
        "    return ConfigDict({'a': {'b': neighbour.LIST}, 'variant': variant})\n"
    )
    assert load(str(file)) == {"a": {"b": [1, [2, 3]]}, "variant": ""}
    assert load(f"{file}:big")["variant"] == "big"
    assert "neighbour" not in sys.modules and str(tmp_path) not in sys.path


@pytest.mark.parametrize(
    "text, found, line",
    [
        ("def get_config(:\n", "SyntaxError", ""),
        ("import not_there\n", "No module named 'not_there'", ":1"),
        ("x = 1\ny = x + z\n", "NameError: name 'z'", ":2"),
        ("def get_config(variant=''):\n    return 1 / 0\n", "ZeroDivisionError", ":2"),
        ("def get_config():\n    return {}\n", "TypeError", ""),
        ("def get_config(variant=''):\n    pass\n", "get_config returns None", ""),
        ("get_config = {}\n", "no get_config", ""),
    ],
)
def test_wrong_files(tmp_path, text, found, line):
    file = tmp_path / "mine.py"
    file.write_text(text)
    error = fault(load, str(file))
    assert found in error.found and error.file == f"{file}{line}"


def test_wrong_file_names(tmp_path):
    (tmp_path / "mine.py").write_text("VARIANTS = ('', 'small')\ndef get_config(v=''): return {}")
    (tmp_path / "mine.json").write_text("{}")
    missing = fault(load, f"{tmp_path}/mien.py")
    assert "no file" in missing.found and f"'{tmp_path}/mine.py'" in missing.fix
    variant = fault(load, f"{tmp_path}/mine.py:smal")
    assert variant.found == "variant 'smal'" and "'small'" in variant.fix and variant.file
    assert "no .py file" in fault(load, f"{tmp_path}/mine.json").found
    fault(load, str(tmp_path))
    fault(load, "")


def test_values_of_the_chosen_method(tmp_path):
    """`methods` changes values for an objective; the command line changes both."""
    file = tmp_path / "mine.py"
    methods = {
        "clip": {"train": {"size": 2}},
        "siglip": {"train": {"size": 3}, "mesh": {"data": 1}},
    }
    config = {"objective": {"name": "clip"}, "train": {"size": 1, "steps": 9}, "methods": methods}
    file.write_text(f"def get_config(variant=''):\n    return {config}\n")
    assert load(str(file))["train"] == {"size": 2, "steps": 9}
    chosen = cli.load_config(str(file), [("objective.name", "siglip"), ("train.steps", "8")])
    assert chosen["train"] == {"size": 3, "steps": 8} and chosen["mesh"] == {"data": 1}
    assert chosen["objective"] == {"name": "siglip"} and "methods" not in chosen
    other = cli.load_config(str(file), [("objective.name", "filip")])
    assert other == {"objective": {"name": "filip"}, "train": {"size": 1, "steps": 9}}


@pytest.fixture
def closed(monkeypatch):
    """Fails a test that opens data."""

    def refuse(*_):
        raise AssertionError("a data source was opened")

    monkeypatch.setattr(schema.SourceSpec, "open", refuse)


def assembled(*overrides, spec=QUICKSTART, devices=1):
    """The run of a config; quickstart gets a second eval."""
    second = [("evals.retrieval.data.source", "shapes")] if spec == QUICKSTART else []
    pairs = [tuple(o.split("=", 1)) for o in overrides]
    config = cli.load_config(spec, [*second, *pairs])
    return assemble(config, jax.devices()[:devices])


def test_overrides_reach_every_field(closed):
    """Also fields that the config file leaves out, and None as a value."""
    run = assembled(
        "train.eval_every_steps=5",
        "train.total_steps=None",
        "train.total_epochs=2",
        "optimizer.clip_norm=None",
        "optimizer.warmup_steps=None",
        "optimizer.rules=[{'pattern': 'kernel$'}, {'pattern': '.*', 'weight_decay': 0}]",
        "mesh={'data': 1}",
        "evals.zero_shot.templates=['{}']",
        "evals.retrieval.limit=None",
        "data.reject_cjk=TRUE",
        "objective.crop_scale=(0.5, 1)",
    )
    config = run.config
    assert config.train.eval_every_steps == 5 and config.train.total_epochs == 2.0
    assert config.optimizer.clip_norm is None and len(config.optimizer.rules) == 2
    assert run.steps is None and run.data.reject_cjk is True
    assert run.objective.crop_scale == (0.5, 1.0)
    evals = {spec.name: spec for spec in run.evals}
    assert evals["zero_shot"].values["templates"] == ("{}",)
    assert evals["retrieval"].config.limit is None
    assert run.complete["optimizer"]["clip_norm"] is None
    assert assemble(run.complete, jax.devices()[:1]).complete == run.complete


@pytest.mark.parametrize(
    "overrides, where, said",
    [
        ("trian.batch_size=8", "trian", "'train'"),
        ("train.batchsize=8", "train.batchsize", "'batch_size'"),
        ("train.batch_size=many", "train.batch_size", "'many' (str)"),
        ("optimizer.rule=[]", "optimizer.rule", "'rules'"),
        ("optimizer.rules=[{'pattern':'.*','weight_deca':0}]", "optimizer.rules[0].weight_deca",
         "'weight_decay'"),
        ("optimizer.rules=[]", "optimizer.rules", "no rule for image/"),
        ("optimizer.rules=[{'pattern': 'bias$'}]", "optimizer.rules", "no rule for image/"),
        ("optimizer.rules=[{'pattern': '.*'}, {'pattern': 'bias$'}]", "optimizer.rules[1]",
         "only parameters of earlier rules"),
        ("optimizer.rules=[{'pattern': 'nothing'}, {'pattern': '.*'}]", "optimizer.rules[0]",
         "matches no parameter"),
        ("optimizer.clip_norm=-1", "optimizer.clip_norm", "more than 0"),
        ("optimizer.schedule=cosin", "optimizer.schedule", "'cosine'"),
        ("optimizer.warmup_steps=481", "optimizer.warmup_steps", "the run's 480 steps"),
        ("optimizer.warmup_epochs=1 optimizer.warmup_steps=50", "optimizer.warmup_*",
         "warmup_steps=50, warmup_epochs=1.0"),
        ("train.total_epochs=1 train.total_steps=480", "train.total_*",
         "total_steps=480, total_epochs=1.0"),
        ("train.total_steps=None", "train.total_*", "none of them"),
        ("train.best=zero_shto/top1", "train.best", "zero_shot, retrieval"),
        ("train.keep=0", "train.keep", "at least 1"),
        ("objective.name=clop", "objective.name", "'clip'"),
        ("objective.name=None", "objective.name", "clipx/objectives/"),
        ("objective.groupz=2", "objective.groupz", "'groups'"),
        ("objective.groups=two", "objective.groups", "'two' (str)"),
        ("objective.image=3", "objective.image", "other sections"),
        ("image.name=vitt", "image.name", "'vit'"),
        ("image.widht=8", "image.widht", "'width'"),
        ("image.image_size=50", "image.image_size", "set image_size=48"),
        ("image.variant=ViT-B32", "image.variant", "'ViT-B/32'"),
        ("image.heads=5", "image.heads", "divides the width"),
        ("text.pool=eos", "text.pool", "'eot'"),
        ("text.vocab_size=3", "text.vocab_size", "other sections"),
        ("text.heads=3", "text.heads", "divides the width"),
        ("image.embed_dim=64", "text.embed_dim", "config.text.embed_dim=64"),
        ("image.dtype=float64", "image.dtype", "JAX_ENABLE_X64=1"),
        ("data.source=sha\0pes", "data.source", "without null characters"),
        ("train.batch_size=1", "train.batch_size", "at least two rows"),
        ("objective.groups=3", "objective.groups", "divides the batch size"),
        ("objective.groups=128", "train.batch_size", "at least two rows"),
        ("tokenizer.name=clip", "tokenizer.name", "'clip_bpe'"),
        ("tokenizer.context=2", "tokenizer.context", "at least 3"),
        ("tokenizer.marks=start", "tokenizer.marks", "'both', 'end'"),
        ("tokenizer.cleaning=sigilp", "tokenizer.cleaning", "'siglip'"),
        ("data.source=shape", "data.source", "'shapes'"),
        ("data.split=tset", "data.split", "'test'"),
        ("data.workers=x", "data.workers", "'x' (str)"),
        ("data.caption=rnd", "data.caption", "'random'"),
        ("data.sizes=5", "data.sizes", "'size'"),
        ("evals.zero_shoot.data.source=shapes", "evals.zero_shoot.name", "'zero_shot'"),
        ("evals.retrieval.chunks=5", "evals.retrieval.chunks", "'chunk'"),
        ("evals.retrieval.chunk=0", "evals.retrieval.chunk", "at least 1"),
        ("evals.retrieval.data.source=shap", "evals.retrieval.data.source", "'shapes'"),
        ("evals.retrieval.data.splits=x", "evals.retrieval.data.splits", "'split'"),
        ("evals.zero_shot.templates=['a']", "evals.zero_shot.templates", "{}"),
        ("evals.other.evaluator=retrieval", "evals.other.data", "nothing"),
        ("evals=None", "evals", "None"),
        ("mesh.data=3", "mesh", "1 device(s)"),
        ("mesh.tensor=0", "mesh.tensor", "-1"),
        ("mesh.fdsp=1", "mesh.fdsp", "'fsdp'"),
        ("seed=abc", "seed", "'abc' (str)"),
    ],
)  # fmt: skip
def test_wrong_configs(closed, overrides, where, said):
    error = fault(assembled, *overrides.split(" ") if "_epochs=" in overrides else [overrides])
    assert error.where == f"config.{where}"
    assert said in str(error)
    assert len(str(error).splitlines()) <= 5


def test_a_bert_needs_a_start_mark(closed):
    text = "text={'name': 'bert', 'width': 32, 'depth': 1, 'heads': 2, 'embed_dim': 128}"
    assembled(text)
    error = fault(assembled, text, "tokenizer.marks=end")
    assert error.where == "config.tokenizer.marks" and "BERT" in error.expected
    assert error.fix == "config.tokenizer.marks=both"


def test_batches_that_do_not_divide(closed):
    devices = fault(assembled, "train.batch_size=100", devices=8)
    assert devices.where == "config.train.batch_size"
    assert "8 device(s) x 1 micro-batch(es) = 8" in devices.expected
    assert devices.fix == "config.train.batch_size=96"
    slices = fault(assembled, "train.batch_size=24", "train.microbatches=2", devices=8)
    assert "8 device(s) x 2 micro-batch(es) = 16" in slices.expected
    small = fault(assembled, "train.batch_size=3", devices=8)
    assert small.fix == "config.train.batch_size=8"
    # rows are sharded over data and fsdp, not over tensor
    assembled("train.batch_size=4", "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", devices=8)


def test_too_few_rows(closed):
    run = assembled(spec=CLIP_SMALL)
    assert run.steps is None
    error = fault(with_data, run, 100, None)
    assert error.where == "config.train.batch_size" and "100 rows" in error.found
    assert with_data(run, 300, None).steps == 30
    longer = assembled("optimizer.warmup_epochs=16", spec=CLIP_SMALL)
    error = fault(with_data, longer, 300, None)
    assert error.where == "config.optimizer.warmup_epochs" and "32 steps" in error.found


def test_difference(tmp_path):
    old = {"seed": 0, "mesh": {"data": 1}, "train": {"total_steps": 5, "keep": 2, "gone": 1}}
    new = {"seed": 0, "mesh": {"data": 8}, "train": {"total_steps": 6, "keep": 9, "new": [1]}}
    assert configs.difference(old, new) == [
        "config.mesh.data: 1 -> 8",
        "config.train.gone: 1 -> '(absent)'",
        "config.train.keep: 2 -> 9",
        "config.train.new: '(absent)' -> [1]",
        "config.train.total_steps: 5 -> 6",
    ]
    assert configs.difference(old, old) == []
    write_json(tmp_path / "config.json", old)
    error = fault(refuse_other_config, tmp_path, new)
    assert error.where == "--workdir" and "config.train.total_steps: 5 -> 6" in error.found
    assert "mesh" not in error.found and "keep" not in error.found
    refuse_other_config(tmp_path, {**old, "mesh": {"data": 4}})
    refuse_other_config(tmp_path, {**old, "train": {**old["train"], "later": 1}})


@pytest.fixture
def command(monkeypatch, capsys, tmp_path, closed):
    """Runs `python -m clipx.train` in this process; returns its exit code and stderr."""
    monkeypatch.setattr(cli, "start_processes", lambda overrides: None)
    monkeypatch.setattr(cli, "use_compile_cache", lambda: None)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["train", *arguments])
        with pytest.raises(SystemExit) as done:
            cli.run(train.main, required=("config", "workdir"))
        said = capsys.readouterr()
        assert said.out == "" and "Traceback" not in said.err
        return done.value.code, said.err.strip()

    with flagsaver.flagsaver():
        for name in ("config", "workdir"):
            flags.DEFINE_string(name, None, "")
        flags.DEFINE_bool("extend", False, "")
        yield call


def test_command(command, tmp_path):
    workdir = f"--workdir={tmp_path}/run"
    for arguments, where in (
        ((f"--config={QUICKSTART}", workdir, "--config.image.widht=8"), "config.image.widht"),
        ((f"--config={QUICKSTART}", workdir, "--config.train.total_epochs", "3",
          "--config.train.total_steps=3"), "config.train.total_*"),
        ((f"--config={QUICKSTART}x", workdir), "--config"),
        ((f"--config={QUICKSTART}",), "--workdir"),
        ((workdir,), "--config"),
        ((f"--config={QUICKSTART}", workdir, "extra"), "command line"),
        ((f"--config={QUICKSTART}", workdir, "--config.seed"), "--config.seed"),
    ):  # fmt: skip
        flags.FLAGS.unparse_flags()
        flags.FLAGS["config"].value = flags.FLAGS["workdir"].value = None
        code, said = command(*arguments)
        assert code == 2
        assert said.startswith(f"config error at {where}\n") and len(said.splitlines()) <= 5
    assert not (tmp_path / "run").exists()


def test_command_in_a_process_of_its_own(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "clipx.train", "--config=configs/clip.py:small",
         "--config.train.batchsize=3", f"--workdir={tmp_path}/run"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert lines[0] == "config error at config.train.batchsize"
    assert "  fix:      did you mean 'batch_size'?" in lines and len(lines) <= 5
    assert not (tmp_path / "run").exists()
