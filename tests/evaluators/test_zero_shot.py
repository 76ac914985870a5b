from __future__ import annotations

import dataclasses
import importlib.util

import numpy as np
import pytest

from clipx.config.binding import bind
from clipx.errors import ConfigError
from clipx.evaluators.zero_shot import ZeroShot
from clipx.types import Encoded


@dataclasses.dataclass
class Examples:
    """Each picture is one pixel whose value is its row."""

    labels: list
    classes: tuple[str, ...] = ()

    def __len__(self):
        return len(self.labels)

    def texts(self, row):
        return ()

    def label(self, row):
        return self.labels[row]

    def batches(self, size):
        pixels = np.arange(len(self), dtype=np.uint8)[:, None, None, None]
        pixels = np.broadcast_to(pixels, (len(self), 1, 1, 3))
        yield from (pixels[i : i + size] for i in range(0, len(self), size))


class Encode:
    """Looks rows up in two tables. They are unit embeddings, or with `tokens` one token each."""

    def __init__(self, images, texts, tokens=False):
        self.images, self.texts, self.tokens = np.asarray(images, np.float32), texts, tokens

    def _encoded(self, rows):
        rows = np.asarray(rows, np.float32)
        return Encoded(tokens=rows[:, None, :]) if self.tokens else Encoded(unit=rows)

    def image(self, pictures, fields=()):
        return self._encoded(self.images[pictures[:, 0, 0, 0]])

    def text(self, texts, fields=()):
        return self._encoded([self.texts[t] for t in texts])

    def similarity(self, images, texts):
        if self.tokens:
            return np.exp(np.einsum("inc,tmc->it", images.tokens, texts.tokens))
        return images.unit @ texts.unit.T


def unit(rng, *shape):
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_equals_the_definition(batch_size):
    rng = np.random.default_rng(0)
    names, templates = tuple("abcdefgh"), ("a {}.", "the {} {}", "{}")
    table = {t.replace("{}", c): unit(rng, 6) for t in templates for c in names}
    images, labels = unit(rng, 50, 6), rng.integers(0, 7, 50)  # class h has no picture
    scores = ZeroShot(Examples(list(labels), names), (), templates, batch_size, per_class=True)(
        Encode(images, table)
    )
    text = np.stack([np.mean([table[t.replace("{}", c)] for t in templates], 0) for c in names])
    order = np.argsort(-(images @ (text / np.linalg.norm(text, axis=1, keepdims=True)).T), axis=1)
    hit = order[:, 0] == labels
    assert scores["top1"] == pytest.approx(hit.mean())
    assert scores["top5"] == pytest.approx((order[:, :5] == labels[:, None]).any(1).mean())
    by_class = [hit[labels == c].mean() for c in range(7)]
    assert scores["mean_per_class"] == pytest.approx(np.mean(by_class))
    assert [scores[f"class/{c}"] for c in names[:7]] == pytest.approx(by_class)
    assert "class/h" not in scores


def test_a_method_without_one_unit_row_averages_the_scores_of_the_templates():
    rng = np.random.default_rng(1)
    names, templates = ("a", "b", "c"), ("{}", "my {}")
    table = {t.replace("{}", c): rng.normal(size=4) for t in templates for c in names}
    images, labels = rng.normal(size=(40, 4)), rng.integers(0, 3, 40)
    members = [np.stack([table[t.replace("{}", c)] for c in names]) for t in templates]
    expected = np.mean([np.exp(images @ m.T) for m in members], axis=0).argmax(1) == labels
    of_mean = np.exp(images @ np.mean(members, axis=0).T).argmax(1) == labels
    assert expected.mean() != of_mean.mean()  # else the test could not tell them apart
    scores = ZeroShot(Examples(list(labels), names), (), templates)(Encode(images, table, True))
    assert scores["top1"] == pytest.approx(expected.mean())
    assert "top5" not in scores


@pytest.mark.parametrize("value", [1.0, np.nan])
def test_a_collapsed_model_gets_exactly_chance(value):
    names = tuple("abcdefghij")
    table = {f"a photo of a {c}.": np.full(2, value) for c in names}
    scores = ZeroShot(Examples([0] * 9 + [3], names))(Encode(np.ones((10, 2)), table))
    assert (scores["top1"], scores["top5"]) == pytest.approx((0.1, 0.5))


def test_names_and_templates_from_files(tmp_path):
    (tmp_path / "names.txt").write_text("x\n\ny \n", encoding="utf-8")
    (tmp_path / "templates.txt").write_text("one {}\n", encoding="utf-8")
    section = {"classes": f"{tmp_path}/names.txt", "templates": f"{tmp_path}/templates.txt"}
    evaluator = bind(ZeroShot, section, examples=Examples([1, 0]))
    encode = Encode([[0, 1], [1, 0]], {"one x": [1, 0], "one y": [0, 1]})
    assert evaluator(encode)["top1"] == 1


