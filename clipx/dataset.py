"""`python -m clipx.dataset COMMAND --config=configs/clip.py`: inspects the data of a config.

    index        reads the headers of all shards, of the data and the evals, and caches them
    preview      writes a page of pictures, captions, views and tokens as the model will see them
    verify       decodes every row; reports bad rows, sizes, captions and duplicates; exits with 2
                 if too many rows are bad; --against=TEST counts pictures of a test set in the data
    fingerprint  prints the number of rows and the digest of their keys. Tars and a table of one
                 set of pictures name their rows otherwise, and have two
    pack         writes any source as tar shards into --output
    bench        times data loading stage by stage, and says how many cores a model needs

The config names the data; `--config.data.path=...` and other overrides apply. Only `preview` and
`bench` need more of the config than its data section. `index`, `verify` and `pack` take all rows,
whatever `data.fraction` a run uses. `bench --against=torch` needs no config: it makes its own
pictures.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags

from clipx import cli
from clipx.config import secrets
from clipx.data import holdout, overlap, pictures, storage
from clipx.data import pack as packing
from clipx.data import verify as verifying
from clipx.data.base import Source, fingerprint
from clipx.data.manifests import describe
from clipx.data.resolve import resolve
from clipx.data.shard_index import index_shards
from clipx.data.threads import progress_bar
from clipx.errors import ConfigError, RunError
from clipx.planning import feed_comparison, feed_speed
from clipx.reporting import data_page
from clipx.serving import given_source
from clipx.training import guesses
from clipx.training.alone import open_alone
from clipx.training.schema import EVAL_SOURCES, EvalSpec, SourceSpec, data_section

_BENCHMARK = pathlib.Path(__file__).parents[1] / "benchmarks" / "torch_loader.py"


def _write(path: str, text: str) -> pathlib.Path:
    """Writes a file atomically, without secrets, and returns its absolute path."""
    file = pathlib.Path(path).expanduser().absolute()
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        unfinished.write_text(secrets.cut(text), "utf-8", "backslashreplace")
        unfinished.replace(file)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise RunError(f"cannot write {file}: {error.strerror}") from None
    return file


def index(config: Mapping[str, Any]) -> None:
    """Opens every source of the config. Afterwards sharded sources open from the cache."""
    config = resolve(config)
    sources = list(data_section(config.get("data"))[1].parts("config.data"))
    for name, section in config.get("evals", {}).items():
        for field, spec in EvalSpec.check(name, section).sources.items():
            sources += spec.parts(f"config.evals.{name}.{EVAL_SOURCES[field]}")
    for where, spec in sources:
        start, shards = time.perf_counter(), ""
        if spec.name == "webdataset":
            shards = f" in {_index_shards(where, spec)} shards"
        source = spec.open()
        seconds = time.perf_counter() - start
        print(f"{where}: {spec.name}, {len(source):,} rows{shards}, {seconds:.1f} s")
        _print_lines(where, source)
    print(f"shard indexes are cached in {storage.cache_folder()}")


def _index_shards(where: str, spec: SourceSpec) -> int:
    """Reads the headers of all shards of a source, and returns the number of shards."""
    with progress_bar(0, where, " shards") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        keep = spec.values.get("truncated") == "keep"
        return len(index_shards(spec.values["path"], keep=keep, progress=progress))


def _print_lines(where: str, source: Source) -> None:
    """Prints what a source guessed, and the account of its files if something was left out."""
    for line in guesses.lines(where.removeprefix("config."), source):
        print(line)


def verify(config: Mapping[str, Any], output: str = "", against: str = "") -> int:
    """Decodes every row, prints a report of each source, and writes the reports to `output`.

    against: a path, or a source as `source=folder,path=DIR`: also reports its pictures that are in
    the data. Returns the exit code: 2 if more rows are bad than `data.max_bad_fraction` allows,
    else 0.
    """
    data, spec = data_section(config.get("data"))
    test = None
    if against:
        test = given_source.opened(given_source.sections(against, "--against"), "--against")
    count, reports = verifying.token_counter(config.get("tokenizer")), {}
    sources = []
    for where, part in spec.parts("config.data"):
        source = part.open()
        sources.append(source)
        with progress_bar(len(source), where) as bar:
            report = verifying.verify(source, count_tokens=count, progress=bar.update)
        reports[where] = report
        print(f"{where}: {part.name}")
        _print_lines(where, source)
        print("\n".join(verifying.table(report)))
    bad = sum(len(report["bad"]) for report in reports.values())
    rows = sum(report["rows"] for report in reports.values())
    if test is not None:
        with progress_bar(rows + len(test), "--against") as bar:
            reports["against"] = overlap.against(sources, test, bar.update)
        print(f"--against={against}")
        print("\n".join(overlap.table(reports["against"])))
    if output:
        text = json.dumps(reports, indent=1, ensure_ascii=False)
        print(f"written to {_write(output, text + chr(10))}")
    if bad <= data.max_bad_fraction * rows:
        return 0
    print(
        f"{bad:,} of {rows:,} rows cannot be used, more than config.data.max_bad_fraction="
        f"{data.max_bad_fraction}: a run would stop"
    )
    return cli.EXIT_CONFIG


def show_fingerprint(config: Mapping[str, Any]) -> None:
    """Prints the number of rows that a run trains on, and the digest of their keys."""
    data, spec = data_section(config.get("data"))
    evals = {name: EvalSpec.check(name, values) for name, values in config.get("evals", {}).items()}
    held_out = [name for name, eval_spec in evals.items() if eval_spec.held_out]
    source = holdout.split(spec.open(), data, held_out).train
    print(describe(len(source), fingerprint(source), spec.name, data.manifest))


def pack(config: Mapping[str, Any], output: str, size: str = "512MB") -> None:
    """Writes the data as tar shards into the folder `output`."""
    spec = data_section(config.get("data"))[1]
    if spec.name == "mixture":
        raise ConfigError(
            "config.data.source",
            "'mixture', whose rows repeat",
            "a source that is not a mixture",
            "pack each part of the mixture on its own, then mix the packed parts",
        )
    try:
        limit = packing.shard_size(size)
    except ValueError:
        raise ConfigError("--shard_size", repr(size), "512MB, 2GB or 10000rows") from None
    source = spec.open()
    with progress_bar(len(source), "packing") as bar:
        packed = packing.pack(source, output, **limit, progress=bar.update)
    for bad in packed.skipped[:20]:
        print("left out: row {row:,}, {key}: {reason}".format(**bad))
    print(
        f"{packed.rows:,} rows in {packed.shards:,} shards in {output}, {len(packed.skipped):,} "
        f"rows left out; {packing.FILE} in that folder lists them"
    )
    print("\n".join(packing.config_lines(output, source)))


def preview(config: Mapping[str, Any], output: str = "preview.html", rows: int = 16) -> None:
    """Writes a page of the first rows of the config's data, as the model will see them."""
    run, data = open_alone(config)
    _print_lines("config.data", data.source)
    page, count = data_page.build(run, data, rows)
    print(f"{count} rows of {len(data):,}: {_write(output, page)}")


