"""`benchmarks/gpu.sh`: checks clipx on one GPU, then times it beside open_clip with torch.compile.

Checks: losses against float64, attention in bfloat16 (cuDNN's kernel) against float32, and that a
run with --deterministic which was stopped ends in the same numbers. Times: steps in bfloat16 of
both libraries in turns, at the largest batch, halved from a first guess, that both can hold; the
steps of DeCLIP and ProtoCLIP beside CLIP's; k-means. Every part writes the table anew, so that what
was measured before a time limit stays.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import numpy as np

from clipx.parallel import chips
from clipx.planning import results, suite, turns, works
from clipx.planning.rows import OURS, Row, batch
from clipx.training.run import assemble

ROOT = pathlib.Path(__file__).parents[1]
Overrides = tuple[tuple[str, str], ...]


class Sizes(NamedTuple):
    models: tuple[tuple[str, str, Overrides, int], ...]  # name, config, overrides, first batch
    methods: tuple[str, ...]  # configs beside the first
    changes: Overrides  # of the methods
    rows: int  # of a batch of the methods
    steps: int  # of a turn
    turns: int
    kmeans: tuple[int, int, int]  # rows, width, clusters
    attention: tuple[int, int, int, int]  # batch, tokens, heads, width of a head
    compile: bool


def variant(name: str) -> Overrides:
    return (("image.variant", name),)


FULL = Sizes(
    models=(
        ("ViT-B/32", "clip", (), 2048),
        ("ViT-B/16", "clip", variant("ViT-B/16"), 512),
        ("ViT-L/14", "clip", variant("ViT-L/14"), 256),
        ("RN50", "clip:rn50", (), 512),
    ),
    methods=("clip", "declip", "protoclip"),
    changes=(),
    rows=256,
    steps=5,
    turns=3,
    kmeans=(1_000_000, 256, 20_000),
    attention=(64, 197, 12, 64),
    compile=True,
)
_SMALL = (
    *(("image.image_size", "32"), ("image.width", "16"), ("image.depth", "1")),
    *(("text.width", "16"), ("text.depth", "1"), ("image.embed_dim", "8"), ("text.embed_dim", "8")),
    *(("image.heads", "2"), ("text.heads", "2"), ("tokenizer.vocab_size", "128")),
)
TINY = Sizes(
    models=(("tiny", "clip:small", _SMALL, 8),),
    methods=("clip:small", "declip:small"),
    changes=_SMALL,
    rows=8,
    steps=1,
    turns=1,
    kmeans=(500, 8, 10),
    attention=(2, 16, 2, 8),
    compile=False,
)


def checks(sizes: Sizes, gpu: bool) -> Iterator[Row]:
    """Errors, which should be small, and whether a stopped run ends in the same numbers."""
    import jax
    import jax.numpy as jnp

    from clipx.models.attention import attention
    from clipx.parallel import mesh as meshes
    from clipx.planning import measure

    mesh = meshes.make_mesh(meshes.MeshConfig(), jax.devices()[:1])
    error = measure.check_losses(mesh)
    yield Row("checks", "InfoNCE and its gradient, error of float64", "", {OURS: [error]})
    rng = np.random.default_rng(0)
    shape = (3, *sizes.attention)
    exact = jnp.asarray(rng.normal(size=shape), jnp.bfloat16).astype(jnp.float32)

    def total(x):
        out = attention(*x, causal=True)
        return jnp.sum(jnp.sin(out.astype(jnp.float32)))

    with jax.default_matmul_precision("highest"):
        plain = jax.jit(jax.grad(total))(exact)
    fused = jax.jit(jax.grad(total))(exact.astype(jnp.bfloat16)).astype(jnp.float32)
    error = float(jnp.abs(fused - plain).max() / jnp.abs(plain).max())
    yield Row("checks", "attention's gradient in bfloat16, error of float32", "", {OURS: [error]})
    differs = {OURS: [float(not resumed_the_same())]}
    yield Row("checks", "a stopped run with --deterministic differs (1: yes)", "", differs)


def resumed_the_same() -> bool:
    """Whether a run that goes on from its fourth step logs what the whole run logged."""
    flags = ["--config=quickstart", "--deterministic", "--config.train.total_steps=8"]
    flags += ["--config.train.save_every_steps=4", "--config.train.log_every_steps=1"]
    flags += ["--config.evals={}", "--config.train.best=", "--config.optimizer.warmup_steps=2"]

    def train(folder: pathlib.Path) -> list[tuple]:
        command = [sys.executable, "-m", "clipx.train", f"--workdir={folder}", *flags]
        subprocess.run(command, check=True, stdout=sys.stderr, cwd=ROOT)
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return [(x["step"], x["loss"], x["param_norm"]) for x in lines if "loss" in x]

    with tempfile.TemporaryDirectory() as place:
        whole, again = pathlib.Path(place, "whole"), pathlib.Path(place, "again")
        expected = train(whole)
        shutil.copytree(whole, again)
        shutil.rmtree(again / "checkpoints" / "8")
        return train(again) == expected


def steps(sizes: Sizes, gpu: bool) -> Iterator[Row]:
    """Images a second and MFU of training steps, beside open_clip's."""
    for name, config, changes, first in sizes.models:
        rows, found = first, None
        while found is None:
            found = beside(sizes, config, (*changes, *batch(rows)), gpu)
            rows = rows if found else rows // 2
            if not rows:
                raise SystemExit(f"{name}: no batch fits both")
        taken, versions = found
        rates = {
            side: [rows * sizes.steps / turn["seconds"] for turn in list_]
            for side, list_ in taken.items()
        }
        yield Row("step", f"{name}, batch {rows:,}", "images/s", rates, versions=versions)
        chip = peak()
        if chip:
            work = taken[OURS][0]["flops"] / rows
            shares = {s: [100 * x * work / chip for x in list_] for s, list_ in rates.items()}
            yield Row("step", f"{name}, MFU", "%", shares)


