"""Tests whether two trees of clipx run the same programs: run `python programs.py --out=a.json`
with PYTHONPATH set to one tree, and `--against=a.json` with PYTHONPATH set to the other.

It compares, for each config and variant: `config.json`, the abstract state with its shardings, and
the traced training step, with equations numbered and without names and source lines. For three tiny
runs on two devices, trained by the command, it compares config.json, the metrics except times, and
every array and the JSON of the last checkpoint.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import numpy as np

import clipx

ROOT = pathlib.Path(clipx.__file__).parents[1]
# parameters of an equation that tell where it came from, not what it computes
_NAMES = ("name", "name_stack", "debug_info", "name_and_src_info", "metadata", "src_info")
_NAMES += ("fwd", "bwd", "fwd_jaxpr_thunk", "jvp_jaxpr_fun")  # functions that are not traced
_TIMES = ("images_per_second", "seconds", "wait", "share_of_time", "mfu", "memory_gib", "predicted")
SMALL = (
    "image.width=32 image.depth=1 image.heads=2 text.width=32 text.depth=1 text.heads=2 "
    "image.embed_dim=16 text.embed_dim=16 tokenizer.vocab_size=128 data.source=shapes "
    "data.image_size=32 image.image_size=32 image.variant=ViT-Ti/16 data.size=256 "
    "train.batch_size=32 train.total_steps=6 train.total_epochs=None train.log_every_steps=1 "
    "train.save_every_steps=4 train.eval_every_steps=3 optimizer.warmup_epochs=None "
    "optimizer.warmup_steps=2"
)
RUNS = {
    "quickstart.py": "image.patch=16 evals.zero_shot.data.size=32",
    "declip.py:small": "objective.queue_size=64 objective.simsiam_width=16 "
    "data.text_augment.operations=('swap','delete')",
    "protoclip.py:small": "objective.k=6 objective.episode_size=96 train.episode_pictures=True "
    "objective.projection_dim=8 objective.projection_hidden=16 train.best=",
}


def find(*names: str):
    """The first of these functions that the tree has, because files move between trees."""
    for name in names:
        module, _, function = name.rpartition(".")
        try:
            return getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError):
            continue
    raise SystemExit(f"none of {names} in {ROOT}")


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def plain(value) -> str:
    """A parameter of an equation as text, without addresses and names of functions."""
    if isinstance(value, (tuple, list)):
        return "(" + ",".join(map(plain, value)) + ")"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{plain(v)}" for k, v in sorted(value.items(), key=str)) + "}"
    if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
        return equations(value)
    if isinstance(value, (set, frozenset)):
        return "{" + ",".join(sorted(map(plain, value))) + "}"
    if callable(value) and not isinstance(value, type):
        return "function"
    if "frozenset" in (text := repr(value)):  # their order differs between processes
        text = re.sub(r"\{([^{}]*)\}", lambda m: ",".join(sorted(m[1].split(", "))), text)
    return re.sub(r" at 0x[0-9a-f]+|<function [^>]*>|clipx[\w./]*", "", text)


def equations(jaxpr) -> str:
    """A jaxpr's equations as text, with variables numbered in order of appearance."""
    consts = getattr(jaxpr, "consts", ())
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    numbers: dict[int, int] = {}

    def variable(v) -> str:
        if type(v).__name__ == "Literal":
            return f"{v.val!r}:{v.aval.str_short()}"
        return f"{numbers.setdefault(id(v), len(numbers))}:{v.aval.str_short()}"

    lines = [" ".join(map(variable, (*jaxpr.constvars, *jaxpr.invars)))]
    lines += [digest(np.asarray(c).tobytes().hex()) for c in consts]
    for eqn in jaxpr.eqns:
        params = {k: v for k, v in eqn.params.items() if k not in _NAMES}
        made = " ".join(map(variable, eqn.outvars))
        taken = " ".join(map(variable, eqn.invars))
        lines.append(f"{made} = {eqn.primitive.name} {plain(params)} {taken}")
    lines.append(" ".join(map(variable, jaxpr.outvars)))
    return digest("\n".join(lines)) if len(lines) > 40 else "[" + "; ".join(lines) + "]"


