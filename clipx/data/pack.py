"""Writes any source to tar shards for the source `webdataset`. Equal rows give equal bytes."""

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

from clipx.config import secrets
from clipx.data import pictures
from clipx.data.base import Source, fingerprint
from clipx.data.sources.webdataset import WebDataset
from clipx.data.threads import in_order
from clipx.errors import BadSample, DataError

FILE = "pack.json"  # describes the source of the shards and the rows left out
_KINDS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # stored unchanged; others become PNG
_BLOCK = tarfile.BLOCKSIZE  # the header and the data of a member are each padded to full blocks
_Members = list[tuple[str, bytes]]  # (name, data)


class Packed(NamedTuple):
    """What `pack` wrote."""

    rows: int
    shards: int
    skipped: list[dict[str, Any]]  # row, key and reason of each bad row


def pack(
    source: Source,
    output: str | os.PathLike,
    *,
    shard_bytes: int | None = None,
    shard_rows: int | None = None,
    progress: Callable[[int], Any] | None = None,
) -> Packed:
    """Writes `output`/000000.tar, ... and pack.json, and returns what was written.

    A shard has at most `shard_bytes` bytes and `shard_rows` rows; None means no limit. A sample
    has the members `<row>.jpg` (or png, webp: the unchanged encoded bytes), `.txt` with the first
    caption, `.json` with all `captions` if there are several or the one has several lines, and
    `.cls` with the label. Every image is decoded, and bad rows are left out. `output` appears only
    when it is complete. `progress(n)` is called after every n rows.

    Raises `DataError` if `output` is not empty or cannot be written, if no row can be used, and if
    the shards do not read back.
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
        text = json.dumps(secrets.cut_all(about), indent=1, ensure_ascii=False) + "\n"
        (unfinished / FILE).write_text(text, "utf-8", "backslashreplace")
        os.replace(unfinished, folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    if (readable := len(WebDataset(str(folder / "*.tar")))) != packed.rows:
        raise DataError(
            f"{folder}: {readable:,} rows can be read back, expected the {packed.rows:,} that were "
            "written; remove the folder and pack again"
        )
    return packed


def _write(
    source: Source,
    folder: pathlib.Path,
    shard_bytes: int | None,
    shard_rows: int | None,
    progress: Callable[[int], Any] | None,
) -> Packed:
    skipped: list[dict[str, Any]] = []
    rows = shards = 0
    samples = _samples(source, skipped, progress)
    numbered = _numbered(samples, shard_bytes or math.inf, shard_rows or math.inf)
    for number, group in itertools.groupby(numbered, operator.itemgetter(0)):
        path = folder / f"{number:06d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for _, members in group:
                for name, data in members:
                    info = tarfile.TarInfo(name)  # without owner and time: reproducible bytes
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                rows += 1
        shards = number + 1
    if not rows:
        reason = "; the first is {key}: {reason}".format(**skipped[0]) if skipped else ""
        raise DataError(f"none of the {len(source)} rows of the source can be used{reason}")
    return Packed(rows, shards, skipped)


def _samples(
    source: Source, skipped: list[dict[str, Any]], progress: Callable[[int], Any] | None
) -> Iterator[_Members]:
    """Yields the members of every usable row and appends the bad rows to `skipped`."""
    width = max(9, len(str(len(source))))
    samples = in_order(functools.partial(_sample, source), len(source), progress)
    for row, sample in enumerate(samples):
        if isinstance(sample, BadSample):
            skipped.append({"row": row, "key": sample.key, "reason": sample.reason})
        else:
            yield [(f"{row:0{width}d}.{extension}", data) for extension, data in sample]


def _numbered(
    samples: Iterable[_Members], most_bytes: float, most_rows: float
) -> Iterator[tuple[int, _Members]]:
    """Yields (shard number, sample). A sample that would not fit any more starts a new shard."""
    number = rows = size = 0
    for members in samples:
        added = sum(_round_up(_BLOCK + len(data), _BLOCK) for _, data in members)
        closed = _round_up(size + added + 2 * _BLOCK, tarfile.RECORDSIZE)
        if rows and (rows >= most_rows or closed > most_bytes):
            number, rows, size = number + 1, 0, 0
        yield number, members
        rows, size = rows + 1, size + added


def _round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _sample(source: Source, row: int) -> _Members | BadSample:
    """The (extension, data) pairs of one row, or why it cannot be used."""
    try:
        example = source[row]
        kind = pictures.header(example, source.limits)[2]
        pixels = pictures.decode(example)
        if not example.texts and example.label is None:
            raise BadSample(example.key, "neither a caption nor a label")
    except BadSample as error:
        return error
    data = example.image
    if kind not in _KINDS or isinstance(data, np.ndarray):
        file = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG")
        data = file.getvalue()
    members = [(_KINDS.get(kind, "png"), data)]
    first = example.texts[0].encode("utf-8", "replace") if example.texts else b""
    if example.texts:
        members.append(("txt", first))
    # also for a caption of several lines, which a .txt could not tell from several captions
    several = [text.encode("utf-8", "surrogatepass") for text in example.texts] not in ([], [first])
    if several or len(first.splitlines()) > 1:
        members.append(("json", json.dumps({"captions": example.texts}).encode()))
    if example.label is not None:
        members.append(("cls", str(example.label).encode()))
    return members


def shard_size(text: str) -> dict[str, int]:
    """The keyword argument of `pack` for a size such as 512MB, 2GB or 10000rows.

    Raises ValueError if `text` is not a size.
    """
    for unit, factor in (("KB", 10**3), ("MB", 10**6), ("GB", 10**9), ("rows", 1)):
        number = text.strip().removesuffix(unit).strip()
        if number != text.strip() and number.isdecimal() and int(number):
            name = "shard_rows" if unit == "rows" else "shard_bytes"
            return {name: int(number) * factor}
    raise ValueError(text)


def config_lines(output: str | os.PathLike, source: Source) -> Iterator[str]:
    """Yields the lines of a config that reads the shards in `output`."""
    section = {"source": "webdataset", "path": str(pathlib.Path(output) / "*.tar")}
    yield f'"data": {json.dumps(section, ensure_ascii=False)}'
    if source.classes:
        yield f"and set data.classes to the {len(source.classes)} classes listed in {FILE}"
