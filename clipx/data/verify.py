"""A report about a data set from decoding every row: bad rows, sizes, captions, duplicates."""

from __future__ import annotations

import collections
import contextlib
import functools
import re
import unicodedata
from array import array
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from clipx.config.binding import bind
from clipx.data import pictures, raster
from clipx.data.base import Source
from clipx.data.text import tokenizers
from clipx.data.threads import in_order
from clipx.errors import BadSample

_QUANTILES = {"least": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "most": 1.0}
_SHOWN = 20  # bad rows listed on the terminal; the report has all
_GROUPS = 5  # largest groups of duplicates to list
_LETTER = re.compile("[A-Za-z]")
_ORIENTATION = 0x0112  # EXIF tag; 1 means upright


def verify(
    source: Source,
    *,
    count_tokens: Callable[[str], int] | None = None,
    progress: Callable[[int], Any] | None = None,
) -> dict[str, Any]:
    """Decodes every picture and returns a report that can be stored as JSON.

    Its keys are `rows`, `bad` (the row, key and reason of each bad row), and `pictures`, `captions`
    and `labels` of the other rows. Needs about 100 bytes of memory per row. `count_tokens` is
    applied to every caption, and `progress(n)` is called after every n rows.
    """
    tally, bad = _Tally(), []
    inspect = functools.partial(_inspect, source, count_tokens)
    for row, facts in enumerate(in_order(inspect, len(source), progress)):
        if isinstance(facts, BadSample):
            bad.append({"row": row, "key": facts.key, "reason": facts.reason})
        else:
            tally.add(row, facts)
    return {"rows": len(source), "bad": bad, **tally.report(source)}


class _Facts(NamedTuple):
    """What the report needs to know about one row."""

    width: int
    height: int
    size: int  # bytes
    kind: str  # JPEG, ...; "pixels" for a picture that is not encoded
    mode: str  # Pillow's
    turned: bool  # an EXIF tag says that the picture is not upright
    digest: int
    label: int | None
    texts: list[tuple[int, int, int, str]]  # characters, tokens, digest, script


def token_counter(section: Mapping[str, Any] | None) -> Callable[[str], int] | None:
    """A function that counts the tokens of a caption, marks included, before truncation.

    section: `config.tokenizer`. The result is None without one, and for a tokenizer that would
    first have to be trained.
    """
    if section is None:
        return None
    bound = bind(tokenizers.TokenizerConfig, section, where="config.tokenizer")
    if bound.name == "sentencepiece" and not bound.path:
        return None
    tokenizer = tokenizers.build(bound)
    return lambda text: len(tokenizer.body(text)) + 2  # with the start and end marks


def _inspect(
    source: Source, count_tokens: Callable[[str], int] | None, row: int
) -> _Facts | BadSample:
    try:
        example = source[row]
        width, height, kind = pictures.header(example, source.limits)
        pictures.decode(example)
    except BadSample as error:
        return error
    data = pictures.raw(example)
    texts = [
        (len(t), count_tokens(t) if count_tokens else 0, _digest_text(t), script(t))
        for t in example.texts
    ]
    mode, turned = _mode(example.image)
    return _Facts(
        width=width,
        height=height,
        size=len(data),
        kind=kind or "pixels",
        mode=mode,
        turned=turned,
        digest=pictures.digest(data),
        label=example.label,
        texts=texts,
    )


def _digest_text(text: str) -> int:
    return pictures.digest(text.encode("utf-8", "surrogatepass"))


def _mode(image: bytes | np.ndarray) -> tuple[str, bool]:
    """Pillow's mode, and whether an EXIF tag says that the picture is not upright."""
    if isinstance(image, np.ndarray):
        return "RGB", False
    with raster.opened(image) as head:
        turned = False
        if "exif" in head.info:
            with contextlib.suppress(Exception):  # a damaged tag counts as upright
                turned = head.getexif().get(_ORIENTATION, 1) != 1
        return head.mode, turned


