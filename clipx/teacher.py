"""`python -m clipx.teacher --config=FILE --model=roberta-large --out=teacher.npy`: writes one
feature vector for every row of a config's data, from a language model that reads the captions.
ProtoCLIP takes the file as its external teacher.

    --model     a Hugging Face text encoder, name or folder; or `tfidf`, which needs no download:
                word counts, weighted by how rare the words are (scikit-learn)
    --features  in place of a model, your own array [rows, width], from any teacher, also of images
    --teacher   in place of a model, for --clusters: a file that this command wrote
    --clusters  write the cluster of every row, of this many, for `data.clusters`

A row is the mean of the unit vectors of its captions (with data.caption=first: of its first), then
projected to --dim principal components. The file has all rows of the data set, whatever
`data.fraction` a run uses. A config names the files as `data.teacher` and `data.clusters`. If the
command is interrupted while a model reads captions, the same command continues where it stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from absl import flags

from clipx import cli
from clipx.errors import RunError
from clipx.serving import teacher_rows


def make(config: Mapping[str, Any], out: str, **options: Any) -> None:
    """Writes the teacher's rows, or their clusters, to `out`, and prints a summary. `options` are
    those of `teacher_rows.make`."""
    about, clusters = teacher_rows.make(config, out, **options)
    print("\n".join(_summary(out, about, clusters)))


def _summary(out: str, about: Mapping[str, Any], clusters: np.ndarray | None) -> Iterator[str]:
    """Lines that describe the file that was written."""
    missing = f", {about['without']:,} of them without features" if about["without"] else ""
    yield f"{out}: {about['rows']:,} rows{missing}, fingerprint {about['fingerprint']}"
    if clusters is None:
        share = f"{about['width']} components, {about['explained_variance']:.1%} of the variance"
        yield f"{share}; --config.data.teacher={out}"
    else:
        sizes = np.bincount(clusters[clusters >= 0], minlength=about["clusters"])
        yield (
            f"{len(sizes):,} clusters of {sizes.min():,} to {sizes.max():,} rows, median "
            f"{np.median(sizes):,.0f}; --config.data.clusters={out}"
        )


def main(overrides: list[tuple[str, str]]) -> None:
    values = flags.FLAGS
    names = ("model", "features", "teacher", "clusters", "dim", "batch_size", "padding", "device")
    options = {name: values[name].value for name in (*names, "overwrite")}
    try:
        make(cli.load_config(values.config, overrides), values.out, **options)
    except OSError as error:
        where = error.filename or values.out
        raise RunError(f"{where}: {error.strerror or error}") from None


if __name__ == "__main__":
    flags.DEFINE_string("config", None, "Config: clip, path.py, or either with :variant.")
    flags.DEFINE_string("out", None, "The .npy file to write; a .json is written beside it.")
    flags.DEFINE_string("model", "", "A Hugging Face text encoder, name or folder; or tfidf.")
    flags.DEFINE_string("features", "", "A .npy array [rows, width] to use in place of a model.")
    flags.DEFINE_string("teacher", "", "A file that this command wrote, to find --clusters in.")
    flags.DEFINE_integer(
        "clusters", None, "Write the row's cluster, of this many, not its features.", lower_bound=1
    )
    flags.DEFINE_integer("dim", 64, "Principal components to keep.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 64, "Captions that the model reads at once.", lower_bound=1)
    flags.DEFINE_enum(
        "padding", "mask", ["mask", "zero"], "mask: leave padding out; zero: as ProtoCLIP's code."
    )
    flags.DEFINE_string("device", "", "Device of the model: cpu, cuda, ...; default: cuda if any.")
    flags.DEFINE_bool("overwrite", False, "Overwrite the file if it exists.")

    cli.run(main, required=("config", "out"))
