"""open_clip's own evaluation of an export gives the metrics of `clipx.evaluate`."""

import io
import json
import pathlib
import runpy
import tarfile

import numpy as np
import pytest
from PIL import Image
from support import ROOT
from support.exports import CAPTIONS, CLASS, save
from support.libraries import asked, missing
from support.runs import small

from clipx.data.sources.shapes import Shapes
from clipx.serving.evaluation import evaluate
from clipx.serving.export import Options, export

JUDGE = ROOT / "benchmarks" / "judge.py"
NO_JUDGE = missing("torch", "open_clip", "transformers", "open_clip_train")
WORDS = sorted({word for caption in CAPTIONS for word in caption.split()})  # in the vocabulary
SIZES = [(16, 16), (41, 27), (27, 40), (16, 33), (90, 64), (64, 91), (15, 12)]  # width, height


def picture(row: int, kind: str) -> bytes:
    """An encoded picture of a shape; its size and aspect ratio change with the row."""
    drawn = Image.fromarray(Shapes(image_size=64)[row].image)
    file = io.BytesIO()
    drawn.resize(SIZES[row % len(SIZES)], Image.Resampling.BICUBIC).save(file, kind, quality=90)
    return file.getvalue()


def write(path: pathlib.Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two shards of pictures with one to three captions, and eight class folders."""
    folder, rng = tmp_path_factory.mktemp("sets"), np.random.default_rng(0)
    rows = [{}, {}]
    for row in range(60):
        captions = [" ".join(rng.permutation(WORDS)[:6]) for _ in range(rng.integers(1, 4))]
        rows[row // 30] |= {
            f"{row:03}.jpg": picture(row, "JPEG"),
            f"{row:03}.json": json.dumps({"captions": captions}).encode(),
        }
    for shard, files in enumerate(rows):
        write(folder / f"test-{shard}.tar", files)
    names = ("red ball", "brown_fox", "dog", "horses", "men", "two dogs", "Quick Ball", "ride")
    files = {f"test/{names[r % 8]}/{r}.png": picture(200 + r, "PNG") for r in range(77)}
    write(folder / "classes.tar", files)
    return folder


@asked(NO_JUDGE)
def test_open_clips_evaluation_says_what_ours_says(sets, tmp_path):
    pairs = {"source": "webdataset", "path": f"{sets}/test-*.tar"}
    classes = {"source": "folder", "path": f"{sets}/classes.tar"}
    templates = ["a photo of a {}.", "one {}", "{}, drawn"]
    config = small(CLASS, ("train.best", "")) | {
        "evals": {
            "retrieval": {"data": pairs},
            "first": {"evaluator": "retrieval", "data": pairs, "captions": 1},
            "zero_shot": {"data": classes, "templates": templates},
        }
    }
    workdir = save(tmp_path / "run", config)
    export(workdir, Options("open_clip", tmp_path / "export", verify=False))
    ours = evaluate(workdir, "latest", config)

    module = runpy.run_path(str(JUDGE))
    judge = module["Judge"](tmp_path / "export", batch=16)
    read = module["read_pairs"](f"{sets}/test-*.tar")
    theirs = {f"retrieval/{k}": v for k, v in judge.retrieval(read).items()}
    theirs |= {
        f"zero_shot/{k}": v
        for k, v in judge.zero_shot(
            *module["read_classes"](f"{sets}/classes.tar"), templates
        ).items()
    }
    theirs = {name.replace("retrieval/first", "first"): value for name, value in theirs.items()}
    assert len(theirs) == 15
    assert ours["retrieval/text_to_image_R@5"] != ours["first/text_to_image_R@5"]
    for name, value in theirs.items():
        assert 100 * value == pytest.approx(100 * ours[name], abs=0.1), name
