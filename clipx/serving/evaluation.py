"""Evals of a trained run, or of a model that other libraries keep, printed and written."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from clipx.config import binding, files
from clipx.config.binding import find
from clipx.errors import ConfigError
from clipx.evaluators.base import Evaluator, declared, evaluate_all
from clipx.training import pretrained
from clipx.training.checkpoint import prepare_workdir, write_json
from clipx.training.initial import init
from clipx.training.run import OpenRun, Run, assemble, restore, with_data
from clipx.training.schema import EvalSpec
from clipx.types import TrainState

_SOURCE_FLAGS = {"data": "examples", "train_data": "train_examples"}


def section(text: str, where: str) -> dict[str, Any]:
    """A source's section out of a flag: its keys as in a config, `source=tfds,name=cifar10`."""
    pairs = [part.partition("=") for part in text.split(",")]
    for key, equals, value in pairs:
        if not (key and equals and value):
            raise ConfigError(
                where,
                repr(text),
                "key=value,key=value: a source and its keys, as in a config",
                f"{where}=source=folder,path=DIR",
            )
    return {key: files.parse(value) for key, _, value in pairs}


def chosen(evals: Mapping[str, Any], names: str, **sources: str) -> dict[str, Any]:
    """The sections of the evals that are named, of all where none is: those of `evals`, or new ones
    by their evaluators' names. `data` and `train_data`, where given, are the sources of all of them
    that read such a one. Raises `ConfigError` for a name that is neither, and for no source."""
    found = {}
    for name in names.split(",") if names else evals:
        own = dict(evals.get(name, {}))
        try:
            evaluator = find("evaluators", own.get("evaluator") or name, Evaluator)
        except ConfigError as error:
            error.where = "--evals"
            raise
        for key, text in sources.items():
            field = binding.fields(evaluator).get(_SOURCE_FLAGS[key])
            if field and text:
                own[key] = section(text, f"--{key}")
            elif field and field.default is dataclasses.MISSING and not own.get(key):
                fix = f"--{key}=source=folder,path=DIR"
                raise ConfigError(f"--{key}", "nothing", f"the source that {name} reads", fix)
        found[name] = own
    return found


def dataset(spec: EvalSpec) -> str:
    """A short name of the data that an eval reads: of a set, or of where it lies."""
    source = spec.config.data or spec.values
    path = source.get("path") or source.get("name") or source.get("source") or spec.name
    first = path if isinstance(path, str) else path[0]
    parts = [re.sub(r"\{.*?\}|\*|\.\w+$", "", part) for part in first.split("/")[-2:]]
    parts.append(str(source.get("split", "")))
    slugs = (re.sub(r"[^a-z0-9]+", "_", part.lower()).strip("_") for part in parts)
    return "-".join(filter(None, slugs))


def results(
    run: Run, workdir: pathlib.Path, step: int | None, found: Mapping[str, float]
) -> dict[str, Any]:
    """What was found, one entry for each eval of it, by the name of its file: the layout of LAION's
    CLIP_benchmark, whose `build` command makes one table of many, and beside it the eval's own
    section."""
    names = (run.complete[part]["name"] for part in ("objective", "image", "text"))
    model, entries = "-".join(names), {}
    for spec in run.evals:
        evaluator, start = spec.config.evaluator or spec.name, f"{spec.name}/"
        own = {k.removeprefix(start): v for k, v in found.items() if k.startswith(start)}
        if not own:
            continue
        entries[f"{dataset(spec)}_{spec.name}.json"] = {
            "dataset": dataset(spec),
            "model": model,
            "pretrained": workdir.name + ("" if step is None else f"_{step}"),
            "task": spec.evaluator.task or evaluator,
            "metrics": {_benchmark_name(spec.evaluator, key): x for key, x in own.items()},
            "language": "en",
            "eval": run.complete["evals"][spec.name],
        }
    return entries


def _benchmark_name(evaluator: type[Evaluator], key: str) -> str:
    """CLIP_benchmark's name of a metric; its own where that has none."""
    known = declared(evaluator.metrics, key)
    return known and evaluator.metrics[known].benchmark or key


def table(found: Mapping[str, float]) -> list[str]:
    """Lines of aligned names and values."""
    width = max(map(len, found))
    return [f"  {name:{width}}  {value:.4f}" for name, value in found.items()]


def evaluate(workdir: str | os.PathLike, step: str, config: dict) -> dict[str, float]:
    """The metrics of every eval of `config`, by `<eval>/<metric>`, at the step of a workdir; also
    written to a file for each eval in its folder `evaluation_<step>`."""
    # which eval chose the best step is the workdir's to know, whatever is evaluated now
    config = config | {"train": config["train"] | {"best": ""}}
    run, state = restore(workdir, step, config=config)
    at, folder = int(state.step), pathlib.Path(workdir).expanduser().absolute()
    return _evaluate(
        run, state, folder, at, folder / f"evaluation_{at}", f"step {at:,} of {workdir}"
    )


def _evaluate(
    run: OpenRun,
    state: TrainState,
    name: pathlib.Path,
    step: int | None,
    into: pathlib.Path,
    title: str,
) -> dict[str, float]:
    """What every eval finds; printed and written as it comes, as a later one may find that its data
    is not for it."""
    if not run.evals:
        raise ConfigError(
            "config.evals", "nothing", "at least one eval", "--evals, or --config=FILE with evals"
        )
    encode, found, first = run.encode(state), {}, jax.process_index() == 0
    if first:
        prepare_workdir(into)
        print(title, flush=True)
    for key, evaluator in run.evaluators().items():
        own = evaluate_all({key: evaluator}, encode)
        found |= own
        if first:
            print("\n".join(table(own)))
            for file, entry in results(run, name, step, own).items():
                write_json(into / file, entry)
                print(f"written to {into / file}", flush=True)
    return found


def evaluate_file(
    path: str, evals: Mapping[str, Any], ignore: Sequence[str] = (), out: str = ""
) -> dict[str, float]:
    """The metrics of every eval, by `<eval>/<metric>`, of the model that open_clip or transformers
    keep at `path`; also written to a file for each eval in `out`, by default `evaluation` beside
    its weights. What differs from clipx's evaluation, such as "preprocessing", must be in `ignore`.
    """
    run, state = open_foreign(path, evals, ignore)
    file = pathlib.Path(path).expanduser().absolute()
    into = pathlib.Path(out or (file if file.is_dir() else file.parent) / "evaluation").absolute()
    return _evaluate(run, state, file, None, into, path)


def open_foreign(
    path: str,
    evals: Mapping[str, Any],
    ignore: Sequence[str] = (),
    *,
    devices: Sequence[Any] | None = None,
    mesh: Mapping[str, int] | None = None,
) -> tuple[OpenRun, TrainState]:
    """A run that can only evaluate, and its state, of the model that open_clip or transformers keep
    at `path`. ignore: as `config.init_ignore`; devices, mesh: as for `restore`."""
    model, tokenizer = pretrained.open_model(path)
    rows = len(jax.devices() if devices is None else devices)
    config = pretrained.sections(path, model, tokenizer) | {
        "data": {"source": "shapes"},  # not opened: nothing is trained
        "train": {"batch_size": rows, "total_steps": 1},
        "optimizer": {"freeze": [""]},  # a frozen optimizer keeps no moments
        "evals": evals,
        "init_from": path,
        "init_ignore": list(ignore),
        "mesh": dict(mesh or {}),
    }
    run = with_data(assemble(config, devices), rows, tokenizer)
    return run, init(run)
