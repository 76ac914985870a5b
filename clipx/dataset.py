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

import functools
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags
from tqdm import tqdm

from clipx import cli
from clipx.data import pack as packing
from clipx.data import pictures, storage
from clipx.data import verify as verifying
from clipx.data.base import fingerprint
from clipx.data.manifests import describe
from clipx.data.order import share
from clipx.data.sources.webdataset import index_shards
from clipx.errors import ConfigError, RunError
from clipx.planning import feed_comparison, feed_speed
from clipx.reporting import data_page
from clipx.training.alone import open_alone
from clipx.training.schema import EvalSpec, SourceSpec, data_section

_BENCHMARK = pathlib.Path(__file__).parents[1] / "benchmarks" / "torch_loader.py"


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
    sources = list(data_section(config.get("data"))[1].parts("config.data"))
    for name, section in config.get("evals", {}).items():
        for field, spec in EvalSpec.check(name, section).sources.items():
            key = "train_data" if field.startswith("train") else "data"
            sources += spec.parts(f"config.evals.{name}.{key}")
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
    data, spec = data_section(config.get("data"))
    count, reports = verifying.token_counter(config.get("tokenizer")), {}
    for where, part in spec.parts("config.data"):
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


def show_fingerprint(config: Mapping[str, Any]) -> None:
    """Prints how many rows a run has, of how many, and the digest of their keys."""
    data, spec = data_section(config.get("data"))
    source = share(spec.open(), data.fraction)
    print(describe(len(source), fingerprint(source), spec.name, data.manifest))


def pack(config: Mapping[str, Any], output: str, size: str = "512MB") -> None:
    """Writes the data as tar shards into the folder `output`."""
    spec = data_section(config.get("data"))[1]
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


def preview(config: Mapping[str, Any], output: str = "preview.html", rows: int = 16) -> None:
    """Writes a page of the first rows of the config's run, as its model will see them."""
    run, data = open_alone(config)
    page, count = data_page.build(run, data, rows)
    print(f"{count} rows of {len(data):,}: {_write(output, page)}")


def time_feed(
    config: Mapping[str, Any],
    *,
    steps: int = 20,
    model: bool = False,
    images_per_second: float | None = None,
) -> None:
    """Prints what each stage of the feed costs, what the whole gives, and whether a model that
    takes so many pictures a second would wait for it."""
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
    print(feed_speed.verdict(1 / stages[-1].cpu, images_per_second, cores))


def time_against_torch() -> None:
    """Prints a table of clipx's feed beside a PyTorch DataLoader, on drawn pictures."""
    say = lambda text: print(f"{text} ...", file=sys.stderr)  # noqa: E731
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
    flags.DEFINE_string("config", None, "Config: clip, path.py, or either with :variant.")
    flags.DEFINE_string("output", "", "preview, verify: the file to write. pack: the folder.")
    flags.DEFINE_integer("rows", 16, "preview: rows on the page.", lower_bound=1)
    flags.DEFINE_string("shard_size", "512MB", "pack: most of a shard; 2GB, or 10000rows.")
    flags.DEFINE_integer("steps", 20, "bench: batches of the whole feed.", lower_bound=1)
    flags.DEFINE_enum("against", None, ["torch"], "bench: another loader to run beside.")
    flags.DEFINE_bool("model", False, "bench: times the training step here too.")
    flags.DEFINE_float("images_per_second", None, "bench: what the model takes.", lower_bound=0)
    cli.run(functools.partial(main, take_command(sys.argv)), required=())
