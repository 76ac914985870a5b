"""A damaged folder of another library is read, or refused in one block; nothing else."""

import dataclasses
import json
import random
import shutil

import pytest
from support.towers import BOTH, RESNET, VIT, few_words, model

from clipx.errors import ConfigError, DataError
from clipx.interop import huggingface, load, open_clip
from clipx.models.resnet import ResNet
from clipx.models.text import TextTransformer
from clipx.models.vit import ViT
from clipx.training import pretrained

VALUES = [None, 0, -1, 1, 3, 64, 999, 10**9, 2**40, 1e300, float("nan"), float("inf"), 1e-9, "x"]
VALUES += ["", "1", [], {}, [1, 2], [[1]], {"a": 1}, True, False, 0.5, "gelu"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    words, text = few_words()
    both, clip = TextTransformer(**text, **BOTH), huggingface.HuggingFace()
    bare = {"dtype": "float32", "embed_dim": 0}
    image = ViT(**VIT | {"pool": "attention", "pre_norm": False}, **bare)
    fields = text | {"causal": False, "pool": "last", "projection_bias": True}
    siglip = TextTransformer(**fields, **BOTH | {"embed_dim": 32})
    pieces = dataclasses.replace(words, kind="sentencepiece", plain=False)
    kinds = [
        (open_clip.OpenClip(), model(ViT(**VIT, **BOTH), both, words)),
        (open_clip.OpenClip(), model(ResNet(**RESNET, **BOTH), both, words)),
        (clip, model(ViT(**VIT, **BOTH), both, words)),
        (clip, model(image, siglip, pieces, bias=-4)),
    ]
    made = []
    for format_, written in kinds:
        folder = tmp_path_factory.mktemp("foreign")
        format_.write(written, folder, str(folder))
        made.append(folder)
    bpe = {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": {"a": 1}, "merges": ["a b"]}
    marks = [{"content": "<|endoftext|>", "id": 2}]
    (made[2] / "tokenizer.json").write_text(json.dumps({"model": bpe, "added_tokens": marks}))
    (made[2] / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    (made[3] / "tokenizer_config.json").write_text('{"model_max_length": 16}')
    return made


def paths(value, path=()):
    """Where the values of a JSON file are."""
    if isinstance(value, dict | list):
        for key, x in value.items() if isinstance(value, dict) else enumerate(value):
            yield (*path, key)
            yield from paths(x, (*path, key))


def mutate(rng, folder):
    """Changes one value of a JSON file, or the bytes of any file, or deletes it."""
    kind = rng.random()
    if kind < 0.75:
        file = rng.choice(sorted(folder.glob("*.json")))
        whole = json.loads(file.read_text())
        *path, last = rng.choice(list(paths(whole)))
        inner = whole
        for key in path:
            inner = inner[key]
        if rng.random() < 0.2:
            del inner[last]
        else:
            inner[last] = rng.choice(VALUES)
        file.write_text(json.dumps(whole))
        return
    file = rng.choice(sorted(folder.iterdir()))
    data = bytearray(file.read_bytes())
    if kind < 0.85:
        del data[rng.randrange(len(data)) :]
    elif kind < 0.97:
        data[rng.randrange(min(len(data), 2000))] = rng.randrange(256)
    file.write_bytes(data)
    if kind >= 0.97:
        file.unlink()


def outcomes(seeds, folders, tmp_path):
    """How many folders were read, and how many refused."""
    read = refused = 0
    for seed in seeds:
        rng, folder = random.Random(seed), tmp_path / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(rng.choice(folders), folder)
        mutate(rng, folder)
        try:
            load.load(folder)
            pretrained.open_tokenizer(str(folder))
            read += 1
        except (ConfigError, DataError) as error:
            assert len(str(error)) < 3000, seed
            refused += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
    return read, refused


def test_mutated_folders(folders, tmp_path):
    read, refused = outcomes(range(40), folders, tmp_path)
    assert min(read, refused) > 5


@pytest.mark.slow
def test_many_mutated_folders(folders, tmp_path):
    read, refused = outcomes(range(1000, 4000), folders, tmp_path)
    print(f"{read} folders read, {refused} refused")
    assert min(read, refused) > 300