def beside(
    sizes: Sizes, config: str, overrides: Overrides, gpu: bool
) -> tuple[dict[str, list[turns.Turn]], dict[str, str]] | None:
    """(the turns of both sides, versions of their libraries); None if one lacks memory."""
    options = suite.open_clip_options(assemble(works.config(config, overrides)))
    options |= {"device": "cuda" if gpu else "cpu", "bfloat16": True, "compile": sizes.compile}
    sides = {
        OURS: suite.ours("step", {"config": config, "overrides": overrides, "flops": True}),
        "open_clip": suite.peer("step", options),
    }
    try:
        with sides[OURS], sides["open_clip"]:
            taken = turns.alternate(sides, str(sizes.steps), sizes.turns)
            return taken, {name: side.versions for name, side in sides.items()}
    except turns.Missing as error:
        if "memory" not in str(error).lower() and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"{config} {overrides}: {error}", file=sys.stderr)
        return None


def peak() -> float | None:
    """FLOP/s of the device in bfloat16, if it is in the table of chips."""
    import jax

    chip = chips.chip(jax.devices()[0].device_kind)
    return chip.tflops * 1e12 if chip else None


def methods(sizes: Sizes, gpu: bool) -> Iterator[Row]:
    """Seconds of a step of other methods beside CLIP's, at one batch size."""
    overrides = (*sizes.changes, *batch(sizes.rows))
    sides = {
        (OURS if i == 0 else name): suite.ours("step", {"config": name, "overrides": overrides})
        for i, name in enumerate(sizes.methods)
    }
    with turns.started(sides) as (able, why):
        taken = turns.alternate(able, str(sizes.steps), sizes.turns)
    seconds = {s: [turn["seconds"] / sizes.steps for turn in x] for s, x in taken.items()}
    yield Row("methods", f"{sizes.methods[0]} (clipx) and others", "s", seconds, why)


def kmeans(sizes: Sizes, gpu: bool) -> Iterator[Row]:
    """Seconds of a fit of 20 iterations."""
    rows, width, clusters = sizes.kmeans
    with tempfile.NamedTemporaryFile(suffix=".npy") as file:
        np.save(file, suite.features(rows, width))
        file.flush()
        options = {"rows": file.name, "clusters": clusters, "iterations": 20}
        with suite.ours("kmeans", options) as side:
            side.turn("1")
            seconds = [side.turn("1")["seconds"]]
    name = f"{rows:,} x {width}, k = {clusters:,}, 20 iterations"
    yield Row("kmeans", name, "s", {OURS: seconds})


PARTS: dict[str, Any] = {"checks": checks, "step": steps, "methods": methods, "kmeans": kmeans}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "benchmarks" / "gpu.md")
    options = parser.parse_args()
    import jax

    device = jax.devices()[0]
    gpu = device.platform == "gpu"
    if options.size == "full" and not gpu:
        found = f"found {device.device_kind}, expected a GPU"
        raise SystemExit(f"{found}; --size=tiny tries the script")
    sizes, measured = (FULL if options.size == "full" else TINY), {}
    for name in options.only:
        for row in PARTS[name](sizes, gpu):
            measured.setdefault(name, []).append(row)
            text = "\n".join(results.table(results.report(measured, ROOT)))
            options.out.write_text(f"# One {device.device_kind}\n{text}\n")
        print(f"{name}: done", file=sys.stderr)
    print(options.out.read_text())


if __name__ == "__main__":
    main()
