"""`python -m clipx.export --workdir=DIR --format=open_clip --out=DIR`: writes a run's model as a
folder that open_clip, transformers or onnxruntime loads, and proves that the library computes the
same."""

from __future__ import annotations

import pathlib

from absl import flags

from clipx import cli
from clipx.errors import ConfigError
from clipx.interop.formats import FORMATS, WRITTEN
from clipx.serving.export import Options, export


def main(overrides: list[tuple[str, str]]) -> None:
    """Exports the run, and prints what `serving.export.export` reports. Refuses overrides."""
    if overrides:
        flag = f"--config.{overrides[0][0]}"
        raise ConfigError(
            flag, overrides[0][1], "no override: the model is trained already", f"remove {flag}"
        )
    values = flags.FLAGS
    options = Options(
        format=values.format,
        out=pathlib.Path(values.out),
        step=values.step,
        with_heads=values.with_heads,
        pt=values.pt,
        verify=values.verify,
        license=values.license,
        average=values.average,
    )
    print(export(values.workdir, options))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of the run.")
    flags.DEFINE_string("format", None, " or ".join(f.name for f in (*FORMATS, *WRITTEN)) + ".")
    flags.DEFINE_string("out", None, "Folder to write, which must not exist yet.")
    flags.DEFINE_string(
        "step", "", "The checkpoint: a step, latest or best; default: best if the run keeps one."
    )
    flags.DEFINE_bool("average", False, "The averages that config.optimizer.average has kept.")
    flags.DEFINE_bool("with_heads", False, "Also write the training heads, beside the model.")
    flags.DEFINE_bool("pt", False, "Also write the weights as a torch file; needs torch.")
    flags.DEFINE_bool(
        "verify", None, "Compare with the library that loads it; default: if it is installed."
    )
    flags.DEFINE_string("license", "unknown", "Licence on the model card, in the Hub's words.")

    cli.run(main, required=("workdir", "format", "out"))
