"""`python -m clipx.dataset COMMAND --config=configs/clip.py`: looks at the data of a config.

    index        reads the headers of every source, data and evals, and keeps what they say
    preview      writes a page of pictures, captions, views and tokens as the model will see them
    verify       decodes everything: bad rows, sizes, captions, doubles; exit code 2 if too many bad
    fingerprint  counts the rows, and digests their keys
    pack         writes any source as tar shards into --output
    bench        times the feed stage by stage, and says how many cores a model needs

The config says which data, and `--config.data.path=...` or any other override says otherwise. All
but `preview` and `bench` need its data alone; `index`, `verify` and `pack` take all rows, whatever
`data.fraction` a run uses. `bench --against=torch` needs no config: it draws its own pictures.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from clipx import cli
from clipx.config import binding as configs
from clipx.config.binding import bind
from clipx.data import pack as packing
from clipx.data import pictures, storage
from clipx.data import verify as verifying
from clipx.data.base import fingerprint
from clipx.data.loader import share
from clipx.data.manifests import describe
from clipx.data.sources.webdataset import index_shards
from clipx.data.text import tokenizers
from clipx.errors import ConfigError, RunError
from clipx.planning import feed_speed, measure
from clipx.reporting import preview as previews
from clipx.training.feed import TrainingData, loader, open_data, to_batch
from clipx.training.initial import open_tokenizer
from clipx.training.run import OpenRun, Run, assemble, with_data
from clipx.training.schema import DataConfig, EvalSpec, SourceSpec, split
from clipx.training.step import row_keys

_BENCHMARK = pathlib.Path(__file__).parents[1] / "benchmarks" / "torch_loader.py"
_TIMED = 256  # rows of a batch that are timed, at most


def _section(config: Mapping[str, Any]) -> tuple[DataConfig, SourceSpec]:
    """The config's data, checked alone: the other sections may be wrong, or not there."""
    if not isinstance(config.get("data"), Mapping):
        raise ConfigError("config.data", "nothing", "a section with a source", "set config.data")
    data, rest = split(config["data"], DataConfig, "config.data")
    spec = SourceSpec.check(rest, data.source, "config.data", configs.fields(DataConfig))
    return data, spec


def _parts(where: str, spec: SourceSpec) -> Iterator[tuple[str, SourceSpec]]:
    """The sources that files stand behind, with their places in the config: those of a mixture."""
    if spec.name != "mixture":
        yield where, spec
        return
    for name, section in spec.values["parts"].items():
        own, section = f"{where}.parts.{name}", dict(section)
        section.pop("weight", None)
        yield from _parts(own, SourceSpec.check(section, section.pop("source"), own))


def _bar(total: int, what: str, unit: str = " rows") -> tqdm:
    """A progress bar, where somebody watches."""
    return tqdm(total=total, desc=what, unit=unit, dynamic_ncols=True, disable=None)


def _write(path: str, text: str) -> pathlib.Path:
    """Writes a file whole or not at all."""
    file = pathlib.Path(path).expanduser().absolute()
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, "utf-8", "backslashreplace")
        unfinished.replace(file)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise RunError(f"cannot write {file}: {error.strerror}") from None
    return file


def index(config: Mapping[str, Any]) -> None:
    """Opens every source of the config, after which those of shards open from the cache."""
    sources = list(_parts("config.data", _section(config)[1]))
    for name, section in config.get("evals", {}).items():
        for field, spec in EvalSpec.check(name, section).sources.items():
            key = "train_data" if field.startswith("train") else "data"
            sources += _parts(f"config.evals.{name}.{key}", spec)
    for where, spec in sources:
        start, said = time.perf_counter(), ""
        if spec.name == "webdataset":
            said = f" in {_index_shards(where, spec)} shards"
        rows = len(spec.open())
        print(f"{where}: {spec.name}, {rows:,} rows{said}, {time.perf_counter() - start:.1f} s")
    print(f"indexes of shards are kept in {storage.cache_folder()}")


def _index_shards(where: str, spec: SourceSpec) -> int:
    """How many shards there are, their headers read."""
    with _bar(0, where, " shards") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        keep = spec.values.get("truncated") == "keep"
        return len(index_shards(spec.values["path"], keep=keep, progress=progress))


