"""Any source to tar shards that `webdataset` reads: the same bytes for the same rows."""

from __future__ import annotations

import functools
import io
import itertools
import json
import math
import operator
import os
import pathlib
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from clipx.data import pictures
from clipx.data.base import Source, fingerprint
from clipx.data.sources.webdataset import WebDataset
from clipx.data.verify import in_order
from clipx.errors import BadSample, DataError

FILE = "pack.json"  # what the shards were made from, and what was left out
_KINDS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # kept as they are; others become PNG
_BLOCK = tarfile.BLOCKSIZE  # a member is its header and its data, each in whole blocks
_Members = list[tuple[str, bytes]]  # names and data


class Packed(NamedTuple):
    rows: int
    shards: int
    skipped: list[dict[str, Any]]  # row, key and reason of what could not be used


def pack(
    source: Source,
    output: str | os.PathLike,
    *,
    shard_bytes: int | None = None,
    shard_rows: int | None = None,
    progress: Callable[[int], Any] | None = None,
) -> Packed:
    """Writes `output`/000000.tar, ... of at most `shard_bytes` or `shard_rows`, and pack.json.

    A sample is `<row>.jpg` (or png, webp: the encoded bytes as they are), `.txt` with its first
    caption, `.json` with all `captions` where it has several, `.cls` with its label. Every picture
    is decoded; rows that cannot be used are left out. The folder appears whole or not at all.
    Raises `DataError` for a folder that is not empty, and if what was written does not read back.
    """
    folder = pathlib.Path(output).expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder}: not empty, expected a new or an empty folder")
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
        packed = _write(source, unfinished, shard_bytes, shard_rows, progress)
        about = {
            "rows": packed.rows,
            "fingerprint_of_source": fingerprint(source),
            "classes": source.classes,
            "skipped": packed.skipped,
        }
        text = json.dumps(about, indent=1, ensure_ascii=False) + "\n"
        (unfinished / FILE).write_text(text, "utf-8", "backslashreplace")
        os.replace(unfinished, folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    if (found := len(WebDataset(str(folder / "*.tar")))) != packed.rows:
        raise DataError(f"{folder}: {found:,} rows read back of {packed.rows:,} written")
    return packed


def _write(source: Source, folder: pathlib.Path, shard_bytes, shard_rows, progress) -> Packed:
    skipped, rows, shards = [], 0, 0
    samples = _samples(source, skipped, progress)
    numbered = _numbered(samples, shard_bytes or math.inf, shard_rows or math.inf)
    for number, group in itertools.groupby(numbered, operator.itemgetter(0)):
        path = folder / f"{number:06d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for _, members in group:
                for name, data in members:
                    info = tarfile.TarInfo(name)  # no owner, no time: the same bytes every time
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                rows += 1
        shards = number + 1
    if not rows:
        reason = "{key}: {reason}".format(**skipped[0]) if skipped else "it has none"
        raise DataError(f"no row of the source can be used; the first is {reason}")
    return Packed(rows, shards, skipped)


def _samples(source: Source, skipped: list[dict[str, Any]], progress) -> Iterator[_Members]:
    """The members of every row that can be used; the others are added to `skipped`."""
    width = max(9, len(str(len(source))))
    found = in_order(functools.partial(_sample, source), len(source), progress)
    for row, sample in enumerate(found):
        if isinstance(sample, BadSample):
            skipped.append({"row": row, "key": sample.key, "reason": sample.reason})
        else:
            yield [(f"{row:0{width}d}.{extension}", data) for extension, data in sample]


def _numbered(
    samples: Iterable[_Members], most_bytes: float, most_rows: float
) -> Iterator[tuple[int, _Members]]:
    """Each sample with the number of its shard: another one where it would not fit any more."""
    number = rows = size = 0
    for members in samples:
        own = sum(_block(_BLOCK + len(data), _BLOCK) for _, data in members)
        if rows and (
            rows >= most_rows or _block(size + own + 2 * _BLOCK, tarfile.RECORDSIZE) > most_bytes
        ):
            number, rows, size = number + 1, 0, 0
        yield number, members
        rows, size = rows + 1, size + own


def _block(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _sample(source: Source, row: int) -> _Members | BadSample:
    """The members of an example, named by their extensions."""
    try:
        example = source[row]
        kind = pictures.header(example)[2]
        pixels = pictures.decode(example)
        if not example.texts and example.label is None:
            raise BadSample(example.key, "neither a caption nor a label")
    except BadSample as error:
        return error
    data = example.image
    if kind not in _KINDS:
        file = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG")
        data = file.getvalue()
    members = [(_KINDS.get(kind, "png"), data)]
    first = example.texts[0].encode("utf-8", "replace") if example.texts else b""
    if example.texts:
        members.append(("txt", first))
    if [text.encode("utf-8", "surrogatepass") for text in example.texts] not in ([], [first]):
        members.append(("json", json.dumps({"captions": example.texts}).encode()))
    if example.label is not None:
        members.append(("cls", str(example.label).encode()))
    return members


def shard_size(text: str) -> dict[str, int]:
    """`pack`'s keyword for a size as people write it: 512MB, 2GB or 10000rows. Raises ValueError
    for what is none."""
    for unit, factor in (("KB", 10**3), ("MB", 10**6), ("GB", 10**9), ("rows", 1)):
        number = text.strip().removesuffix(unit).strip()
        if number != text.strip() and number.isdecimal() and int(number):
            name = "shard_rows" if unit == "rows" else "shard_bytes"
            return {name: int(number) * factor}
    raise ValueError(text)


def config_lines(output: str | os.PathLike, source: Source) -> Iterator[str]:
    """The section of a config that reads what `pack` wrote."""
    section = {"source": "webdataset", "path": str(pathlib.Path(output) / "*.tar")}
    yield f'"data": {json.dumps(section, ensure_ascii=False)}'
    if source.classes:
        yield f"with its {len(source.classes)} classes, which {FILE} lists, as data.classes"