def test_named_lists_are_read_without_importing_open_clip(tmp_path, monkeypatch):
    package = tmp_path / "open_clip"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    (package / "zero_shot_metadata.py").write_text(
        "IMAGENET_CLASSNAMES = ['x', 'y']\nOPENAI_IMAGENET_TEMPLATES = (lambda c: f'one {c}',)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    evaluator = ZeroShot(Examples([1, 0]), "openai_imagenet", "openai_imagenet")
    encode = Encode([[0, 1], [1, 0]], {"one x": [1, 0], "one y": [0, 1]})
    assert evaluator(encode)["top1"] == 1


def test_a_named_list_without_open_clip_names_the_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as error:
        ZeroShot(Examples([0]), templates="simple")
    assert "pip install open_clip_torch" in str(error.value)


PROMPTS = """# Prompts

## Other

```bash
classes = ['x']
```

## STL10

```bash
classes = [
    'airplane', 'bird', 'car', 'cat', 'deer', 'dog', 'horse', 'monkey', 'ship',
    'truck',
]

templates = [
    'a photo of a {}.',
    'a photo of the {}.',
]
```
"""
STL10 = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]


def test_a_preset_takes_names_and_templates_from_openais_file(tmp_path):
    (tmp_path / "prompts.md").write_text(PROMPTS)
    section = {"preset": "stl10", "lists": str(tmp_path / "prompts.md")}
    table = {
        f"a photo of {a} {n}.": np.eye(10)[i] for i, n in enumerate(STL10) for a in ("a", "the")
    }
    for examples in (Examples([3, 1]), Examples([3, 1], tuple("abcdefghij"))):
        evaluator = bind(ZeroShot, section, examples=examples)
        assert evaluator(Encode(np.eye(10)[[3, 1]], table))["top1"] == 1


def test_a_preset_takes_given_templates_and_the_sets_own_names():
    section = {"preset": "stl10", "templates": ["a photo of a {}.", "a photo of the {}."]}
    bind(ZeroShot, section, examples=None)  # the set's names are not known yet
    bind(ZeroShot, section, examples=Examples([0], tuple(STL10)))
    with pytest.raises(ConfigError) as error:
        bind(ZeroShot, section, examples=Examples([0], tuple(STL10[::-1])))
    assert "10 classes, SHA-1 " in str(error.value)
    assert "the 10 of stl10, SHA-1 fc8ba087863e" in str(error.value)


@pytest.mark.skipif(not importlib.util.find_spec("open_clip"), reason="no open_clip installed")
def test_imagenets_lists_are_open_clips():
    evaluator = ZeroShot(Examples([0], tuple(map(str, range(1000)))), preset="imagenet")
    assert len(evaluator._classes()) == 1000 and len(evaluator._templates()) == 80
    with pytest.raises(ConfigError, match="3 classes, SHA-1 .*\n.*the 1000 of imagenet"):
        ZeroShot(None, classes=("a", "b", "c"), preset="imagenet")


@pytest.mark.parametrize(
    "text, said",
    [
        ("nothing", "without a section of stl10"),
        ("## STL10\n```bash\nclasses = [f()]\n```\n", "without two lists under 'STL10'"),
        ("## STL10\n```bash\nclasses = ['x']\n```\n", "without two lists under 'STL10'"),
        (PROMPTS.replace("'bird'", "'fowl'"), "10 classes, SHA-1"),
        (None, "No such file"),
    ],
)
def test_a_file_that_is_not_openais(tmp_path, text, said):
    if text:
        (tmp_path / "x.md").write_text(text)
    with pytest.raises(ConfigError) as error:
        ZeroShot(None, preset="stl10", lists=str(tmp_path / "x.md"))
    assert said in str(error.value)


@pytest.mark.parametrize(
    "section, said",
    [
        ({"templates": ["a photo"]}, "'a photo'"),
        ({"templates": []}, "none"),
        ({"templates": "no/such.txt"}, "No such file"),
        ({"classes": "no/such.txt"}, "'no/such.txt'"),
        ({"batch_size": 0}, "0"),
        ({"template": ["{}"]}, "did you mean 'templates'?"),
        ({"preset": "cifar11"}, "did you mean 'cifar10'?"),
        ({"preset": "cifar10"}, "1 templates, SHA-1"),
        ({"lists": "prompts.md"}, "zero_shot.lists"),
    ],
)
def test_config_errors_come_before_any_example_is_read(section, said):
    with pytest.raises(ConfigError) as error:
        bind(ZeroShot, section, examples=None)
    assert said in str(error.value)


@pytest.mark.parametrize(
    "examples, classes, said",
    [
        (Examples([0, None], ("a", "b")), (), "row 1 without a label"),
        (Examples([0, 1], ("a", "b")), ("a", "b", "c"), "2, as many as the data set has"),
        (Examples([0, 2]), ("a", "b"), "row 1 with label 2"),
        (Examples([0]), (), "none, and the data set names none either"),
        (Examples([], ("a",)), (), "an empty data set"),
    ],
)
def test_errors_of_the_set(examples, classes, said):
    with pytest.raises(ConfigError) as error:
        ZeroShot(examples, classes)(Encode([], {}))
    assert said in str(error.value)
