"""What a newcomer types: a length in another unit, keys of other codebases, --help."""

import dataclasses
import re

import pytest
from support import commands

from clipx import cli
from clipx.config import durations, reference, unknown
from clipx.config.files import override_all
from clipx.errors import ConfigError, UnknownKeys
from clipx.training.optimizer import OptimizerConfig
from clipx.training.reference import keys
from clipx.training.run import checked
from clipx.training.schedule import make_schedule

LENGTHS = {"train.total": ("15", "3", "900"), "optimizer.warmup": ("1.5", "2", "300")}


@pytest.mark.parametrize("name", LENGTHS)
def test_a_length_on_the_command_line_clears_the_others(name):
    """`clip:small` is 15 epochs long: another unit takes one flag."""
    section, _, key = name.partition(".")
    epochs, steps, examples = LENGTHS[name]
    for unit, text in {"epochs": epochs, "steps": steps, "examples": examples}.items():
        config = cli.load_config("clip:small", [(f"{name}_{unit}", text)])
        set_ = {u: config[section].get(f"{key}_{u}") for u in durations.UNITS}
        assert set_ == {**dict.fromkeys(durations.UNITS), unit: float(text)}
        assert durations.duration(config[section], key, where=section).unit == unit


def test_two_lengths_on_the_command_line_are_refused():
    both = [("train.total_steps", "3"), ("train.total_epochs", "2")]
    config = cli.load_config("clip:small", both)
    with pytest.raises(ConfigError, match="total_steps=3, total_epochs=2"):
        durations.duration(config["train"], "total", where="config.train")
    config = cli.load_config("clip:small", [("train.total_steps", "None")])
    assert config["train"]["total_epochs"] == 15  # None sets no length
    plain = {"train": "not a section"}
    with pytest.raises(ConfigError, match="a section"):
        override_all(plain, [("train.total_steps", "3")])


@pytest.mark.parametrize(
    ("unit", "amount", "most", "tenth"),
    [("steps", 50, "30", "3"), ("examples", 500, "300", "30"), ("epochs", 2.5, "1.5", "0.15")],
)
def test_a_warm_up_that_is_too_long_says_what_would_fit(unit, amount, most, tenth):
    """What it says works: 30 steps of 10 rows, 20 steps an epoch."""

    def schedule(value):
        config = OptimizerConfig(**{f"warmup_{unit}": value})
        return make_schedule(config, steps=30, batch_size=10, rows=200)

    with pytest.raises(ConfigError) as error:
        schedule(amount)
    where = f"config.optimizer.warmup_{unit}"
    assert (error.value.where, error.value.fix) == (where, f"{where}={tenth}")
    assert error.value.expected.endswith(f"30 steps, which is warmup_{unit}={most}")
    kind = float if unit == "epochs" else int
    schedule(kind(most)), schedule(kind(tenth))


def test_all_unknown_keys_are_told():
    overrides = {"lr": 1, "train.bs": 8, "optimizer.wieght_decay": 1, "image.widht": 8}
    overrides |= {"evals.retrieval.chnk": 8, "data.zzz": 1, "train.batch": 8}
    flags = [(path, str(value)) for path, value in overrides.items()]
    with pytest.raises(UnknownKeys) as error:
        checked(cli.load_config("quickstart", flags))
    fixes = {fault.where.removeprefix("config."): fault.fix for fault in error.value.errors}
    assert fixes == {
        "lr": "did you mean config.optimizer.learning_rate?",
        "train.bs": "did you mean 'batch_size'?",
        "train.batch": "did you mean 'batch_size'?",
        "optimizer.wieght_decay": "did you mean 'weight_decay'?",
        "image.widht": "did you mean 'width'?",
        "evals.retrieval.chnk": "did you mean 'chunk'?",
        "data.zzz": "",
    }
    text = str(error.value)
    assert len(text.splitlines()) == 4  # one block
    assert all(f"config.{key}" in text and fix in text for key, fix in fixes.items())


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("lr", "optimizer.learning_rate"),
        ("batch", "train.batch_size"),
        ("bs", "train.batch_size"),
        ("epochs", "train.total_epochs"),
        ("wd", "optimizer.weight_decay"),
        ("steps", "train.total_steps"),
    ],
)
def test_names_of_other_codebases(key, path):
    """Each names a key that exists, with which the config binds."""
    assert unknown.error(key, "config", ["data"], False).fix == f"did you mean config.{path}?"
    checked(cli.load_config("clip:small", [(path, "8")]))


def test_an_unknown_key_and_what_hides_others():
    """A key inside of a list cannot be taken out: what was found so far is told."""
    rules = [("optimizer.rules", "[{'pattern': '.*', 'clmap': 1}]"), ("epochs", "2")]
    with pytest.raises(UnknownKeys) as error:
        checked(cli.load_config("quickstart", rules))
    wheres = {fault.where for fault in error.value.errors}
    assert "config.optimizer.rules[0].clmap" in wheres
    assert fault_of({"epochs": 1}) == ["config.epochs"]


def fault_of(extra):
    with pytest.raises(UnknownKeys) as error:
        checked(cli.load_config("quickstart", []) | extra)
    return [fault.where for fault in error.value.errors]


def test_help_lists_the_keys_and_ends_with_0():
    done = commands.run("train", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("`python -m clipx.train") and "  --workdir=" in done.stdout
    (learning_rate,) = [line for line in lines if "optimizer.learning_rate" in line]
    assert learning_rate.split() == (
        ["--config.optimizer.learning_rate=0.0005", "at", "the", "end", "of", "the", "warm-up"]
    )
    of = commands.run("train", "--help", "--config=clip:small").stdout
    assert "--config.train.batch_size=128 " in of
    assert "--config.image.pool=" in of and "--config.evals.retrieval.chunk=256" in of
    only = commands.run("evaluate", "--help").stdout
    assert "--config.evals.NAME.limit" in only and "config.train" not in only


def test_a_wrong_flag_lists_the_commands_own():
    done = commands.run("evaluate", "--workdr=x")
    assert done.returncode == cli.EXIT_CONFIG
    expected = re.search("expected: (.+)", done.stderr)[1].split(", ")
    assert {"--workdir", "--init_from", "--evals"} <= set(expected)
    assert not any("config.x" in name for name in expected)


def test_every_key_that_all_configs_have_says_what_it_means():
    found = keys()
    assert len(found) > 80 and [key.path for key in found if not key.meaning] == []
    assert len({key.path for key in found}) == len(found)


def test_where_a_meaning_is_read():
    code = '''
class A:
    """Words.

    c: a number. d, e: two more: of them. Others are not named.
    """

    # above,
    # in two lines
    a: int = 1
    b: int = 2  # beside
    c: int = 3
    d: int = 4
    e: int = 5  # pyright: ignore[x]
    f: int = 6
'''
    assert reference.meanings(code, "A") == {
        "a": "above, in two lines",
        "b": "beside",
        "c": "a number",
        "d": "two more: of them",
        "e": "two more: of them",
        "f": "",
    }


def test_a_config_of_dataclasses_is_shown_in_few_words():
    assert all(len(key.value) <= 40 for key in keys(cli.load_config("declip", [])))
    assert dataclasses.is_dataclass(OptimizerConfig)
