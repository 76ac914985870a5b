"""Random access to a data set prepared by TensorFlow Datasets, without TensorFlow."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import difflib
import glob
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from clipx.data.base import Example, Guess, Source, expand_user
from clipx.data.reading import unchanged
from clipx.data.storage import Shard, of_file
from clipx.errors import BadSample, DataError, optional

_CAPTIONS = ("captions", "caption", "texts", "text", "sentences", "description")  # likeliest first
_NO_CAPTION = re.compile(r"(^|[/_])(file|id|key|path|uri|url|license|locale|lang)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Tfds(Source):
    """The rows of a split, in storage order.

    The data set must have been prepared as array_record, which supports random access:
    `tfds build NAME --file_format=array_record`. Nothing is ever downloaded. Pictures keep their
    encoding, and pictures that were stored as raw uint8 pixels [h, w, 1 or 3] are used unchanged.

    Features that the config does not name are found by their type: an Image; captions that are
    Text, a Sequence of Text or a Sequence of {"text": Text}; a ClassLabel, whose names become
    `classes`.
    """

    name: str  # a name of TFDS: NAME, NAME/CONFIG or NAME:VERSION, such as coco_captions
    split: str  # a split of TFDS, such as train or train[:90%]
    data_dir: str = ""  # '': $TFDS_DATA_DIR, else ~/tensorflow_datasets
    image: str = ""  # the feature with the picture; '': `image`, or the only candidate
    text: str = ""  # the feature with the captions; '': the only candidate, if any
    label: str = ""  # the feature with the label; '': the only candidate, if any

    def __post_init__(self) -> None:
        self._roles: tuple[str, str, str, str]  # see the function `_roles`
        self._records: Sequence[Mapping[str, Any]]
        self._files: tuple[Shard, ...]
        self._prefix: str  # of the keys
        self._guesses: tuple[Guess, ...]
        builder = self._builder()
        folder = str(builder.data_dir)
        image, text, inner, label = _roles(self, builder.info.features, folder)
        records, files = self._open(builder)
        classes = () if not label else getattr(builder.info.features[label], "names", None) or ()
        for name, value in (  # the dataclass is frozen
            ("_roles", (image, text, inner, label)),
            ("_records", records),
            ("_files", tuple(of_file(file) for file in files)),
            ("_prefix", f"{builder.info.full_name}/{self.split}"),
            ("classes", tuple(classes)),
            ("_guesses", self._guessed(image, text, label)),
        ):
            object.__setattr__(self, name, value)

    def guesses(self) -> tuple[Guess, ...]:
        """The features that were found by their type. A split has no rows to leave out."""
        return self._guesses

    def _guessed(self, image: str, text: str, label: str) -> tuple[Guess, ...]:
        roles = {"image": (image, "picture"), "text": (text, "caption"), "label": (label, "label")}
        return tuple(
            Guess(field, feature, f"the feature whose type and name are likeliest a {kind}")
            for field, (feature, kind) in roles.items()
            if feature and not getattr(self, field)
        )

    def __len__(self) -> int:
        return len(self._records)

    def keys(self) -> Iterator[str]:
        """`Example.key` of every row, in order, without reading the data."""
        return (f"{self._prefix}/{row}" for row in range(len(self)))

    def __getitem__(self, row: int) -> Example:
        if not 0 <= row < len(self):
            raise IndexError(row)
        key = f"{self._prefix}/{row}"
        image, text, inner, label = self._roles
        try:
            record = self._records[row]
            picture = record[image]
        except Exception as error:  # the C++ reader raises no specific exceptions
            for file in self._files:
                unchanged(file)
            reason = f"the record cannot be read ({error})"
            raise BadSample(key, reason.replace("\n", " ")) from None
        if isinstance(picture, np.ndarray):
            picture = np.repeat(picture, 3 // picture.shape[2], axis=2)  # from one channel to three
        elif not picture:
            raise BadSample(key, "the picture has no bytes")
        texts = ()
        if text:
            texts = _texts(key, record[text][inner] if inner else record[text])
        self.limits.check_bytes(key, len(picture))
        self.limits.check_texts(key, texts)
        number = int(record[label]) if label else None
        # test splits with secret labels store -1
        return Example(picture, texts, row, key, number if (number or 0) >= 0 else None)

    def _builder(self) -> Any:
        """A DatasetBuilder made from the prepared files alone. The code that prepared them may need
        TensorFlow or may not be installed."""
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
        except Exception as error:  # such as an invalid name or missing files
            reason = str(error).strip().partition("\n")[0]
            raise DataError(f"{self.name} in {folder}: cannot be opened ({reason})") from None

    def _open(self, builder: Any) -> tuple[Sequence[Mapping[str, Any]], list[str]]:
        """(the rows as dicts, with pictures still encoded, the files that hold them)."""
        import tensorflow_datasets as tfds

        formats = builder.info.available_file_formats()
        if tfds.core.FileFormat.ARRAY_RECORD not in formats:
            listed = ", ".join(sorted(one.value for one in formats)) or "nothing"
            raise DataError(
                f"{builder.data_dir}: prepared as {listed}, expected array_record, which supports "
                "random access; run where TensorFlow is installed: tfds convert_format "
                f"--dataset_version_dir={builder.data_dir} --out_file_format=array_record"
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
        records = builder.as_data_source(
            split=self.split, decoders=decoders, file_format=tfds.core.FileFormat.ARRAY_RECORD
        )
        return records, [file.filename for file in files]


def _fault(file: Any) -> str:
    """What is wrong with one file, a FileInstruction of TFDS; '' if it is complete."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    if not os.path.exists(file.filename):
        return f"{file.filename}: no such file; copy the data set again"
    try:
        rows = len(ArrayRecordDataSource(file.filename))
    except Exception as error:  # RuntimeError, from C++
        reason = str(error).strip().partition("\n")[0] or "not an array_record file"
        return f"{file.filename}: truncated or damaged ({reason}); copy it again"
    if rows != file.examples_in_shard:
        return f"{file.filename}: {rows} rows, expected {file.examples_in_shard}; copy it again"
    return ""


