"""What a set is made of, found by decoding all of it: bad rows, sizes, words, doubles."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import io
import re
import unicodedata
from array import array
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from clipx.config.binding import bind
from clipx.data import pictures
from clipx.data.base import Example, Source
from clipx.data.text import tokenizers
from clipx.errors import BadSample

_CHUNK = 32  # rows that one thread takes at a time
_AHEAD = 8  # chunks a thread, at most, that are done before their turn
_QUANTILES = {"least": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "most": 1.0}
_SHOWN = 20  # bad rows in the table; the report has all
_GROUPS = 5  # of doubles, the largest
_LETTER = re.compile("[A-Za-z]")
_ORIENTATION = 0x0112  # EXIF's tag; 1 is upright
_Result = TypeVar("_Result")


def in_order(
    function: Callable[[int], _Result], rows: int, progress: Callable[[int], Any] | None = None
) -> Iterator[_Result]:
    """`function(row)` of every row, in order, computed by threads some hundred rows ahead.
    `progress(n)` is told of every n rows done."""
    threads = min(pictures.cores(), 16)
    span = threads * _AHEAD * _CHUNK
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for start in range(0, rows, span):
            stop = min(start + span, rows)
            chunks = [range(i, min(i + _CHUNK, stop)) for i in range(start, stop, _CHUNK)]
            for done in pool.map(lambda chunk: [function(row) for row in chunk], chunks):
                yield from done
                if progress:
                    progress(len(done))


def verify(
    source: Source,
    *,
    count_tokens: Callable[[str], int] | None = None,
    progress: Callable[[int], Any] | None = None,
) -> dict[str, Any]:
    """A report fit for JSON: `rows`, `bad` (row, key and reason of each row that cannot be used),
    `pictures`, `captions` and `labels` of the others. Every picture is decoded. Rows are a hundred
    bytes each in memory."""
    tally, bad = _Tally(), []
    look = functools.partial(_look, source, count_tokens)
    for row, seen in enumerate(in_order(look, len(source), progress)):
        if isinstance(seen, BadSample):
            bad.append({"row": row, "key": seen.key, "reason": seen.reason})
        else:
            tally.add(row, seen)
    return {"rows": len(source), "bad": bad, **tally.report(source)}


class _Seen(NamedTuple):
    """What there is to say of one row."""

    width: int
    height: int
    size: int  # bytes
    kind: str  # JPEG, ...; pixels for a picture that is not encoded
    mode: str  # Pillow's
    turned: bool  # by an EXIF tag
    digest: int
    label: int | None
    texts: list[tuple[int, int, int, str]]  # characters, tokens, digest, script


def token_counter(section: Mapping[str, Any] | None) -> Callable[[str], int] | None:
    """What says how many tokens a caption has, uncut, by the tokenizer of `config.tokenizer`; None
    without a tokenizer, and where one would first have to be trained."""
    if section is None:
        return None
    bound = bind(tokenizers.TokenizerConfig, section, where="config.tokenizer")
    if bound.name == "sentencepiece" and not bound.path:
        return None
    tokenizer = tokenizers.build(bound)
    return lambda text: len(tokenizer.body(text)) + 2  # its marks


def _look(source: Source, count_tokens: Callable[[str], int] | None, row: int) -> _Seen | BadSample:
    try:
        example = source[row]
        width, height, kind = pictures.header(example)
        pictures.decode(example)
    except BadSample as error:
        return error
    data = example.image if kind else np.ascontiguousarray(example.image).tobytes()
    texts = [
        (len(t), count_tokens(t) if count_tokens else 0, _digest_text(t), script(t))
        for t in example.texts
    ]
    about = (len(data), kind or "pixels", *_mode(example, kind), _digest(data))
    return _Seen(width, height, *about, example.label, texts)


def _digest(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _digest_text(text: str) -> int:
    return _digest(text.encode("utf-8", "surrogatepass"))


def _mode(example: Example, kind: str) -> tuple[str, bool]:
    if not kind:
        return "RGB", False
    with Image.open(io.BytesIO(example.image)) as head:
        turned = False
        if "exif" in head.info:
            with contextlib.suppress(Exception):  # a damaged tag turns nothing
                turned = head.getexif().get(_ORIENTATION, 1) != 1
        return head.mode, turned


def script(text: str) -> str:
    """The script that most of a text's letters are of, such as Latin, CJK or Arabic, as Unicode
    names its letters; `no letters` for a text without."""
    if text.isascii():
        return "Latin" if _LETTER.search(text) else "no letters"
    letters = collections.Counter(_script(c) for c in text if c.isalpha())
    return letters.most_common(1)[0][0] if letters else "no letters"


@functools.lru_cache(1 << 16)
def _script(letter: str) -> str:
    plain = unicodedata.normalize("NFKC", letter)[0]  # of full-width letters and the like
    word = unicodedata.name(plain, "other").partition(" ")[0]
    return word if word == "CJK" else word.capitalize()


class _Tally:
    """What was seen of the rows that can be used, in flat arrays."""

    def __init__(self):
        self.row, self.digest = array("q"), array("Q")
        self.numbers = {name: array("q") for name in ("width", "height", "bytes", "captions")}
        self.lengths = {name: array("q") for name in ("characters", "tokens")}
        self.owner, self.text = array("q"), array("Q")  # row and digest of each caption
        self.kinds, self.modes, self.scripts, self.labels = (
            collections.Counter() for _ in range(4)
        )
        self.turned = 0

    def add(self, row: int, seen: _Seen) -> None:
        self.row.append(row)
        self.digest.append(seen.digest)
        values = (seen.width, seen.height, seen.size, len(seen.texts))
        for numbers, value in zip(self.numbers.values(), values):
            numbers.append(value)
        for characters, tokens, digest, name in seen.texts:
            self.lengths["characters"].append(characters)
            self.lengths["tokens"].append(tokens)
            self.text.append(digest)
            self.owner.append(row)
            self.scripts[name] += 1
        self.kinds[seen.kind] += 1
        self.modes[seen.mode] += 1
        self.turned += seen.turned
        if seen.label is not None:
            self.labels[seen.label] += 1

    def report(self, source: Source) -> dict[str, Any]:
        pictures_twice, owners = _doubles(self.digest, self.row)
        texts_twice, first = _doubles(self.text, self.owner)
        names = dict(enumerate(source.classes))
        most = []
        for digest, places in first:
            text = next(t for t in source[places[0]].texts if _digest_text(t) == digest)
            most.append({"caption": text, "times": len(places)})
        captions_each = self.numbers.pop("captions")
        if not any(self.lengths["tokens"]):
            del self.lengths["tokens"]
        return {
            "pictures": {
                "formats": dict(self.kinds.most_common()),
                "modes": dict(self.modes.most_common()),
                "turned by EXIF": self.turned,
                "sizes": _quantiles(self.numbers),
                "equal to an earlier one": pictures_twice,
                "equal": [[source[row].key for row in rows[:_GROUPS]] for _, rows in owners],
            },
            "captions": {
                "captions": len(self.text),
                "rows without": list(captions_each).count(0),
                "lengths": _quantiles({"captions a picture": captions_each, **self.lengths}),
                "scripts": dict(self.scripts.most_common()),
                "equal to an earlier one": texts_twice,
                "most frequent": most,
            },
            "labels": {str(names.get(i, i)): n for i, n in sorted(self.labels.items())},
        }


def _quantiles(columns: dict[str, array]) -> dict[str, dict[str, int]]:
    return {
        name: dict(
            zip(
                _QUANTILES,
                np.quantile(np.array(values), list(_QUANTILES.values()), method="nearest").tolist(),
            )
        )
        for name, values in columns.items()
        if values
    }


def _doubles(digests: array, owners: array) -> tuple[int, list[tuple[int, list[int]]]]:
    """How many digests are equal to an earlier one; the digest and owners of the largest groups."""
    values, rows = np.array(digests, np.uint64), np.array(owners, np.int64)
    distinct, counts = np.unique(values, return_counts=True)
    groups = [i for i in np.argsort(-counts, kind="stable")[:_GROUPS] if counts[i] > 1]
    found = [(int(distinct[i]), rows[values == distinct[i]].tolist()) for i in groups]
    return len(values) - len(distinct), found


def table(report: dict[str, Any]) -> list[str]:
    """The report as lines for a terminal."""
    bad, rows = report["bad"], report["rows"]
    share = f" ({len(bad) / rows:.2%})" if bad else ""
    lines = [f"{rows:,} rows, {len(bad):,} of them bad{share}"]
    lines += ["  {row:>9,}  {key}: {reason}".format(**one) for one in bad[:_SHOWN]]
    lines += [f"  and {len(bad) - _SHOWN:,} more"] * (len(bad) > _SHOWN)
    pictures, captions = report["pictures"], report["captions"]
    head = "".join(f"{name:>10}" for name in _QUANTILES)
    lines.append(f"{'':20}{head}")
    for name, values in {**pictures["sizes"], **captions["lengths"]}.items():
        lines.append(f"  {name:18}" + "".join(f"{values[q]:>10,}" for q in _QUANTILES))
    lines.append(f"pictures  {_counts(pictures['formats'])}; modes {_counts(pictures['modes'])}")
    if pictures["turned by EXIF"]:
        lines.append(f"  {pictures['turned by EXIF']:,} with a tag to turn them, which is not done")
    if pictures["equal to an earlier one"]:
        lines.append(f"  {pictures['equal to an earlier one']:,} equal to an earlier one, such as")
        lines += ["    " + " = ".join(keys) for keys in pictures["equal"]]
    lines.append(f"captions  {captions['captions']:,}: {_counts(captions['scripts']) or 'none'}")
    if captions["rows without"]:
        lines.append(f"  {captions['rows without']:,} rows without a caption")
    if captions["equal to an earlier one"]:
        lines.append(f"  {captions['equal to an earlier one']:,} equal to an earlier one, such as")
        for one in captions["most frequent"]:
            text = one["caption"][:60] + "…" * (len(one["caption"]) > 60)
            lines.append(f"    {one['times']:>6,} x  {text}")
    if report["labels"]:
        counts = report["labels"].values()
        lines.append(
            f"labels    {len(counts):,} classes of {min(counts):,} to {max(counts):,} rows"
        )
    return lines


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())
