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
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from absl import flags

from clipx import cli
from clipx.data.base import expand_user
from clipx.data.features import FILE
from clipx.errors import ConfigError, Interrupted, RunError
from clipx.training.embedding import open_embedder
from clipx.training.stop import Stop


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


def main(overrides: list[tuple[str, str]]) -> int:
    values = flags.FLAGS
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
    flags.DEFINE_bool("overwrite", False, "Overwrite features in the folder.")

    cli.run(main, required=("config", "tower", "out"))
