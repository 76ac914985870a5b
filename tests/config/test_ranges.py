"""Every number that a config may set has a range, declared beside its field and kept by `bind`."""

import dataclasses
import importlib
import pkgutil
import typing
from typing import Annotated, Any

import pytest

from clipx.config import ranges
from clipx.config.binding import bind, check, fields, find, types_of
from clipx.data.base import Source
from clipx.data.config import DataConfig
from clipx.data.text.tokenizers import TokenizerConfig
from clipx.errors import ConfigError
from clipx.evaluators.base import Evaluator
from clipx.evaluators.knn import Knn
from clipx.models.base import Tower
from clipx.models.text import TextTransformer
from clipx.models.vit import ViT
from clipx.objectives.base import Objective
from clipx.objectives.clip import CLIP
from clipx.objectives.clip_lite import CLIPLite
from clipx.objectives.protoclip import ProtoCLIP
from clipx.objectives.siglip import SigLIP
from clipx.ops.photometry import Policy
from clipx.parallel.mesh import MeshConfig
from clipx.training.optimizer import OptimizerConfig
from clipx.training.schema import Config, EvalConfig, TrainConfig

PACKAGES = {
    "data.sources": Source,
    "evaluators": Evaluator,
    "models": Tower,
    "objectives": Objective,
}
# fields that hold open data or whole towers, and that no config sets
GIVEN = {"examples", "train_examples", "pictures", "image", "text", "locked"}


def hints(cls: type) -> dict[str, Any]:
    """The types of the keys of a section, with their ranges."""
    declared = types_of(cls)
    given = GIVEN if {Objective, Evaluator} & set(cls.__mro__) else ()
    return {name: declared[name] for name in fields(cls) if name not in given}


def parts(hint: Any):
    """The hint and the types inside it; a number with a range counts as a whole."""
    if typing.get_origin(hint) is Annotated:
        rules = ranges.rules(hint)
        if any(isinstance(rule, ranges.Range) for rule in rules):
            return
        hint = hint.__origin__
    yield hint
    for inner in typing.get_args(hint):
        if typing.get_origin(hint) is not typing.Literal and inner is not Ellipsis:
            yield from parts(inner)


def sections() -> list[type]:
    """Every class that a part of a config is bound to."""
    found: dict[type, None] = dict.fromkeys((Config, DataConfig, EvalConfig))
    for package, base in PACKAGES.items():
        for file in pkgutil.iter_modules(importlib.import_module(f"clipx.{package}").__path__):
            module = importlib.import_module(f"clipx.{package}.{file.name}")
            own = [value for value in vars(module).values() if isinstance(value, type)]
            if any(
                base in value.__mro__[1:] and value.__module__ == module.__name__ for value in own
            ):
                found[find(package, file.name, base)] = None
    waiting = list(found)
    while waiting:
        inner = [part for hint in hints(waiting.pop()).values() for part in parts(hint)]
        new = [p for p in inner if dataclasses.is_dataclass(p) and p not in found]
        found |= dict.fromkeys(new)
        waiting += new
    return list(found)


SECTIONS = sections()


@pytest.mark.parametrize("cls", SECTIONS, ids=lambda cls: cls.__name__)
def test_every_number_has_a_range(cls):
    bare = [name for name, hint in hints(cls).items() if {int, float, complex} & set(parts(hint))]
    assert not bare, f"{cls.__name__}: declare a range of clipx/config/ranges.py for {bare}"
    defaults = {
        field.name: field.default
        for field in fields(cls).values()
        if field.name in hints(cls) and field.default is not dataclasses.MISSING
    }
    check(cls, defaults, given=set(fields(cls)) - set(defaults))


def test_all_sections_are_found():
    names = {cls.__name__ for cls in SECTIONS}
    assert names >= {
        *("Config", "TrainConfig", "DataConfig", "OptimizerConfig", "Rule", "LookaheadConfig"),
        *("MeshConfig", "EvalConfig", "TokenizerConfig", "TextAugmentConfig", "Policy", "Compat"),
        *("ViT", "ResNet", "TextTransformer", "BERT", "SLIP", "ProtoCLIP", "Shapes", "Mixture"),
        *("Knn", "LinearProbe", "ZeroShot", "Retrieval", "Grounding", "Bias", "Voc"),
    }


