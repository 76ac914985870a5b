"""Random access to a set prepared by TensorFlow Datasets, read without TensorFlow."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import difflib
import glob
import itertools
import os
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from clipx.data.base import Example, Source, expand_user
from clipx.errors import BadSample, DataError, optional

_CAPTIONS = ("captions", "caption", "texts", "text", "sentences", "description")  # best first
_NO_CAPTION = re.compile(r"(^|[/_])(file|id|key|path|uri|url|license|locale|lang)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Tfds(Source):
    """The rows of a split, in the order in which they are stored.

    A picture stays as it was encoded; pixels that were stored raw ([h, w, 1 or 3] uint8) are used
    as they are. The set must have been prepared as array_record, which reads at random:
    `tfds build NAME --file_format=array_record`. Nothing is ever downloaded. A feature that is not
    named is found by its kind: an Image; captions that are Text, or a Sequence of Text or of
    {"text": Text}; a ClassLabel, whose names are the `classes`.
    """

    name: str  # NAME, NAME/CONFIG or NAME:VERSION, as TFDS has them: coco_captions
    split: str  # train, or what TFDS understands: train[:90%]
    data_dir: str = ""  # '': $TFDS_DATA_DIR, else ~/tensorflow_datasets
    image: str = ""  # the feature with the picture; '': the one there is, or `image`
    text: str = ""  # with the captions; '': the one there is, if any
    label: str = ""  # with the label; '': the one there is, if any

    def __post_init__(self):
        builder = self._builder()
        folder = str(builder.data_dir)
        image, text, inner, label = _roles(self, builder.info.features, folder)
        classes = () if not label else getattr(builder.info.features[label], "names", None) or ()
        for name, value in (
            ("_roles", (image, text, inner, label)),
            ("_records", self._open(builder)),
            ("_prefix", f"{builder.info.full_name}/{self.split}"),
            ("classes", tuple(classes)),
        ):
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self._records)

    def keys(self) -> Iterator[str]:
        """`Example.key` of every row, in order; nothing is read."""
        return (f"{self._prefix}/{row}" for row in range(len(self)))

    def __getitem__(self, row: int) -> Example:
        if not 0 <= row < len(self):
            raise IndexError(row)
        key = f"{self._prefix}/{row}"
        image, text, inner, label = self._roles
        try:
            record = self._records[row]
            picture = record[image]
        except Exception as error:  # the reader is C++, whose errors have no kind of their own
            reason = f"the record cannot be read ({error})"
            raise BadSample(key, reason.replace("\n", " ")) from None
        if isinstance(picture, np.ndarray):
            picture = np.repeat(picture, 3 // picture.shape[2], axis=2)  # grey has one channel
        elif not picture:
            raise BadSample(key, "the picture has no bytes")
        texts = ()
        if text:
            texts = _texts(key, record[text][inner] if inner else record[text])
        number = int(record[label]) if label else None
        # test splits whose labels are kept secret have -1
        return Example(picture, texts, row, key, number if (number or 0) >= 0 else None)

    def _builder(self):
        """What reads the prepared files, built from them alone: the code that made them may need
        TensorFlow, or may not be there."""
        with optional("tfds", DataError, "data source tfds: a package is missing"):
            import tensorflow_datasets as tfds
            from tensorflow_datasets.core import read_only_builder
        folder = self.data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
        folder = expand_user(folder)
        try:
            return read_only_builder.builder_from_files(self.name, data_dir=folder)
        except tfds.core.DatasetNotFoundError:
            known = tfds.list_builders(with_community_datasets=False)
            raise DataError(_not_found(self.name, folder, known)) from None
        except Exception as error:  # a name that is none, files of which some are missing
            reason = str(error).strip().partition("\n")[0]
            raise DataError(f"{self.name} in {folder}: cannot be opened ({reason})") from None

    def _open(self, builder):
        """The rows as dicts, with every picture as it was encoded."""
        import tensorflow_datasets as tfds

        have = builder.info.available_file_formats()
        if tfds.core.FileFormat.ARRAY_RECORD not in have:
            found = ", ".join(sorted(one.value for one in have)) or "nothing"
            raise DataError(
                f"{builder.data_dir}: prepared as {found}, expected array_record, which reads at "
                f"random; where TensorFlow is installed: tfds convert_format --dataset_version_dir="
                f"{builder.data_dir} --out_file_format=array_record"
            )
        splits = ", ".join(builder.info.splits)
        try:
            files = builder.info.splits[self.split].file_instructions
        except Exception as error:
            reason = str(error).strip().rpartition("\n")[2].rstrip(".")
            raise DataError(
                f"{self.name}: split {self.split!r}: {reason}; it has {splits}"
            ) from None
        if not files:
            raise DataError(f"{self.name}: split {self.split!r} has no rows; it has {splits}")
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            fault = next(filter(None, pool.map(_fault, files)), "")
        if fault:
            raise DataError(fault)
        decoders = {
            name: tfds.decode.SkipDecoding()
            for name, one in builder.info.features.items()
            if isinstance(one, tfds.features.Image)
        }
        return builder.as_data_source(
            split=self.split, decoders=decoders, file_format=tfds.core.FileFormat.ARRAY_RECORD
        )


def _fault(file) -> str:
    """What is wrong with one file of a set; '' if it holds the rows that it should."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    if not os.path.exists(file.filename):
        return f"{file.filename}: not there; copy the set again"
    try:
        rows = len(ArrayRecordDataSource(file.filename))
    except Exception as error:  # RuntimeError, from C++
        reason = str(error).strip().partition("\n")[0] or "no array_record"
        return f"{file.filename}: truncated or damaged ({reason}); copy it again"
    if rows != file.examples_in_shard:
        return f"{file.filename}: {rows} rows, expected {file.examples_in_shard}; copy it again"
    return ""


