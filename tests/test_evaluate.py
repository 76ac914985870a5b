"""The flags of `clipx.evaluate`, and the files that it writes. test_train.py tests that its numbers
equal those of training."""

from __future__ import annotations

import types

import pytest
from support import commands

from clipx.errors import ConfigError
from clipx.serving import evaluation
from clipx.serving.evaluation import chosen, dataset, results
from clipx.training.schema import EvalSpec

SHAPES = {"source": "shapes", "split": "test"}
EVALS = {
    "retrieval": {"data": SHAPES, "captions": 1},
    "cifar": {"evaluator": "linear_probe", "data": SHAPES, "train_data": SHAPES},
}


def test_evals_come_from_the_config_or_are_new():
    assert chosen(EVALS, "", data="", train_data="") == EVALS
    assert chosen(EVALS, "cifar", data="", train_data="") == {"cifar": EVALS["cifar"]}
    tfds = "source=tfds,name=cifar10,split=test[:90%]"
    found = chosen(EVALS, "zero_shot,cifar,retrieval", data=tfds, train_data="source=shapes,size=8")
    data = {"source": "tfds", "name": "cifar10", "split": "test[:90%]"}
    assert found == {
        "zero_shot": {"data": data},
        "cifar": {
            "evaluator": "linear_probe",
            "data": data,
            "train_data": {"source": "shapes", "size": 8},
        },
        "retrieval": {"data": data, "captions": 1},
    }
    assert EVALS["retrieval"]["data"] is SHAPES
    assert chosen({}, "voc", data=tfds, train_data="") == {"voc": {}}  # voc reads no source


@pytest.mark.parametrize("text", ["folder", "source=", "=x", "source=folder,", "a=b,c"])
def test_a_flag_that_is_no_source(text):
    with pytest.raises(ConfigError, match="--data.*\n.*found.*\n.*key=value,key=value"):
        chosen({}, "zero_shot", data=text, train_data="")


def test_commas_in_brackets_are_part_of_a_value():
    text = "source=table,path=a (1,2)[3,4].csv,captions=('title', 'text'),label=kind"
    assert evaluation.section(text, "--data") == {
        "source": "table",
        "path": "a (1,2)[3,4].csv",
        "captions": ["title", "text"],
        "label": "kind",
    }


@pytest.mark.parametrize(
    ("data", "flags", "expected"),
    [
        ("source=table,path=t.csv", ["captions=title"], {"captions": "title"}),
        (
            "source=table,path=t.csv,image=x",
            ["image=y", "where=a=b"],
            {"image": "y", "where": "a=b"},
        ),
        ("source=webdataset,path=a.tar", ["source=table", "path=t.csv"], {}),
    ],
)
def test_keys_are_added_to_the_data_of_the_command_line(monkeypatch, data, flags, expected):
    seen = []
    monkeypatch.setattr(evaluation, "evaluate_file", lambda path, evals, *rest: seen.append(evals))
    done = commands.run(
        *("evaluate", "--init_from=of_another_library", "--evals=retrieval", f"--data={data}"),
        *(f"--config.evals.retrieval.data.{flag}" for flag in flags),
        "--config.evals.zero_shot.data.source=shapes",
    )
    assert done.returncode == 0, done.stderr
    assert seen == [{"retrieval": {"data": {"source": "table", "path": "t.csv", **expected}}}]


def test_a_name_that_is_no_eval():
    with pytest.raises(ConfigError, match="--evals") as error:
        chosen(EVALS, "zeroshot", data="", train_data="")
    assert "did you mean 'zero_shot'?" in str(error.value)


def test_missing_sources_are_refused():
    tfds = "source=tfds,name=cifar10"
    with pytest.raises(ConfigError, match="--train_data(.*\n)+.*that knn reads(.*\n)+.*path="):
        chosen(EVALS, "zero_shot,knn", data=tfds, train_data="")
    with pytest.raises(ConfigError, match="--data"):
        chosen(EVALS, "knn", data="", train_data=tfds)


@pytest.mark.parametrize(
    "source, name",
    [
        (
            {"source": "tfds", "name": "coco_captions/2014", "split": "val"},
            "coco_captions-2014-val",
        ),
        ({"source": "webdataset", "path": "$FLICKR8K/test-*.tar"}, "flickr8k-test"),
        ({"source": "webdataset", "path": ("a/b-{000..005}.tar", "c.tar")}, "a-b"),
        ({"source": "folder", "path": "/data/CIFAR10/test"}, "cifar10-test"),
        (SHAPES, "shapes-test"),
        ({"source": "shapes"}, "shapes"),
    ],
)
def test_a_data_set_has_a_short_name(source, name):
    assert dataset(EvalSpec.check("retrieval", {"data": source})) == name


def test_files_have_the_layout_of_clip_benchmark(tmp_path):
    specs = tuple(
        EvalSpec.check(name, section)
        for name, section in {
            **EVALS,
            "zero_shot": {"data": SHAPES},
            "knn": {"data": SHAPES, "train_data": SHAPES},
        }.items()
    )
    complete = {part: {"name": name} for part, name in zip(("objective", "image", "text"), "abc")}
    complete["evals"] = {spec.name: spec.dump() for spec in specs}
    found = {
        "retrieval/image_to_text_R@5": 0.1,
        "retrieval/text_to_image_R@5": 0.2,
        "retrieval/mean_recall": 0.3,
        "cifar/top1": 0.4,
        "cifar/cost": 1.0,
        "zero_shot/top1": 0.5,
        "zero_shot/top5": 0.6,
        "zero_shot/mean_per_class": 0.7,
        "zero_shot/class/x": 0.8,
        "knn/k20/top1": 0.9,
    }
    run = types.SimpleNamespace(evals=specs, complete=complete)
    entries = results(run, tmp_path / "runs", 12, found)
    assert {
        (e["dataset"], e["model"], e["pretrained"], e["language"]) for e in entries.values()
    } == {("shapes-test", "a-b-c", "runs_12", "en")}
    assert {name: (entry["task"], entry["metrics"]) for name, entry in entries.items()} == {
        "shapes-test_retrieval.json": (
            "zeroshot_retrieval",
            {
                "text_retrieval_recall@5": 0.1,
                "image_retrieval_recall@5": 0.2,
                "mean_recall": 0.3,
            },
        ),
        "shapes-test_cifar.json": ("linear_probe", {"lp_acc1": 0.4, "cost": 1.0}),
        "shapes-test_zero_shot.json": (
            "zeroshot_classification",
            {"acc1": 0.5, "acc5": 0.6, "mean_per_class_recall": 0.7, "class/x": 0.8},
        ),
        "shapes-test_knn.json": ("knn", {"k20/top1": 0.9}),
    }
    assert entries["shapes-test_retrieval.json"]["eval"]["captions"] == 1
    assert len(evaluation.table(found)) == len(found)