def time_feed(
    config: Mapping[str, Any],
    *,
    steps: int = 20,
    model: bool = False,
    images_per_second: float | None = None,
) -> None:
    """Prints the time of each loading stage, the loader's rate over `steps` batches, and whether
    the model would wait for it.

    images_per_second: what the model takes on one process. With `model` it is measured here.
    """
    run, data = open_alone(config)
    loader = feed_speed.sample_loader(run, data)
    stages = feed_speed.run_stages(run, loader)
    print("\n".join(feed_speed.table(stages)))
    workers, cores = run.data.workers, pictures.cores()
    how = f"{workers} processes" if workers else f"{cores} threads"
    print(f"{how} feed {feed_speed.rate(loader, steps):,.0f} images/s of {len(data):,} rows")
    if model:
        images_per_second, count = feed_speed.model_rate(config)
        print(f"the model takes {images_per_second:,.0f} images/s on {count} device(s) a process")
    seconds = stages[-1].cpu
    assert seconds is not None  # the last stage is the loader itself, on the CPU
    print(feed_speed.verdict(1 / seconds, images_per_second, cores))


def time_against_torch() -> None:
    """Prints a table of clipx's loader beside PyTorch's DataLoader, on generated pictures."""

    def say(text: str) -> None:
        print(f"{text} ...", file=sys.stderr)

    print("\n".join(feed_comparison.markdown(feed_comparison.against(_BENCHMARK, say=say))))


