"""`python benchmarks/encoders.py --image=FILE --timm=NAME --text=FOLDER`: rows a second of clipx's
towers beside timm's and transformers', on the same random rows, in turns, in evaluation mode.

Both sides use all cores that the process may use, and float32. timm's model has random weights,
which take as long as others. `NAME` is timm's name of the architecture in FILE. Needs '.[interop]'.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
os.environ["JAX_PLATFORMS"] = "cpu"


def ours(side: str, path: str, rows: np.ndarray, size: int | None) -> Callable[[], np.ndarray]:
    import jax

    from clipx.training import encoders

    encoder = encoders.describe(side, path)
    tower = encoder.tower if size is None else encoder.tower.clone(image_size=size)
    params, statistics_ = encoder.read()
    variables = {"params": params, "batch_stats": statistics_}
    run = jax.jit(lambda x: tower.apply(variables, x).backbone).lower(rows).compile()
    return lambda: np.asarray(run(rows))


def timm_model(name: str, rows: np.ndarray) -> Callable[[], np.ndarray]:
    import timm
    import torch

    model = timm.create_model(name, pretrained=False, num_classes=0).eval()
    x = torch.from_numpy(rows.transpose(0, 3, 1, 2).copy())

    def run() -> np.ndarray:
        with torch.inference_mode():
            return model(x).numpy()

    return run


def transformers_model(folder: str, ids: np.ndarray) -> Callable[[], np.ndarray]:
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder).eval()
    x = torch.from_numpy(ids.astype(np.int64))

    def run() -> np.ndarray:
        with torch.inference_mode():
            return model(x).last_hidden_state.mean(dim=1).numpy()

    return run


def turns(runs: dict[str, Callable[[], np.ndarray]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, the runs taking turns; the first call of each is not counted."""
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def show(what: str, rows: int, seconds: dict[str, list[float]]) -> None:
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    (a, b), (_, theirs) = medians.values(), medians
    print(f"| {what} | {rows / a:,.0f} | {rows / b:,.0f} ({theirs}) | {a / b:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--image", help="a file or folder for config.image.init_from")
    parser.add_argument("--timm", help="timm's name of its architecture")
    parser.add_argument("--text", help="a folder for config.text.init_from")
    parser.add_argument("--size", type=int, help="pixels of an image's side; default: the file's")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    from clipx.interop import libraries
    from clipx.training import encoders

    libraries.require("timm")
    rng = np.random.default_rng(0)
    print("| | clipx, rows a second | the library's | clipx's time / the library's |")
    print("|---|---|---|---|", flush=True)
    if args.image:
        size = args.size or encoders.describe("image", args.image).tower.image_size
        rows = rng.standard_normal((args.batch, size, size, 3), np.float32)
        runs = {"clipx": ours("image", args.image, rows, size), "timm": timm_model(args.timm, rows)}
        show(f"{args.timm}, {size} px", args.batch, turns(runs, args.rounds))
    if args.text:
        ids = rng.integers(1000, 20_000, (args.batch, args.tokens), np.int32)
        runs = {
            "clipx": ours("text", args.text, ids, None),
            "transformers": transformers_model(args.text, ids),
        }
        show(
            f"{pathlib.Path(args.text).name}, {args.tokens} tokens",
            args.batch,
            turns(runs, args.rounds),
        )


if __name__ == "__main__":
    main()