def verify(config: Mapping[str, Any], output: str = "") -> int:
    """Prints what the data is made of, part by part, writes it to `output`, and returns the exit
    code: 2 where more rows are bad than `data.max_bad_fraction` allows."""
    data, spec = _section(config)
    count, reports = _count_tokens(config), {}
    for where, part in _parts("config.data", spec):
        source = part.open()
        with _bar(len(source), where) as bar:
            report = verifying.verify(source, count_tokens=count, progress=bar.update)
        reports[where] = report
        print(f"{where}: {part.name}")
        print("\n".join(verifying.table(report)))
    if output:
        text = json.dumps(reports, indent=1, ensure_ascii=False)
        print(f"written to {_write(output, text + chr(10))}")
    bad, rows = (sum(map(f, reports.values())) for f in (lambda r: len(r["bad"]), _rows_of))
    if bad <= data.max_bad_fraction * rows:
        return 0
    print(
        f"{bad:,} of {rows:,} rows cannot be used, more than config.data.max_bad_fraction="
        f"{data.max_bad_fraction}: a run would stop"
    )
    return cli.EXIT_CONFIG


def _rows_of(report: Mapping[str, Any]) -> int:
    return report["rows"]


def _count_tokens(config: Mapping[str, Any]) -> Callable[[str], int] | None:
    """What says how many tokens a caption has, uncut; None without a tokenizer, and where one
    would first have to be trained."""
    section = config.get("tokenizer")
    if section is None:
        return None
    bound = bind(tokenizers.TokenizerConfig, section, where="config.tokenizer")
    if bound.name == "sentencepiece" and not bound.path:
        return None
    tokenizer = tokenizers.build(bound)
    return lambda text: len(tokenizer.body(text)) + 2  # its marks


def show_fingerprint(config: Mapping[str, Any]) -> None:
    """Prints how many rows a run has, of how many, and the digest of their keys."""
    data, spec = _section(config)
    source = share(spec.open(), data.fraction)
    print(describe(len(source), fingerprint(source), spec.name, data.manifest))


def pack(config: Mapping[str, Any], output: str, size: str = "512MB") -> None:
    """Writes the data as tar shards into the folder `output`."""
    spec = _section(config)[1]
    if spec.name == "mixture":
        raise ConfigError(
            "config.data.source", "'mixture', whose rows repeat", "a source without parts",
            "pack its parts one by one, and mix what was packed",
        )  # fmt: skip
    try:
        most = packing.shard_size(size)
    except ValueError:
        raise ConfigError("--shard_size", repr(size), "512MB, 2GB or 10000rows") from None
    source = spec.open()
    with _bar(len(source), "packing") as bar:
        packed = packing.pack(source, output, **most, progress=bar.update)
    for bad in packed.skipped[:20]:
        print("left out: row {row:,}, {key}: {reason}".format(**bad))
    print(
        f"{packed.rows:,} rows in {packed.shards:,} shards in {output}, {len(packed.skipped):,} "
        f"left out; {packing.FILE} there says which"
    )
    print("\n".join(packing.config_lines(output, source)))


def _run(config: Mapping[str, Any]) -> tuple[OpenRun, TrainingData]:
    """The run of a config on one device, its data open: any batch that the data can fill will do,
    and there are no evals."""
    alone = {**config, "mesh": {}, "evals": {}, "train": {**config.get("train", {}), "best": ""}}
    run = assemble(alone, jax.devices()[:1])
    data = open_data(run)
    tokenizer = open_tokenizer(run, data.source)
    if len(data) < run.batch_size:
        alone["train"] |= {"batch_size": max(len(data), 1), "microbatches": 1}
        run = assemble(alone, jax.devices()[:1])
    return with_data(run, len(data), tokenizer), data


def preview(config: Mapping[str, Any], output: str = "preview.html", rows: int = 16) -> None:
    """Writes a page of the first rows of the config's run, as its model will see them."""
    run, data = _run(config)
    seen, views = previews.Remembering(data.source), run.objective.views
    positions = np.arange(min(rows, run.batch_size))
    pieces = loader(run, dataclasses.replace(data, source=seen), positions).load(0, positions)
    after = [np.asarray(view) for view in _after_photometry(run, pieces)]
    facts = [
        (f"{len(data):,}", "rows"),
        (run.data.source, "source"),
        (run.complete["objective"]["name"], "objective"),
        (str(len(after)), "picture views"),
        (str(len(views.texts)), "text views"),
        (run.config.tokenizer.name, f"{run.tokenizer.vocab_size:,} ids"),
    ]
    said = [previews.describe(*view) for view in views.pictures]
    notes = [(f"view {i}", text) for i, text in enumerate(said, 1)]
    text = previews.page(
        run.data.manifest or str(run.source.values.get("path", run.data.source)),
        facts,
        [*notes, ("texts", ", ".join(views.texts))],
        list(previews.shown(seen, pieces, after, views.texts)),
        run.tokenizer,
    )
    print(f"{len(positions)} rows of {len(data):,}: {_write(output, text)}")