def of_config(spec: str) -> dict[str, str]:
    load = find("clipx.config.files.load", "clipx.config_file.load")
    assemble = find("clipx.training.run.assemble", "clipx.run.assemble")
    run = assemble(load(f"{ROOT}/configs/{spec}"), jax.devices())
    state = [
        (jax.tree_util.keystr(path), x.shape, str(x.dtype), str(x.sharding.spec))
        for path, x in jax.tree_util.tree_leaves_with_path(run.state)
    ]
    return {
        "config": digest(json.dumps(run.complete, sort_keys=True)),
        "state": digest(repr(state)),
        "step": equations(run.traced.jaxpr),
    }


def of_run(spec: str, overrides: str) -> dict[str, str]:
    """Digests of the files that a tiny run of the command writes."""
    import orbax.checkpoint as ocp

    options = [f"--config.{o}" for o in (*SMALL.split(), *overrides.split())]
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(folder, "run")
        file = pathlib.Path(folder, "config.py")
        file.write_text(_config_file(spec))
        done = subprocess.run(
            [sys.executable, "-m", "clipx.train", f"--config={file}", f"--workdir={workdir}"]
            + options,
            env=os.environ
            | {
                "PYTHONPATH": str(ROOT),
                "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
            },
            cwd=folder,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{spec}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        rows = [{k: v for k, v in r.items() if not any(t in k for t in _TIMES)} for r in rows]
        last = max((p for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()), key=_step)
        state = ocp.PyTreeCheckpointer().restore(last / "state")
        arrays = [
            (jax.tree_util.keystr(path), digest(np.asarray(x).tobytes().hex()))
            for path, x in jax.tree_util.tree_leaves_with_path(state)
        ]
        run = json.loads(next((last / "run").glob("*")).read_text())
        return {
            "config.json": digest((workdir / "config.json").read_text()),
            "tokenizer.json": digest((workdir / "tokenizer.json").read_text()),
            "metrics": digest(json.dumps(rows)),
            "last step": last.name,
            "arrays": digest(repr(arrays)),
            "run": digest(json.dumps({k: v for k, v in run.items() if k != "seconds"})),
            "files": digest(repr(sorted(p.name for p in workdir.iterdir()))),
        }


def _step(path: pathlib.Path) -> int:
    return int(path.name)


def _config_file(spec: str) -> str:
    """A config of the tree with rendered shapes as its data, and no keys of the original source."""
    name, _, variant = spec.partition(":")
    return (
        f"import sys\nsys.path.insert(0, {str(ROOT / 'configs')!r})\n"
        f"import {name.removesuffix('.py')} as base\n\n\n"
        "def get_config(variant=''):\n"
        f"    config = base.get_config({variant!r})\n"
        "    config.data = {'source': 'shapes', 'image_size': 32}\n"
        "    if 'retrieval' in config.evals:\n"
        "        shapes = {'source': 'shapes', 'split': 'test', 'image_size': 32, 'size': 32}\n"
        "        config.evals = {'retrieval': {'limit': 32, 'data': shapes}}\n"
        "    return config\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out")
    parser.add_argument("--against")
    parser.add_argument(
        "--only",
        default="",
        help="prefix of the specs to compare; none: compare the tiny runs only",
    )
    options = parser.parse_args()
    variants = find("clipx.config.files.variants", "clipx.config_file.variants")
    specs = [
        f"{file.name}:{variant}".rstrip(":")
        for file in sorted((ROOT / "configs").glob("*.py"))
        if file.stem != "common"
        for variant in variants(file)
    ]
    digests = {}
    for spec in specs:
        if options.only != "none" and spec.startswith(options.only):
            digests[spec] = of_config(spec)
            print(spec, *digests[spec].values(), flush=True)
    for spec, overrides in RUNS.items():
        if options.only in ("", "none"):
            digests[f"run {spec}"] = of_run(spec, overrides)
            print("run", spec, *digests[f"run {spec}"].values(), flush=True)
    if options.out:
        pathlib.Path(options.out).write_text(json.dumps(digests, indent=1) + "\n")
    if not options.against:
        return 0
    before = json.loads(pathlib.Path(options.against).read_text())
    differ = [
        f"{spec}: {key}"
        for spec, values in digests.items()
        for key, value in values.items()
        if before[spec][key] != value
    ]
    print("\n".join(["differ:", *differ] if differ else [f"all {len(digests)} alike"]))
    return bool(differ)


if __name__ == "__main__":
    sys.exit(main())
