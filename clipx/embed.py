"""`python -m clipx.embed --config=FILE --tower=image --out=FOLDER`: runs a tower over every row of
a config's data, once, and writes its features. A run whose tower is frozen below its head trains
from them, with `config.data.features.image=FOLDER`, and reads no pictures.

    --tower   image or text. Of texts, every caption of every row is written
    --views   random crops of each picture, as the config's objective makes them, of which a run
              takes others each time. Without it, the centre of each picture, as evaluation sees it
    --tokens  features of every patch or word too, for objectives that compare them (FILIP)

The weights are those that a run of the config starts from: `image.init_from`, `init_from`, or new
ones. The folder has all rows of the data set, whatever `data.fraction` a run uses. If the command
is stopped, the same command goes on.

`python -m clipx.embed --layout=clip_retrieval --model=WORKDIR --data=PATH --out=FOLDER` writes the
embeddings of a trained model for search: `clipx.search`, autofaiss and clip-retrieval open the
folder as it is.

    --model   a workdir, a checkpoint, or a model of open_clip or transformers
    --data    a folder of pictures, a table, tars; or a source, as source=table,path=t.csv
    --shard   2/8 is the third of eight parts, for eight commands at a time, each on its own device
"""

from __future__ import annotations

import functools
import os
import pathlib
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import flags

from clipx import cli
from clipx.data.base import expand_user
from clipx.data.features import FILE
from clipx.errors import ConfigError, Interrupted, RunError
from clipx.parallel import processes
from clipx.serving import given_source
from clipx.serving.embeddings import Embeddings, Shard
from clipx.serving.model import load
from clipx.training.embedding import open_embedder
from clipx.training.stop import Stop

_ALL = Shard()


def embed(
    config: Mapping[str, Any],
    out: str,
    *,
    tower: str,
    views: int = 0,
    tokens: bool = False,
    overwrite: bool = False,
) -> int:
    """Writes the features of a tower to the folder `out`, and returns the exit code. Arguments are
    the command's flags."""
    folder = pathlib.Path(expand_user(out))
    if (folder / FILE).exists() and not overwrite:
        raise ConfigError("--out", f"{out}, which has features", "a new folder", "--overwrite")
    with Stop() as stop:
        embedder = open_embedder(
            config, tower, folder, views=views, tokens=tokens, stop=stop, tell=print
        )
        try:
            embedder.write()
        except Interrupted:
            embedder.tell("stopped on request; run the same command to continue")
            return cli.EXIT_PREEMPTED
    embedder.tell(f"--config.data.features.{tower}={out}")
    return 0


def embed_for_search(
    model: str,
    data: str,
    out: str,
    *,
    shard: Shard = _ALL,
    step: str = "",
    ignore: Sequence[str] = (),
    batch_size: int = 256,
    overwrite: bool = False,
) -> int:
    """Writes embeddings in clip-retrieval's layout to the folder `out`, and returns the exit code.
    Arguments are the command's flags."""
    section = given_source.sections(data, "--data", alone=True)
    section = {**section, **({"path": _absolute(section["path"])} if "path" in section else {})}
    model = _absolute(model)
    source = given_source.opened(section, "--data")
    loaded = load(model, step=step, init_ignore=ignore, batch_size=batch_size)
    if not loaded.inner_product:
        method = loaded.config["objective"]["name"]
        found = f"{model}, of the method {method}, which compares rows by more than inner products"
        raise ConfigError("--model", found, "a model whose scores are inner products")
    folder = pathlib.Path(expand_user(out))
    if overwrite:
        (folder / shard.name("embeddings", ".json")).unlink(missing_ok=True)
    with Stop() as stop:
        options: dict[str, Any] = {
            "shard": shard,
            "stop": stop,
            "tell": functools.partial(print, flush=True),
        }
        try:
            Embeddings(loaded, model, source, section, folder, **options).write()
        except Interrupted:
            print("stopped on request; run the same command to continue", flush=True)
            return cli.EXIT_PREEMPTED
    print(f'python -m clipx.search --embeddings={shlex.quote(out)} --text="..."')
    return 0