def _texts(key: str, value: Any) -> tuple[str, ...]:
    """The non-empty captions, stripped, of one or several encoded strings."""
    values = [value] if isinstance(value, bytes | str) else value
    try:
        decoded = (v if isinstance(v, str) else bytes(v).decode("utf-8") for v in values)
        texts = tuple(t for t in (t.replace("\0", "").strip() for t in decoded) if t)
    except ValueError as error:
        raise BadSample(key, f"the caption cannot be read ({error})") from None
    if not texts:
        raise BadSample(key, "empty caption")
    return texts


def _roles(config: Tfds, features: Any, folder: str) -> tuple[str, str, str, str]:
    """Returns the names of (the picture feature, the captions feature, the strings inside it, the
    label feature).

    A name is '' if the data set has no such feature. The third is '' unless the captions are a
    sequence of dicts.
    """
    import tensorflow_datasets as tfds

    if not isinstance(features, tfds.features.FeaturesDict):
        raise DataError(f"{folder}: its rows are not a FeaturesDict, expected named features")
    items = sorted(features.items())
    pictures = {name: likely for name, one in items if (likely := _is_picture(one)) is not None}
    texts = {name: inner for name, one in items if (inner := _strings(one)) is not None}
    labels = [name for name, one in items if isinstance(one, tfds.features.ClassLabel)]
    numbers = [name for name, one in items if _is_number(one)]
    listed = ", ".join(f"{name} ({type(one).__name__})" for name, one in items)

    def chosen(role: str, named: str, fitting: Iterable[str], guesses: Sequence[str]) -> str:
        if named and named not in fitting:
            close = difflib.get_close_matches(named, list(fitting), n=1, cutoff=0.0)
            nearest = f"; nearest: {close[0]}" if close else ""
            fault = "has another type" if named in features else "does not exist"
            raise DataError(f"{folder}: feature {role}={named!r} {fault}; found {listed}{nearest}")
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
    if text and len(labels) > 1:  # ambiguous, and with captions no label is needed
        labels = []
    label = chosen("label", config.label, numbers, labels)
    if not text and not label:
        raise DataError(f"{folder}: no captions and no label; found {listed}; set text or label")
    return image, text, texts.get(text, ""), label


def _is_picture(feature: Any) -> bool | None:
    """True for a picture, False for what may be a picture or a mask, None for anything else."""
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.Image):
        if feature.np_dtype == np.float32:  # a depth map, with floats in the four bytes of a pixel
            return None
        return not isinstance(feature, tfds.features.LabeledImage)
    raw = _is_tensor(feature) and feature.np_dtype == np.uint8
    return True if raw and len(feature.shape) == 3 and feature.shape[-1] in (1, 3) else None


def _is_tensor(feature: Any) -> bool:
    import tensorflow_datasets as tfds

    return isinstance(feature, tfds.features.Tensor)


def _is_number(feature: Any) -> bool:
    scalar = _is_tensor(feature) and feature.shape == ()
    return scalar and np.issubdtype(feature.np_dtype, np.integer)


def _strings(feature: Any) -> str | None:
    """'' for a string or a sequence of strings; for a sequence of dicts, the key of their strings,
    which is `text` or the only candidate; None for anything else."""
    import tensorflow_datasets as tfds

    inside = getattr(feature, "feature", feature)
    if isinstance(inside, tfds.features.FeaturesDict) and inside is not feature:
        names = [name for name, one in inside.items() if _strings(one) == ""]
        return "text" if "text" in names else names[0] if len(names) == 1 else None
    if not isinstance(inside, tfds.features.Tensor) or inside.shape != ():
        return None
    return "" if inside.np_dtype in (object, np.str_) else None


def _not_found(name: str, folder: str, known: list[str]) -> str:
    """The error for a name without a prepared data set: what there is, and what to do."""
    plain = re.split(r"[/:]", name)[0]
    root = os.path.join(folder, plain)
    versions = glob.glob(os.path.join(glob.escape(root), "**", "features.json"), recursive=True)
    if versions:
        parts = (os.path.relpath(os.path.dirname(one), folder).rpartition("/") for one in versions)
        listed = ", ".join(sorted(f"{folders}:{version}" for folders, _, version in parts))
        return f"{name}: not in {folder}, which has {listed}"
    if plain in known:
        return (
            f"{name}: not prepared in {folder}; set data_dir, or run where TensorFlow is "
            f"installed: tfds build {name} --file_format=array_record --data_dir={folder}"
        )
    prepared = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    close = difflib.get_close_matches(plain, [*prepared, *known], n=3, cutoff=0.5)
    names = ", ".join(close or itertools.islice(prepared, 3)) or "nothing"
    return f"{name}: neither in {folder} nor a data set that TFDS knows; nearest: {names}"
