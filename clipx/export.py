"""`python -m clipx.export --workdir=DIR --format=open_clip --out=DIR`: a run as a folder that
open_clip or transformers loads, with the proof that they say what clipx says."""

from __future__ import annotations

import pathlib

from absl import flags

from clipx import cli
from clipx.errors import ConfigError
from clipx.interop.formats import FORMATS
from clipx.serving.export import Options, export


def main(overrides: list[tuple[str, str]]) -> None:
    if overrides:
        raise ConfigError(f"--config.{overrides[0][0]}", overrides[0][1], "nothing: it is trained")
    values = flags.FLAGS
    options = Options(
        format=values.format,
        out=pathlib.Path(values.out),
        step=values.step,
        with_heads=values.with_heads,
        pt=values.pt,
        verify=values.verify,
        license=values.license,
    )
    print(export(values.workdir, options))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of the run.")
    flags.DEFINE_string("format", None, " or ".join(f.name for f in FORMATS) + ".")
    flags.DEFINE_string("out", None, "Folder to write, which must not be there.")
    flags.DEFINE_string("step", "", "A step, latest or best; default: best where a run keeps one.")
    flags.DEFINE_bool("with_heads", False, "Keep the heads of training beside the model.")
    flags.DEFINE_bool("pt", False, "Write torch's own file too; needs torch.")
    flags.DEFINE_bool("verify", None, "Compare with the library; default: if it is installed.")
    flags.DEFINE_string("license", "unknown", "The card's licence, in the Hub's words.")
    cli.run(main, required=("workdir", "format", "out"))
