"""Evaluates a trained run, or a model file of another library; prints and writes the metrics."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from clipx.config import binding, files, secrets
from clipx.config.binding import find
from clipx.errors import ConfigError
from clipx.evaluators.base import Evaluator, declared
from clipx.interop import named
from clipx.training import guesses, pretrained
from clipx.training.initial import init
from clipx.training.metric_table import metric, spelled
from clipx.training.run import OpenRun, Run, assemble, restore, with_data
from clipx.training.schema import EvalSpec
from clipx.training.shown import evaluated
from clipx.training.workdir import prepare_workdir, write_json
from clipx.types import Device, TrainState

_SOURCE_FLAGS = {"data": "examples", "train_data": "train_examples"}


def section(text: str, where: str) -> dict[str, Any]:
    """The config section of a data source, from a flag such as `source=tfds,name=cifar10`. Commas
    in brackets are part of a value. Raises `ConfigError` for anything but key=value pairs."""
    pairs = [pair.partition("=") for pair in re.split(r",(?![^(\[]*[)\]])", text)]
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
    """The config sections of the evals to run, by name.

    names: comma-separated; each is a key of `evals` or the name of an evaluator, which gets a new
    section. "": all of `evals`.
    sources: the flags `data` and `train_data`. If set, they replace the data source of every eval
    that reads that kind of data. Raises `ConfigError` for an unknown name or a missing source.
    """
    sections = {}
    for name in names.split(",") if names else evals:
        values = dict(evals.get(name, {}))
        try:
            evaluator = find("evaluators", values.get("evaluator") or name, Evaluator)
        except ConfigError as error:
            error.where = "--evals"
            raise
        for key, text in sources.items():
            field = binding.fields(evaluator).get(_SOURCE_FLAGS[key])
            if field and text:
                values[key] = section(text, f"--{key}")
            elif key == "data" and evaluator.pairs and name in evals:
                continue  # rows that the run holds out, if the section names no data
            elif field and field.default is dataclasses.MISSING and not values.get(key):
                fix = f"--{key}=source=folder,path=DIR"
                raise ConfigError(f"--{key}", "nothing", f"the source that {name} reads", fix)
        sections[name] = values
    return sections


def dataset(spec: EvalSpec) -> str:
    """A short name for the data of an eval, made from its path or its name, and its split."""
    if spec.held_out:
        return "held_out"
    source = spec.config.data or spec.values
    path = source.get("path") or source.get("name") or source.get("source") or spec.name
    first = secrets.cut(path if isinstance(path, str) else path[0])
    first = first.partition("?")[0] if "://" in first else first
    names = [re.sub(r"\{.*?\}|\*|\.\w+$", "", name) for name in first.split("/")[-2:]]
    names.append(str(source.get("split", "")))
    slugs = (re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") for name in names)
    return "-".join(filter(None, slugs))


def results(
    run: Run,
    workdir: pathlib.Path,
    step: int | None,
    metrics: Mapping[str, float],
    evaluators: Mapping[str, Evaluator] | None = None,
) -> dict[str, Any]:
    """One JSON entry for each eval that has metrics, by file name.

    The layout is that of LAION's CLIP_benchmark, whose `build` command makes one table of many such
    files. clipx's additions: "eval", the eval's config section; and of the open `evaluators`
    "sizes", what the metrics are of, and "chance", the metrics of a model that tells nothing apart.
    """
    names = (run.complete[part]["name"] for part in ("objective", "image", "text"))
    model, entries = "-".join(names), {}
    for spec in run.evals:
        evaluator, start = spec.config.evaluator or spec.name, f"{spec.name}/"
        values = {k.removeprefix(start): v for k, v in metrics.items() if k.startswith(start)}
        if not values:
            continue
        entries[f"{dataset(spec)}_{spec.name}.json"] = {
            "dataset": dataset(spec),
            "model": model,
            "pretrained": workdir.name + ("" if step is None else f"_{step}"),
            "task": spec.evaluator.task or evaluator,
            "metrics": {_benchmark_name(spec.evaluator, key): x for key, x in values.items()},
            "language": "en",
            "eval": run.complete["evals"][spec.name],
        }
        if evaluators:
            opened, entry = evaluators[spec.name], entries[f"{dataset(spec)}_{spec.name}.json"]
            chance = opened.chance().items()
            entry["sizes"] = opened.sizes()
            entry["chance"] = {_benchmark_name(spec.evaluator, key): x for key, x in chance}
    return entries


def _benchmark_name(evaluator: type[Evaluator], key: str) -> str:
    """CLIP_benchmark's name of a metric, or `key` if it has none."""
    known = declared(evaluator.metrics, key)
    return known and evaluator.metrics[known].benchmark or key