def _after_photometry(run: Run, pieces: Mapping[str, np.ndarray]) -> Iterator[jax.Array]:
    """Each picture view as the towers get it at step 0, before it is normalised."""
    rows = len(pieces["row"])
    batch = to_batch(pieces, run.mesh, np.arange(rows), rows)
    keys = row_keys(run.config.seed, 0, rows)
    for view in range(len(run.objective.views.pictures)):
        yield run.objective.picture(batch, keys, view)


def time_feed(
    config: Mapping[str, Any],
    *,
    steps: int = 20,
    model: bool = False,
    images_per_second: float | None = None,
) -> None:
    """Prints what each stage of the feed costs, what the whole gives, and whether a model that
    takes so many pictures a second would wait for it."""
    run, data = _run(config)
    positions = np.arange(min(run.batch_size, _TIMED))
    feed = loader(run, data, positions)
    stages = feed_speed.stages(feed, len(positions) * 2)
    print("\n".join(feed_speed.table([*stages[:-1], *_device_stages(run, feed), stages[-1]])))
    how = f"{feed.workers} processes" if feed.workers else f"{pictures.cores()} threads"
    print(f"{how} feed {feed_speed.rate(feed, steps):,.0f} images/s of {len(data):,} rows")
    if model:
        whole = assemble({**config, "evals": {}, "train": {**config["train"], "best": ""}})
        seconds = statistics.median(measure.time_steps(whole, steps=5))
        images_per_second = whole.batch_size / seconds / jax.process_count()
        count = whole.mesh.devices.size
        print(f"the model takes {images_per_second:,.0f} images/s on {count} device(s) a process")
    print(feed_speed.verdict(1 / stages[-1].cpu, images_per_second, pictures.cores()))


def _device_stages(run: Run, feed: feed_speed.Feed) -> Iterator[feed_speed.Stage]:
    """The transfer of pictures to one device and, if there is any, their photometry there."""
    pieces = feed.load(0, feed.positions)
    count = len(feed.positions)
    yield feed_speed.Stage(
        "transfer", None, _median(lambda: jax.device_put(pieces["image"])) / count
    )
    policies = [view.photometry for view in run.objective.views.pictures]
    if any(p.jitter or p.grey or p.blur or p.solarise for p in policies):
        seconds = _median(lambda: list(_after_photometry(run, pieces)))
        yield feed_speed.Stage("photometry, on the device", None, seconds / count)


def _median(function: Callable[[], Any], times: int = 5) -> float:
    """Seconds of a call, after one that does not count."""
    seconds = []
    for _ in range(times + 1):
        start = time.perf_counter()
        jax.block_until_ready(function())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def time_against_torch() -> None:
    """Prints a table of clipx's feed beside a PyTorch DataLoader, on drawn pictures."""
    found = feed_speed.against(_BENCHMARK, say=lambda text: print(f"{text} ...", file=sys.stderr))
    print("\n".join(feed_speed.markdown(found)))


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
        raise ConfigError("--output", "nothing", "a new folder for the shards", "--output=DIR")
    pack(config, flags.FLAGS.output, flags.FLAGS.shard_size)


COMMANDS: dict[str, Callable[[Mapping[str, Any]], int | None]] = {
    "index": index,
    "preview": lambda config: preview(
        config, flags.FLAGS.output or "preview.html", flags.FLAGS.rows
    ),
    "verify": lambda config: verify(config, flags.FLAGS.output),
    "fingerprint": show_fingerprint,
    "pack": _pack,
    "bench": _bench,
}


def take_command(argv: list[str]) -> str:
    """The command, taken out of `argv`; exits with one line where there is none."""
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
    if command == "bench" and flags.FLAGS.against:
        return time_against_torch()  # on pictures of its own
    if not flags.FLAGS.config:
        raise ConfigError("--config", "nothing", "--config=...")
    return COMMANDS[command](cli.load_config(flags.FLAGS.config, overrides))


if __name__ == "__main__":
    flags.DEFINE_string("config", None, "Config file, path.py or path.py:variant.")
    flags.DEFINE_string("output", "", "preview, verify: the file to write. pack: the folder.")
    flags.DEFINE_integer("rows", 16, "preview: rows on the page.", lower_bound=1)
    flags.DEFINE_string("shard_size", "512MB", "pack: most of a shard; 2GB, or 10000rows.")
    flags.DEFINE_integer("steps", 20, "bench: batches of the whole feed.", lower_bound=1)
    flags.DEFINE_enum("against", None, ["torch"], "bench: another loader to run beside.")
    flags.DEFINE_bool("model", False, "bench: times the training step here too.")
    flags.DEFINE_float("images_per_second", None, "bench: what the model takes.", lower_bound=0)
    cli.run(functools.partial(main, take_command(sys.argv)), required=())
