"""Class names and templates as people keep them: files, other orders, and what is refused."""

from __future__ import annotations

import codecs
import dataclasses
import json

import pytest

from clipx.errors import ConfigError
from clipx.evaluators.zero_shot import ZeroShot, check_templates, ensemble

NAMES = ["tench", "wild goose", "bus"]


@dataclasses.dataclass
class Examples:
    classes: tuple[str, ...] = ()

    def __len__(self):
        return len(self.classes)


def fault(call) -> str:
    with pytest.raises(ConfigError) as error:
        call()
    return str(error.value)


@pytest.mark.parametrize(
    ("file", "data"),
    [
        ("x.json", json.dumps(NAMES, indent=1)),
        ("x.json", json.dumps(NAMES)),
        ("x.txt", json.dumps(NAMES)),
        ("x.json", json.dumps({"imagenet1k": NAMES})),
        ("x.json", json.dumps({"0": NAMES[0], "2": NAMES[2], "1": NAMES[1]})),
        ("x.json#own", json.dumps({"other": ["a"], "own": NAMES})),
        ("x.json", codecs.BOM_UTF8 + json.dumps(NAMES).encode()),
        ("x.txt", codecs.BOM_UTF8 + b"tench\nwild goose\nbus\n"),
        ("x.txt", "\r\n".join(NAMES)),
        ("x.txt", "\r".join(NAMES)),
        ("x.txt", "\n".join(NAMES).encode("utf-16")),
        ("a#b.txt", "\n".join(NAMES)),
    ],
)
def test_a_file_of_names(tmp_path, file, data):
    path = tmp_path / (file if file.startswith("a#") else file.partition("#")[0])
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    evaluator = ZeroShot(Examples(tuple("abc")), str(tmp_path / file))
    assert evaluator._class_names() == tuple(NAMES)
    assert evaluator.notes() == [
        "prompts of 3 classes x 1 template(s), such as 'a photo of a tench.', 'a photo of a wild "
        "goose.', 'a photo of a bus.'"
    ]


@pytest.mark.parametrize(
    ("file", "data", "said"),
    [
        ("x.json", "tench\nbus", "not JSON"),
        ("x.json", '["tench", 3]', "a list of strings"),
        ("x.json", "[]", "no entry"),
        ("x.json", json.dumps({"a": ["x"], "b": ["y"]}), "x.json#KEY"),
        ("x.json#bb", json.dumps({"aa": ["x"], "b": ["y"]}), "one of its lists: aa, b"),
        ("x.json#b", '["x"]', "leave #b out"),
        ("x.txt#b", "x", "leave #b out"),
        ("x.json", json.dumps({"dog_1": "a dog", "cat_1": "a cat"}), "data.names="),
        ("x.txt", "'tench',\n'bus',", "a plain name for each class"),
        ("x.txt", "bus\ntench\nbus", "'bus' as entry 0 and as entry 2"),
        ("x.txt", "n01440764 tench\nn02123045 tabby", "2 of 2 class names with a WordNet id"),
        ("x.txt", b"\xff\xfebad\x00\xd8", "not UTF-8 text"),
    ],
)
def test_a_file_that_is_no_list_of_names(tmp_path, file, data, said):
    path = tmp_path / file.partition("#")[0]
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    assert said in fault(lambda: ZeroShot(None, str(tmp_path / file)))


def test_imagenets_own_pairs_of_equal_names_pass():
    ZeroShot(None, ("missile", "missile", "sunglasses", "sunglasses"))


@pytest.mark.parametrize(
    ("own", "given", "expected"),
    [
        (("ant", "wild_cat", "dog"), ("dog", "ant", "wild cat"), ("ant", "wild cat", "dog")),
        (("ant", "cat", "dog"), ("Dog", "Ant", "Cat"), ("Ant", "Cat", "Dog")),
        (("church/indoor", "bar"), ("bar", "church indoor"), ("church indoor", "bar")),
        (("ant", "tabby cat"), ("an ant", "tabby"), ("an ant", "tabby")),
        (("0", "1", "10", *"23456789"), tuple("abcdefghijk"), tuple("abkcdefghij")),
        (("1", "10", *"23456789"), tuple("abcdefghij"), tuple("ajbcdefghi")),
    ],
)
def test_names_follow_the_labels(own, given, expected):
    evaluator = ZeroShot(Examples(own), given)
    assert evaluator._class_names() == expected
    assert expected[-1] in evaluator.notes()[0]


@pytest.mark.parametrize(
    ("own", "given", "said"),
    [
        (("ant", "cat", "dog"), ("dog", "ant", "lynx"), "'dog' for label 0"),
        (("ant", "cat"), ("ant", "cat", "dog"), "2, as many as the data set has classes: ant, cat"),
        (("ant", "bird", "ant"), (), "'ant' as entry 0 and as entry 2"),
        (tuple(map(str, range(11))), (), "11 of 11 class names that are numbers, such as '10'"),
        (("n01440764", "ant"), (), "ids outside ImageNet's 1,000 classes need WordNet"),
    ],
)
def test_names_that_cannot_be_the_sets(own, given, said):
    assert said in fault(lambda: ZeroShot(Examples(own), given))


def test_templates_of_clip_benchmark_and_of_open_clip_are_the_same(tmp_path):
    lists = {"cifar10": ["a photo of a {c}.", "{c}"], "dtd": ["{c} texture"]}
    (tmp_path / "templates.json").write_text(json.dumps(lists))
    (tmp_path / "braces.txt").write_text("{}")  # a template that is JSON by chance
    files = (f"{tmp_path}/templates.json#cifar10", f"{tmp_path}/braces.txt")
    read = [ZeroShot(None, templates=file)._templates for file in files]
    assert read == [("a photo of a {}.", "{}"), ("{}",)]
    asked: list[str] = []

    def encode(texts):
        asked.extend(texts)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        ensemble(encode, ["dog"], ["a {c}"], 4)
    assert asked == ["a dog"]


@pytest.mark.parametrize(
    ("template", "fixed"),
    [
        ("a photo of a %s.", "a photo of a {}."),
        ("a photo of a {classname}.", "a photo of a {}."),
        ("a photo of a {} in {place}.", "a photo of a {} in {}."),
        ("a <class>", "a {}"),
        ("a photo of a dog.", "a photo of a dog {}."),
    ],
)
def test_other_templates_are_refused_with_one_that_works(template, fixed):
    said = fault(lambda: ZeroShot(None, templates=(template,)))
    assert f"for example {fixed!r}" in said
    check_templates([fixed], "x")