def table(metrics: Mapping[str, float], evals: Mapping[str, Any] | None = None) -> list[str]:
    """Lines of aligned names and values. evals: the config's section."""
    width, known = max(map(len, metrics)), evals or {}
    return [f"  {key:{width}}  {spelled(metric(key, known), x)}" for key, x in metrics.items()]


def evaluate(
    workdir: str | os.PathLike, step: str, config: dict, *, average: bool = False
) -> dict[str, float]:
    """The metrics of every eval of `config`, by `<eval>/<metric>`, at a step of a workdir. Also
    writes one file per eval to the workdir's folder `evaluation_<step>`.

    step: a number, "latest" or "best". average: evaluate the averages of the parameters, and write
    to `evaluation_average_<step>`.
    """
    # `train.best` may name an eval that is not evaluated now; the workdir already knows the best
    config = config | {"train": config["train"] | {"best": ""}}
    run, state = restore(workdir, step, config=config, average=average)
    at, folder = int(state.step), pathlib.Path(workdir).expanduser().absolute()
    into = folder / f"evaluation_{'average_' * average}{at}"
    title = f"step {at:,} of {workdir}" + ", averaged parameters" * average
    return _evaluate(run, state, folder, at, into, title)


def _evaluate(
    run: OpenRun,
    state: TrainState,
    name: pathlib.Path,
    step: int | None,
    into: pathlib.Path,
    title: str,
) -> dict[str, float]:
    """The metrics of every eval, by `<eval>/<metric>`. Prints and writes each eval's metrics before
    the next starts, because a later eval may still reject its data."""
    if not run.evals:
        raise ConfigError(
            "config.evals", "nothing", "at least one eval", "--evals, or --config=FILE with evals"
        )
    encode, metrics, first = run.encode(state), {}, jax.process_index() == 0
    evaluators = run.evaluators()
    sources = guesses.sources(None, evaluators)
    run = dataclasses.replace(run, complete=guesses.put(run.complete, guesses.made(sources)))
    if first:
        prepare_workdir(into)
        print(title, flush=True)
        for where, source in sources.items():
            print("".join(f"{line}\n" for line in guesses.lines(where, source)), end="", flush=True)
    for key, evaluator in evaluators.items():
        if first:
            print("".join(f"{key}: {note}\n" for note in evaluator.notes()), end="", flush=True)
        values = evaluated({key: evaluator}, encode)
        metrics |= values
        if first:
            print("\n".join(table(values, run.complete["evals"])))
            for file, entry in results(run, name, step, values, {key: evaluator}).items():
                write_json(into / file, entry)
                print(f"written to {into / file}", flush=True)
    return metrics


def evaluate_file(
    path: str, evals: Mapping[str, Any], ignore: Sequence[str] = (), out: str = ""
) -> dict[str, float]:
    """The metrics of every eval, by `<eval>/<metric>`, for a model of open_clip or transformers at
    `path`.

    evals: the sections of the evals.
    ignore: names of what may differ from clipx's evaluation, such as "preprocessing".
    out: the folder for one file per eval; default: `evaluation` beside the model's weights.
    """
    run, state = open_foreign(path, evals, ignore)
    file = pathlib.Path(named.split(path)[1]).expanduser().absolute()
    into = pathlib.Path(out or (file if file.is_dir() else file.parent) / "evaluation").absolute()
    return _evaluate(run, state, file, None, into, path)


def open_foreign(
    path: str,
    evals: Mapping[str, Any],
    ignore: Sequence[str] = (),
    *,
    devices: Sequence[Device] | None = None,
    mesh: Mapping[str, int] | None = None,
) -> tuple[OpenRun, TrainState]:
    """A run that can only evaluate, and its state, of the model that open_clip or transformers keep
    at `path`. ignore: as `config.init_ignore`; devices, mesh: as for `restore`."""
    model, tokenizer = pretrained.open_model(path)
    rows = 2 * len(jax.devices() if devices is None else devices)  # the least that trains
    sections = pretrained.sections(path, model, tokenizer)
    config = sections | {
        # a source that is never opened, because nothing is trained
        "data": {"source": "shapes"} | sections["data"],
        "train": {"batch_size": rows, "total_steps": 1},
        "optimizer": {"freeze": [""]},  # all parameters, so that the optimizer has no moments
        "evals": evals,
        "init_from": path,
        "init_ignore": list(ignore),
        "mesh": dict(mesh or {}),
    }
    assert tokenizer is not None  # else `sections` has raised
    run = with_data(assemble(config, devices), rows, tokenizer)
    for name in run.held_out_evals:
        where = f"config.evals.{name}.data"
        raise ConfigError(
            where, "nothing", "a source", f"--evals={name} --data=source=...,path=..."
        )
    return run, init(run)
