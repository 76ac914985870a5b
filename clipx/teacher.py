"""`python -m clipx.teacher --config=FILE --model=roberta-large --out=teacher.npy`: what a language
model says of every caption of a config's data, once and for all, as ProtoCLIP's external teacher.

    --model     a text encoder of Hugging Face, a name or a folder, or `tfidf`, which needs no
                download: counts of words, weighted by how rare they are (scikit-learn)
    --features  an array of your own instead, [rows, numbers], of any teacher, also of pictures
    --teacher   what this command wrote before, for --clusters
    --clusters  writes so many clusters of the teacher's rows instead: `data.clusters`

A row is the mean over its captions (with `data.caption` = first: its first) of unit vectors, then
cut to its --dim principal components. All rows of the set are written, whatever `data.fraction` a
run uses. `data.teacher` and `data.clusters` say in a config where the files are. A model that was
stopped in its work goes on where it was when the command is given again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from absl import flags

from clipx import cli
from clipx.errors import RunError
from clipx.serving import teacher_rows


def make(config: Mapping[str, Any], out: str, **options) -> None:
    """Writes the teacher's rows, or their clusters, to `out`, and says what they are. `options` as
    `teacher_rows.make` takes them."""
    about, clusters = teacher_rows.make(config, out, **options)
    print("\n".join(_said(out, about, clusters)))


def _said(out: str, about: Mapping[str, Any], clusters: np.ndarray | None) -> Iterator[str]:
    """What was written, in words."""
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
    flags.DEFINE_string("out", None, "The .npy file to write; a .json stands beside it.")
    flags.DEFINE_string("model", "", "A Hugging Face text encoder, name or folder; or tfidf.")
    flags.DEFINE_string("features", "", "An array [rows, numbers] to use instead of a model.")
    flags.DEFINE_string("teacher", "", "What this command wrote before, for --clusters.")
    flags.DEFINE_integer("clusters", None, "Writes so many clusters instead.", lower_bound=1)
    flags.DEFINE_integer("dim", 64, "Principal components that are kept.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 64, "Captions that a model reads at once.", lower_bound=1)
    flags.DEFINE_enum("padding", "mask", ["mask", "zero"], "zero: as ProtoCLIP's own code.")
    flags.DEFINE_string("device", "", "Of the model: cpu, cuda, ...; cuda if there is one.")
    flags.DEFINE_bool("overwrite", False, "Writes over what is there.")
    cli.run(main, required=("config", "out"))