def script(text: str) -> str:
    """The most frequent script among the letters of a text, such as Latin, CJK or Arabic, by the
    Unicode names of the letters; "no letters" if there are none."""
    if text.isascii():
        return "Latin" if _LETTER.search(text) else "no letters"
    letters = collections.Counter(_script(c) for c in text if c.isalpha())
    return letters.most_common(1)[0][0] if letters else "no letters"


@functools.lru_cache(1 << 16)
def _script(letter: str) -> str:
    plain = unicodedata.normalize("NFKC", letter)[0]  # full-width letters have no script name
    word = unicodedata.name(plain, "other").partition(" ")[0]
    return word if word == "CJK" else word.capitalize()


class _Tally:
    """The facts about all usable rows, in flat arrays."""

    def __init__(self) -> None:
        self.row, self.digest = array("q"), array("Q")
        self.numbers = {name: array("q") for name in ("width", "height", "bytes", "captions")}
        self.lengths = {name: array("q") for name in ("characters", "tokens")}
        self.owner, self.text = array("q"), array("Q")  # the row and digest of each caption
        self.kinds, self.modes, self.scripts, self.labels = (
            collections.Counter() for _ in range(4)
        )
        self.turned = 0

    def add(self, row: int, facts: _Facts) -> None:
        self.row.append(row)
        self.digest.append(facts.digest)
        values = (facts.width, facts.height, facts.size, len(facts.texts))
        for numbers, value in zip(self.numbers.values(), values):
            numbers.append(value)
        for characters, tokens, digest, name in facts.texts:
            self.lengths["characters"].append(characters)
            self.lengths["tokens"].append(tokens)
            self.text.append(digest)
            self.owner.append(row)
            self.scripts[name] += 1
        self.kinds[facts.kind] += 1
        self.modes[facts.mode] += 1
        self.turned += facts.turned
        if facts.label is not None:
            self.labels[facts.label] += 1

    def report(self, source: Source) -> dict[str, Any]:
        repeated_pictures, picture_groups = _duplicates(self.digest, self.row)
        repeated_texts, text_groups = _duplicates(self.text, self.owner)
        names = dict(enumerate(source.classes))
        frequent = []
        for digest, rows in text_groups:
            text = next(t for t in source[rows[0]].texts if _digest_text(t) == digest)
            frequent.append({"caption": text, "times": len(rows)})
        captions_each = self.numbers.pop("captions")
        if not any(self.lengths["tokens"]):
            del self.lengths["tokens"]
        return {
            "pictures": {
                "formats": dict(self.kinds.most_common()),
                "modes": dict(self.modes.most_common()),
                "turned by EXIF": self.turned,
                "sizes": _quantiles(self.numbers),
                "equal to an earlier one": repeated_pictures,
                "equal": [
                    [source[row].key for row in rows[:_GROUPS]] for _, rows in picture_groups
                ],
            },
            "captions": {
                "captions": len(self.text),
                "rows without": list(captions_each).count(0),
                "lengths": _quantiles({"captions a picture": captions_each, **self.lengths}),
                "scripts": dict(self.scripts.most_common()),
                "equal to an earlier one": repeated_texts,
                "most frequent": frequent,
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


def _duplicates(digests: array, owners: array) -> tuple[int, list[tuple[int, list[int]]]]:
    """Returns (the number of digests that are equal to an earlier one, the largest groups of equal
    digests); a group is (digest, rows)."""
    values, rows = np.array(digests, np.uint64), np.array(owners, np.int64)
    distinct, counts = np.unique(values, return_counts=True)
    largest = [i for i in np.argsort(-counts, kind="stable")[:_GROUPS] if counts[i] > 1]
    groups = [(int(distinct[i]), rows[values == distinct[i]].tolist()) for i in largest]
    return len(values) - len(distinct), groups


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
        count = pictures["turned by EXIF"]
        lines.append(f"  {count:,} with an EXIF orientation tag, which clipx ignores")
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
