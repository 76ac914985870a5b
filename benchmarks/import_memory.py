"""Host memory that importing a model takes, beside the size of its file.

    python benchmarks/import_memory.py      # writes a model of 1 GB, and imports it in a process

The process imports clipx, notes its peak, loads the model, and prints by how much the peak rose.
"""

from __future__ import annotations

import json
import pathlib
import resource
import subprocess
import sys
import tempfile

import numpy as np

from clipx.interop import load
from clipx.interop.model import Words, array_shapes, make_model
from clipx.interop.open_clip import WEIGHTS, OpenClip
from clipx.models.text import TextTransformer
from clipx.models.vit import ViT

GB = 1e9


def write(folder: pathlib.Path) -> None:
    """Writes a model of random weights as open_clip keeps it."""
    image = ViT(variant="ViT-L/14", depth=17, dtype="float32")
    text = TextTransformer(depth=1, dtype="float32")
    rng, tree = np.random.default_rng(0), {}
    for path, shape in array_shapes(image, text).items():
        *parents, leaf = path.split("/")
        place = tree
        for name in parents:
            place = place.setdefault(name, {})
        place[leaf] = rng.standard_normal(shape, np.float32)
    half = (0.5, 0.5, 0.5)
    words = Words("clip_bpe", text.vocab_size, text.context, 0, 49406, text.eot_id)
    rest = {"logit_scale": np.float32(4), "logit_bias": None, "mean": half, "std": half}
    OpenClip().write(make_model(image, text, tree, words=words, **rest), folder, str(folder))


def peak() -> float:
    """The largest resident size of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB


def measure(folder: str) -> None:
    """Prints, as JSON, by how many GB importing the model raises the peak."""
    (pathlib.Path(folder) / "b").mkdir()
    before = peak()
    model = load.load(folder)
    assert all(np.isfinite(x.reshape(-1)[0]) for x in model.flat.values())
    print(json.dumps({"before": before, "rose": peak() - before}))


def main() -> None:
    if len(sys.argv) > 1:
        measure(sys.argv[1])
        return
    with tempfile.TemporaryDirectory() as folder:
        child = [sys.executable, __file__]
        subprocess.run([*child[:1], "-c", _WRITE, folder], check=True)
        size = (pathlib.Path(folder) / WEIGHTS).stat().st_size / GB
        said = subprocess.run([*child, folder], check=True, capture_output=True, text=True)
        found = json.loads(said.stdout.splitlines()[-1])
        print(
            f"file {size:.2f} GB, peak before {found['before']:.2f} GB, rose {found['rose']:.2f} GB"
        )


_WRITE = (
    f"import pathlib, runpy, sys; runpy.run_path({__file__!r})['write'](pathlib.Path(sys.argv[1]))"
)


if __name__ == "__main__":
    main()