def test_a_field_without_a_range_is_seen():
    @dataclasses.dataclass
    class Section:
        size: int | None = None
        pair: tuple[ranges.Share, float] = (1.0, 1.0)
        table: dict[str, float] = dataclasses.field(default_factory=dict)
        named: typing.Literal[1, 2] = 1
        good: Annotated[tuple[ranges.Share, ranges.Share], ranges.Ordered()] | None = None

    numbers = {name: {int, float} & set(parts(hint)) for name, hint in hints(Section).items()}
    assert numbers == {
        "size": {int},
        "pair": {float},
        "table": {float},
        "named": set(),
        "good": set(),
    }


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    "cls, key, value, expected",
    [
        (TrainConfig, "batch_size", 0, "at least 1"),
        (TrainConfig, "batch_size", 2**31, "at most 16,777,216"),
        (TrainConfig, "microbatches", 0, "at least 1"),
        (TrainConfig, "total_steps", -1, "at least 0"),
        (TrainConfig, "total_steps", 2**31, "at most 2,147,483,647"),
        (TrainConfig, "total_epochs", NAN, "at least 0"),
        (TrainConfig, "total_epochs", INF, "at most 1,000,000"),
        (TrainConfig, "total_examples", 2**63, "at most 9,223,372,036,854,775,807"),
        (TrainConfig, "keep", 10**400, "at most 2,147,483,647"),
        (Config, "seed", -1, "at least 0"),
        (Config, "seed", 2**32, "at most 4,294,967,295"),
        (EvalConfig, "limit", 0, "at least 1"),
        (DataConfig, "workers", -1, "at least 0"),
        (DataConfig, "workers", 100_000, "at most 1,024"),
        (DataConfig, "fraction", 0, "more than 0 and at most 1"),
        (DataConfig, "max_bad_fraction", 5, "from 0 to 1"),
        (OptimizerConfig, "learning_rate", INF, "at most 1,000"),
        (OptimizerConfig, "learning_rate", -1e-9, "at least 0"),
        (OptimizerConfig, "warmup_from", 1e30, "at most 1,000"),
        (OptimizerConfig, "weight_decay", -0.1, "at least 0"),
        (OptimizerConfig, "weight_decay", NAN, "at least 0"),
        (OptimizerConfig, "eps", 0.0, "more than 0"),
        (OptimizerConfig, "eps", 1e-300, "at least 1e-30"),
        (OptimizerConfig, "b1", 1.0, "at least 0 and less than 1"),
        (MeshConfig, "data", 0, "-1, or at least 1"),
        (MeshConfig, "data", 2**40, "at most 1,048,576"),
        (TokenizerConfig, "context", 2, "at least 3"),
        (ViT, "depth", 0, "at least 1"),
        (ViT, "depth", 10**6, "at most 1,000"),
        (ViT, "dropout", 1.0, "at least 0 and less than 1"),
        (ViT, "norm_eps", INF, "more than 0 and at most 1"),
        (TextTransformer, "mlp_ratio", -4.0, "more than 0 and at most 100"),
        (CLIP, "crop_scale", (1.0, 0.1), "the smaller number first"),
        (CLIP, "crop_scale", (0.5, 2.0), "more than 0 and at most 1"),
        (CLIP, "crop_scale", (0.0, 0.5), "more than 0 and at most 1"),
        (CLIP, "std", (0, 0, 0), "from 0.001 to 1"),
        (CLIP, "std", (58.4, 57.1, 57.4), "from 0.001 to 1"),
        (CLIP, "mean", (NAN, 0.5, 0.5), "from 0 to 1"),
        (CLIP, "logit_scale_init", INF, "from -20 to 20"),
        (SigLIP, "logit_bias_init", -1e9, "at least -1,000"),
        (CLIPLite, "prior_weight", -0.5, "at least 0 and less than 1"),
        (ProtoCLIP, "target_temperature", 1e-40, "0, or at least 0.0001"),
        (Policy, "jitter", 5, "from 0 to 1"),
        (Policy, "blur_sigma", (2.0, 0.1), "the smaller number first"),
        (Knn, "neighbours", (20, 0), "at least 1"),
    ],
)  # fmt: skip
def test_a_number_outside_its_range_is_refused(cls, key, value, expected):
    with pytest.raises(ConfigError) as error:
        check(cls, {key: value}, where="config", given=set(fields(cls)) - {key})
    assert error.value.where.split("[")[0] == f"config.{key}"
    assert error.value.expected == expected
    assert len(str(error.value).splitlines()) == 3


def test_numbers_that_a_config_file_builds_itself():
    """A section may be a dataclass already."""
    with pytest.raises(ConfigError, match=r"config.augmentation.jitter"):
        bind(CLIP, {"augmentation": Policy(jitter=5.0)}, image=None, text=None)


def test_a_range_says_what_it_holds():
    said = {
        ranges.Range(0, 1): "from 0 to 1",
        ranges.Range(0, 1, above=True): "more than 0 and at most 1",
        ranges.Range(1, ranges.INT): "at least 1",
        ranges.Range(ranges.TINY, ranges.HUGE): "more than 0",
        ranges.Range(-ranges.HUGE, ranges.HUGE): "a number",
        ranges.Range(1, 8, also=(-1,)): "-1, or from 1 to 8",
    }
    assert {rule: str(rule) for rule in said} == said
    assert all(NAN not in rule and INF not in rule and -INF not in rule for rule in said)
