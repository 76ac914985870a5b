"""Names of classes whose folders have WordNet ids, or a number before the name."""

from __future__ import annotations

import importlib.util

import pytest
from support.pictures import encode, photo

from clipx.data import class_ids
from clipx.data.evaluation import EvaluationSet
from clipx.data.sources.folder import Folder
from clipx.data.text.wordnet import WordNet
from clipx.errors import ConfigError
from clipx.evaluators.prompts import names
from clipx.evaluators.zero_shot import ZeroShot


def examples(root, *folders: str, **keys) -> EvaluationSet:
    for folder in folders:
        (root / folder).mkdir(parents=True)
        (root / folder / "x.png").write_bytes(encode(photo(8, 8), "PNG"))
    return EvaluationSet(Folder(str(root), **keys), 8)


def test_imagenets_list():
    listed = class_ids.imagenet()
    assert len(listed) == 1000 and list(listed) == sorted(listed)  # the labels are in this order
    assert (listed["n01440764"], listed["n15075141"]) == ("tench", "toilet paper")


@pytest.mark.skipif(not importlib.util.find_spec("open_clip"), reason="no open_clip installed")
def test_imagenets_list_is_open_clips():
    assert tuple(class_ids.imagenet().values()) == names("openai_imagenet", "classes", "x")


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (("n01440764", "n02123045"), ("tench", "tabby cat")),
        (("n02085620-Chihuahua", "n02088094-Afghan_hound"), ("Chihuahua", "Afghan hound")),
        (("001.Black_footed_Albatross", "002.Crow"), ("Black footed Albatross", "Crow")),
        (("n02123045", "wild_dog"), ("tabby cat", "wild dog")),
        (("n012", "3.5_inch", "n014407641"), ("3.5 inch", "n012", "n014407641")),
    ],
)
def test_names_of_folders(tmp_path, folders, expected):
    data = examples(tmp_path, *folders)
    assert data.classes == expected
    assert ZeroShot(data).notes()[0].endswith(f"'a photo of a {expected[-1]}.'")


def test_an_id_outside_imagenet_is_named_by_wordnet_or_refused(tmp_path, monkeypatch):
    class Words(WordNet):
        def __init__(self):
            pass

        def _synset(self, offset: int, part: str) -> list[str]:
            return {1440764: ["tench"], 2084071: ["domestic_dog", "dog"]}[offset]

    monkeypatch.setattr(class_ids, "_wordnet", lambda: None)
    data = examples(tmp_path / "a", "n01440764", "n02084071")
    with pytest.raises(ConfigError, match="1 of 2 class names with a WordNet id, such as 'n02084"):
        ZeroShot(data)
    assert ZeroShot(data, ("a", "b")).notes()  # names of the config: what the fix says
    monkeypatch.setattr(class_ids, "_wordnet", Words)
    assert examples(tmp_path / "b", "n02084071", "n01440764").classes == ("tench", "domestic dog")