def _texts(key: str, value: Any) -> tuple[str, ...]:
    """Captions, stripped, from one or several encoded strings."""
    values = [value] if isinstance(value, bytes | str) else value
    try:
        found = (v if isinstance(v, str) else bytes(v).decode("utf-8") for v in values)
        texts = tuple(t for t in (t.replace("\0", "").strip() for t in found) if t)
    except ValueError as error:
        raise BadSample(key, f"the caption cannot be read ({error})") from None
    if not texts:
        raise BadSample(key, "empty caption")
    return texts


def _roles(config: Tfds, features, folder: str) -> tuple[str, str, str, str]:
    """Names of the features with the picture, the captions, the strings in these ('' unless they
    are a sequence of dicts) and the label; '' for what the set does not have."""
    import tensorflow_datasets as tfds

    if not isinstance(features, tfds.features.FeaturesDict):
        raise DataError(f"{folder}: its rows are no dict of features, expected pictures and words")
    found = sorted(features.items())
    pictures = {name: likely for name, one in found if (likely := _is_picture(one)) is not None}
    texts = {name: inner for name, one in found if (inner := _strings(one)) is not None}
    labels = [name for name, one in found if isinstance(one, tfds.features.ClassLabel)]
    numbers = [name for name, one in found if _is_number(one)]
    listed = ", ".join(f"{name} ({type(one).__name__})" for name, one in found)

    def chosen(role: str, named: str, fitting, guesses) -> str:
        if named and named not in fitting:
            close = difflib.get_close_matches(named, list(fitting), n=1, cutoff=0.0)
            nearest = f"; nearest: {close[0]}" if close else ""
            there = "cannot be that" if named in features else "is not there"
            raise DataError(f"{folder}: feature {role}={named!r} {there}; found {listed}{nearest}")
        if named or len(guesses) < 2:
            return named or next(iter(guesses), "")
        lines = " or ".join(f"{role} = {guess!r}" for guess in guesses)
        raise DataError(f"{folder}: several features may be the {role}; set {lines}")

    best = [name for name in pictures if name == "image"] or [n for n in pictures if pictures[n]]
    image = chosen("image", config.image, pictures, best)
    if not image:
        raise DataError(f"{folder}: no picture; found {listed}; expected an Image feature")
    best = [name for name in _CAPTIONS if name in texts][:1]
    if not best and not labels:
        best = [name for name in texts if not _NO_CAPTION.search(name)]
    text = chosen("text", config.text, texts, best)
    if text and len(labels) > 1:  # they are not needed, and which is meant cannot be told
        labels = []
    label = chosen("label", config.label, numbers, labels)
    if not text and not label:
        raise DataError(f"{folder}: no captions and no label; found {listed}; set text or label")
    return image, text, texts.get(text, ""), label


def _is_picture(feature) -> bool | None:
    """None for what is no picture; False for what could be one, and may as well be a mask."""
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.Image):
        if feature.np_dtype == np.float32:  # depth, in four bytes of a PNG
            return None
        return not isinstance(feature, tfds.features.LabeledImage)
    raw = isinstance(feature, tfds.features.Tensor) and feature.np_dtype == np.uint8
    return True if raw and len(feature.shape) == 3 and feature.shape[-1] in (1, 3) else None


def _is_number(feature) -> bool:
    import tensorflow_datasets as tfds

    scalar = isinstance(feature, tfds.features.Tensor) and feature.shape == ()
    return scalar and np.issubdtype(feature.np_dtype, np.integer)


def _strings(feature) -> str | None:
    """'' for a string or a sequence of strings, the name of the string in a sequence of dicts that
    have one or call it `text`, None for anything else."""
    import tensorflow_datasets as tfds

    inside = getattr(feature, "feature", feature)
    if isinstance(inside, tfds.features.FeaturesDict) and inside is not feature:
        names = [name for name, one in inside.items() if _strings(one) == ""]
        return "text" if "text" in names else names[0] if len(names) == 1 else None
    if not isinstance(inside, tfds.features.Tensor) or inside.shape != ():
        return None
    return "" if inside.np_dtype in (object, np.str_) else None


def _not_found(name: str, folder: str, known: list[str]) -> str:
    """Why no prepared set has this name, and what to do about it."""
    plain = re.split(r"[/:]", name)[0]
    root = os.path.join(folder, plain)
    inside = glob.glob(os.path.join(glob.escape(root), "**", "features.json"), recursive=True)
    if inside:
        parts = (os.path.relpath(os.path.dirname(one), folder).rpartition("/") for one in inside)
        found = ", ".join(sorted(f"{folders}:{version}" for folders, _, version in parts))
        return f"{name}: not in {folder}, which has {found}"
    if plain in known:
        return (
            f"{name}: not prepared in {folder}; set data_dir, or where TensorFlow is installed: "
            f"tfds build {name} --file_format=array_record --data_dir={folder}"
        )
    here = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    close = difflib.get_close_matches(plain, [*here, *known], n=3, cutoff=0.5)
    names = ", ".join(close or itertools.islice(here, 3)) or "nothing"
    return f"{name}: neither in {folder} nor a set that TFDS knows; nearest: {names}"
