from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from clipx.config.binding import bind
from clipx.data.pictures import Pictures
from clipx.errors import ConfigError, DataError
from clipx.evaluators.bias import Bias, direction, without
from clipx.types import Encoded

# The first axis is the direction of the words, the second the direction of the prompts.
WORDS = {"he": [3, 1, 0], "she": [-3, 1, 0], "king": [2, 0, 5], "queen": [-2, 0, 5]}
PROMPTS = {"a chef": [0.6, 0.8, 0], "a tree": [0, 0, 2]}
COLOURS = {"a": [(40, 30, 0), (30, 40, 0), (0, 50, 0)], "b": [(0, 0, 70), (0, 80, 60)]}


class Encode:
    """The `raw` embedding of a picture is its colour."""

    def image(self, pictures, fields=()):
        assert fields == ("raw",)
        return Encoded(raw=np.round(pictures.mean((1, 2))))

    def text(self, texts, fields=()):
        assert fields == ("raw",)
        return Encoded(raw=np.array([(WORDS | PROMPTS)[t] for t in texts], np.float32))


@pytest.fixture
def section(tmp_path):
    """The config section of a folder with one-colour pictures and their annotations."""
    entries = []
    for group, colours in COLOURS.items():
        (tmp_path / "train" / group).mkdir(parents=True)
        for i, colour in enumerate(colours):
            entries.append({"image": f"{group}/{i}.png", "group": group})
            Image.new("RGB", (12, 8), colour).save(tmp_path / "train" / entries[-1]["image"])
    (tmp_path / "groups.json").write_text(json.dumps(entries))
    return {
        "path": str(tmp_path / "train"),
        "annotations": str(tmp_path / "groups.json"),
        "prompts": list(PROMPTS),
        "words_a": ["he", "king"],
        "words_b": ["she", "queen"],
        "top": 2,
    }


def test_equals_the_numbers_by_hand(section):
    found = bind(Bias, section, pictures=Pictures(8))(Encode())
    expected = {
        # cosines of a: (40, 30) 0.96, (30, 40) 1, (0, 50) 0.8; of b: 0 and 0.8 x 0.8
        "a chef/a_before": (1 + 0.96) / 2,
        "a chef/b_before": (0 + 0.64) / 2,
        # without the first axis all pictures of a are (0, 1, 0), and those of b are unchanged
        "a chef/a_after": 0.8,
        "a chef/b_after": (0 + 0.64) / 2,
        "a tree/a_before": 0,
        "a tree/b_before": (1 + 0.6) / 2,
        "a tree/a_after": 0,
        "a tree/b_after": (1 + 0.6) / 2,
        "gap_before": (0.98 - 0.32 + 0.8) / 2,
        "gap_after": (0.8 - 0.32 + 0.8) / 2,
    }
    assert found == pytest.approx(expected, abs=1e-6)


def test_the_direction_is_the_first_component_of_both_ends_of_every_pair():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 6, 9)) * np.linspace(3, 1, 9)
    centre = (a + b) / 2
    stacked = np.concatenate([a - centre, b - centre])
    assert np.abs(stacked.mean(0)).max() < 1e-12
    values, vectors = np.linalg.eigh(stacked.T @ stacked)
    found = direction(a, b)
    assert abs(found @ vectors[:, -1]) == pytest.approx(1)
    edited = without(rng.normal(size=(4, 9)), 3 * found)  # for any length of the direction
    np.testing.assert_allclose(edited @ found, 0, atol=1e-12)


@pytest.mark.parametrize(
    "text, said",
    [
        (None, "No such file"),
        ("[{", "not JSON"),
        ("{}", "not a list"),
        ('[{"image": "a/0.png"}]', "entry 0 of"),
        ('[{"image": "a/0.png", "group": "men"}]', "group 'men' of 'a/0.png'"),
        ('[{"image": "a/0.png", "group": "a"}]', "no picture of group 'b'"),
    ],
)
def test_wrong_annotations(section, tmp_path, text, said):
    file = tmp_path / "groups.json"
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(ConfigError) as error:
        bind(Bias, section, pictures=Pictures(8))
    assert said in str(error.value)


def test_a_missing_folder_or_picture_is_named(section, tmp_path):
    (tmp_path / "train/a/0.png").unlink()
    with pytest.raises(DataError, match="a/0.png"):
        bind(Bias, section, pictures=Pictures(8))(Encode())
    with pytest.raises(ConfigError, match="the folder of the pictures"):
        bind(Bias, section | {"path": str(tmp_path / "val")}, pictures=Pictures(8))


@pytest.mark.parametrize(
    "key, value, where",
    [
        ("top", 0, "top"),
        ("batch_size", 0, "batch_size"),
        ("prompts", [], "prompts"),
        ("words_a", ["he"], "words_b"),
        ("words_a", ["he", "queen"], "words_b"),
    ],
)
def test_config_errors_come_before_any_file_is_read(section, key, value, where):
    with pytest.raises(ConfigError, match=f"bias.{where}"):
        section |= {"path": "no/such", key: value}
        bind(Bias, section, where="bias", pictures=None)


def test_the_default_words_are_pairs():
    bind(Bias, {"path": "p", "annotations": "a", "prompts": ["a"]}, pictures=None)
