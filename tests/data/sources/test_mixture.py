"""A mixture has every row of its parts in proportion to their weights, with stable ids and keys."""

from __future__ import annotations

import collections
import concurrent.futures
import io
import pickle
import tarfile

import pytest

from clipx.data.sources.mixture import Mixture
from clipx.errors import BadSample, ConfigError, DataError


def shard(path, size: int, bad=()) -> str:
    with tarfile.open(path, "w") as tar:
        for i in range(size):
            for name, data in ((f"{i}.jpg", b"" if i in bad else b"x"), (f"{i}.txt", b"words")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(path)


def shapes(size: int, **more) -> dict:
    return {"source": "shapes", "size": size, "image_size": 16} | more


def message(call, error=DataError) -> str:
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize(
    ("parts", "places"),
    [
        ({"a": (7, 1.0), "b": (7, 1.0)}, {"a": 7, "b": 7}),
        ({"a": (5, 1.0), "b": (50, 1.0)}, {"a": 50, "b": 50}),
        ({"a": (7, 0.7), "b": (3, 0.3)}, {"a": 7, "b": 3}),  # exact, without float rounding
        ({"a": (7, 7), "b": (3, 3)}, {"a": 7, "b": 3}),
        ({"a": (10, 3.0), "b": (8, 1.0), "c": (5, 0.5)}, {"a": 30, "b": 10, "c": 5}),
        ({"a": (3, 1.0), "b": (4, 0.3)}, {"a": 14, "b": 4}),
        ({"only": (9, 0.01)}, {"only": 9}),
        ({"a": (7, None), "b": (3, None)}, {"a": 7, "b": 3}),
    ],
)
def test_rows_occur_in_proportion_to_the_weights_and_at_least_once(parts, places):
    data = Mixture({name: shapes(size, weight=w) for name, (size, w) in parts.items()})
    keys = list(data.keys())
    assert len(data) == len(keys) == sum(places.values())
    assert collections.Counter(key.split("/")[0] for key in keys) == places
    counts = collections.Counter(keys)
    assert len(counts) == sum(size for size, _ in parts.values())
    for name, (size, _) in parts.items():
        repeats = [count for key, count in counts.items() if key.startswith(f"{name}/")]
        assert len(repeats) == size and max(repeats) - min(repeats) <= 1
    examples = [data[i] for i in range(len(data))]
    assert [example.key for example in examples] == keys
    rows = {example.row: example.key for example in examples}
    assert sorted(rows) == list(range(len(counts))) and len(set(rows.values())) == len(rows)
    for row in (-1, len(data)):
        with pytest.raises(IndexError):
            data[row]


def test_rows_with_an_extra_repetition_are_spread_over_the_part():
    data = Mixture({"a": shapes(1, weight=0.1), "b": shapes(10, weight=1.5)})
    counts = collections.Counter(list(data.keys())[1:])
    assert [counts[key] for key in sorted(counts)] == [2, 1] * 5


def test_an_example_keeps_its_contents_and_is_named_after_its_part(tmp_path):
    path = shard(tmp_path / "x.tar", 3, bad=[1])
    data = Mixture({"web": {"source": "webdataset", "path": path}, "drawn": shapes(3)})
    assert data[2] == (b"x", ("words",), 2, "web/x.tar/2", None)
    assert (data[4].row, data[4].key) == (4, "drawn/shapes/train/000001")
    said = message(lambda: data[1], BadSample)
    assert said == "web/x.tar/1: the picture has no bytes"


def test_a_mixture_has_classes_if_all_parts_have_the_same(tmp_path):
    same = Mixture({"a": shapes(4, split="test"), "b": shapes(4, split="test")})
    assert len(same.classes) == 96 and same[5].label is not None
    web = {"source": "webdataset", "path": shard(tmp_path / "x.tar", 4)}
    other = Mixture({"a": shapes(4, split="test"), "b": web})
    assert other.classes == () and other[0].label is None


def test_a_mixture_of_mixtures_works():
    inner = {"source": "mixture", "parts": {"a": shapes(1), "b": shapes(2)}, "weight": 1}
    data = Mixture({"in": inner, "out": shapes(8, weight=1)})
    examples = [data[i] for i in range(len(data))]
    assert len(data) == 16 and len({example.row for example in examples}) == 3 + 8
    assert [example.key for example in examples] == list(data.keys())
    assert examples[0].key == "in/a/shapes/train/000000"


def test_it_pickles_and_reads_from_many_threads(tmp_path):
    path = shard(tmp_path / "x.tar", 3)
    data = Mixture({"a": {"source": "webdataset", "path": path}, "b": shapes(5)})
    copy = pickle.loads(pickle.dumps(data))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda i: copy[i].key, list(range(8)) * 20))
    assert read == list(data.keys()) * 20