def _bench(config: Mapping[str, Any]) -> None:
    values = flags.FLAGS
    time_feed(
        config,
        steps=values.steps,
        model=values.model,
        images_per_second=values.images_per_second,
    )


def _pack(config: Mapping[str, Any]) -> None:
    if not flags.FLAGS.output:
        raise ConfigError("--output", "nothing", "a new folder for the shards", "set --output=DIR")
    pack(config, flags.FLAGS.output, flags.FLAGS.shard_size)


COMMANDS: dict[str, Callable[[Mapping[str, Any]], int | None]] = {
    "index": index,
    "preview": lambda config: preview(
        config, flags.FLAGS.output or "preview.html", flags.FLAGS.rows
    ),
    "verify": lambda config: verify(config, flags.FLAGS.output, flags.FLAGS.against or ""),
    "fingerprint": show_fingerprint,
    "pack": _pack,
    "bench": _bench,
}


def take_command(argv: list[str]) -> str:
    """The command, removed from `argv`. Exits with code 2 and one line if there is none."""
    name = argv[1] if len(argv) > 1 else ""
    if name in COMMANDS:
        return argv.pop(1)
    if not any(argument.startswith("--help") for argument in argv):
        found = repr(name) if name and not name.startswith("-") else "nothing"
        names = ", ".join(COMMANDS)
        print(f"python -m clipx.dataset: found {found}, expected one of {names}", file=sys.stderr)
        sys.exit(cli.EXIT_CONFIG)
    return "index"


def main(command: str, overrides: Sequence[tuple[str, str]]) -> int | None:
    against = flags.FLAGS.against
    if against and command != "verify" and (command, against) != ("bench", "torch"):
        raise ConfigError(
            "--against",
            f"{against!r}, of the command {command}",
            "torch for bench, or a path or source=...,path=... for verify",
        )
    if command == "bench" and against:
        return time_against_torch()  # it needs no config: it makes its own pictures
    if not flags.FLAGS.config:
        raise ConfigError("--config", "nothing", "--config=...")
    return COMMANDS[command](cli.load_config(flags.FLAGS.config, overrides))


if __name__ == "__main__":
    flags.DEFINE_string("config", None, "Config: clip, path.py, or either with :variant.")
    flags.DEFINE_string("output", "", "preview, verify: the file to write. pack: the folder.")
    flags.DEFINE_integer("rows", 16, "preview: number of rows on the page.", lower_bound=1)
    flags.DEFINE_string("shard_size", "512MB", "pack: limit of a shard, as 2GB or 10000rows.")
    flags.DEFINE_integer("steps", 20, "bench: batches to load at full speed.", lower_bound=1)
    flags.DEFINE_string(
        "against",
        None,
        "bench: torch, another loader to compare with. verify: a test set, as a path or as "
        "source=folder,path=DIR; counts its pictures that are in the data.",
    )
    flags.DEFINE_bool("model", False, "bench: also time the training step on this machine.")
    flags.DEFINE_float(
        "images_per_second", None, "bench: images/s that the model takes.", lower_bound=0
    )

    cli.run(functools.partial(main, take_command(sys.argv)), required=())