def _absolute(path: Any) -> Any:
    """A path of this machine as a search finds it from any folder. Names of variables stay."""
    if not isinstance(path, str) or "://" in path or path.startswith(("$", "~")):
        return path
    return os.path.abspath(path)


def _shard(text: str) -> Shard:
    """The shard that `2/8` names. Raises `ConfigError`."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        expected = "NUMBER/COUNT, numbers from 0, such as 0/8 to 7/8"
        raise ConfigError("--shard", repr(text), expected)
    return Shard(int(number), int(count))


def _main_for_search(overrides: list[tuple[str, str]]) -> int:
    values = flags.FLAGS
    if overrides or values.config or values.tower or values.views or values.tokens:
        raise ConfigError(
            "--layout",
            "clip_retrieval, with flags of the layout features",
            "--model, --data, --out and --shard: the model has its config",
        )
    for name in ("model", "data"):
        if not values[name].value:
            raise ConfigError(f"--{name}", "nothing", f"--{name}=...")
    if processes.hosts() or jax.process_count() > 1:
        found = f"clip_retrieval in a run of {jax.process_count()} processes"
        fix = f"as many commands with --shard=0/{jax.process_count()} and so on"
        raise ConfigError("--layout", found, "processes that know nothing of each other", fix)
    return embed_for_search(
        values.model,
        values.data,
        values.out,
        shard=_shard(values.shard),
        step=values.step,
        ignore=values.init_ignore,
        batch_size=values.batch_size,
        overwrite=values.overwrite,
    )


def main(overrides: list[tuple[str, str]]) -> int:
    values = flags.FLAGS
    try:
        if values.layout == "clip_retrieval":
            return _main_for_search(overrides)
    except OSError as error:
        raise RunError(f"{error.filename or values.out}: {error.strerror or error}") from None
    for name in ("config", "tower"):
        if not values[name].value:
            raise ConfigError(f"--{name}", "nothing", f"--{name}=...")
    options: dict[str, Any] = {
        name: values[name].value for name in ("tower", "views", "tokens", "overwrite")
    }
    try:
        return embed(cli.load_config(values.config, overrides), values.out, **options)
    except OSError as error:
        where = error.filename or values.out
        raise RunError(f"{where}: {error.strerror or error}") from None


if __name__ == "__main__":
    flags.DEFINE_string("config", None, "Config: clip, path.py, or either with :variant.")
    flags.DEFINE_string("out", None, "The folder to write.")
    flags.DEFINE_enum("tower", None, ["image", "text"], "The tower to run.")
    flags.DEFINE_integer("views", 0, "Random crops of each picture; 0: its centre.", lower_bound=0)
    flags.DEFINE_bool("tokens", False, "Write token features too.")
    flags.DEFINE_bool("overwrite", False, "Overwrite what the folder has.")
    flags.DEFINE_enum(
        "layout",
        "features",
        ["features", "clip_retrieval"],
        "features: for training. clip_retrieval: embeddings of a trained model, for search.",
    )
    flags.DEFINE_string("model", "", "clip_retrieval: the model.")
    flags.DEFINE_string("step", "", "clip_retrieval: the checkpoint: a step, latest or best.")
    flags.DEFINE_list("init_ignore", [], "clip_retrieval: as config.init_ignore takes them.")
    flags.DEFINE_string("data", "", "clip_retrieval: the data, a path or source=...,path=...")
    flags.DEFINE_string("shard", "0/1", "clip_retrieval: the part of the rows to embed, as 2/8.")
    flags.DEFINE_integer("batch_size", 256, "clip_retrieval: rows at a time.", lower_bound=1)

    cli.run(main, required=("out",))