@pytest.mark.parametrize(
    ("parts", "where", "found"),
    [
        ({}, "", "nothing"),
        ({"a": {"size": 3}}, ".a.source", "''"),
        ({"a": {"source": "shape"}}, ".a.source", "'shape'"),
        ({"a": shapes(3, sise=2)}, ".a.sise", "unknown key 'sise'"),
        ({"a": shapes(3, wieght=2)}, ".a.wieght", "unknown key 'wieght'"),
        ({"a": shapes("3")}, ".a.size", "'3' (str)"),
        ({"a": shapes(3), "cc3m": {"source": "webdataset"}}, ".cc3m.path", "nothing"),
        ({"a": shapes(3, weight=0)}, ".a.weight", "0"),
        ({"a": shapes(3), "b": shapes(3, weight=2)}, ".a.weight", "no weight, but one in b"),
        ({"a": shapes(3, weight=-1.0)}, ".a.weight", "-1.0"),
        ({"a": shapes(3, weight=float("nan"))}, ".a.weight", "nan"),
        ({"a": shapes(3, weight="1")}, ".a.weight", "'1'"),
        ({"a": shapes(3, weight=True)}, ".a.weight", "True"),
        ({"a/b": shapes(3)}, ".a/b", "'a/b'"),
        (
            {"a": {"source": "mixture", "parts": {"b": shapes(3, weight=0)}}},
            ".a.parts.b.weight",
            "0",
        ),
    ],
)
def test_a_wrong_part_is_a_config_error_before_anything_opens(parts, where, found):
    for call, prefix in (
        (lambda: Mixture.check_section({"parts": parts}, "config.data"), "config.data.parts"),
        (lambda: Mixture(parts), "Mixture.parts"),
    ):
        with pytest.raises(ConfigError) as caught:
            call()
        assert (caught.value.where, caught.value.found) == (prefix + where, found)


def test_checking_opens_nothing(tmp_path):
    parts = {"a": {"source": "webdataset", "path": [str(tmp_path / "none.tar")], "weight": 2}}
    Mixture.check_section({"parts": parts}, "config.data")
    said = message(lambda: Mixture(parts))
    assert said.startswith(f"part a: {tmp_path}/none.tar: no file matches")


def test_flags_in_an_error_are_those_of_the_part(tmp_path):
    (tmp_path / "x.csv").write_text("picture id,words\n1.jpg,a dog\n")
    table = {"source": "table", "path": str(tmp_path / "x.csv"), "image": "pictur id"}
    said = message(lambda: Mixture({"drawn": shapes(1), "cc": table}))
    assert said.startswith(f"part cc: {tmp_path}/x.csv: image='pictur id', but no column has that")
    assert "set --config.data.parts.cc.image='picture id' --config.data.parts.cc.captions=w" in said


def test_the_error_for_a_too_long_epoch_names_the_weight():
    parts = {"a": shapes(1000, weight=1), "b": shapes(1000, weight=1e-7)}
    assert message(lambda: Mixture(parts)) == (
        "part b: its 1,000 rows at weight 1e-07 of 1 make an epoch of 10,000,001,000 rows, "
        "expected at most 2,147,483,647; raise that weight, or lower the others"
    )
