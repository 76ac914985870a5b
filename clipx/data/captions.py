"""Captions as samples of tar shards store them: a .txt, or a .json with other facts.

What the files of a set mean is decided once for the set, from a sample of its rows: whether each
line of a .txt is a caption of its own, and whether the .json or the .txt has the captions.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

from clipx.data.base import Guess
from clipx.data.tables.lines import marked
from clipx.data.tars import shown
from clipx.errors import BadSample, DataError, data_flag, listed

T = TypeVar("T")

Member = Literal["json", "txt"]
Lines = Literal["one", "each"]
SAMPLED = 200  # rows from which the settings of a set are guessed
_FEW = 0.1  # share of .json without captions up to which the others decide
_LINE_END = re.compile(r"\r\n|\r|\n")
_ADDRESS = re.compile(r"\w+://|^\S+$")  # a value that is no caption: an address, a name
_TELLING = re.compile("caption|text|alt|title|desc|prompt|sentence", re.IGNORECASE)


def decode(data: bytes) -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 with a mark or with plain letters.

    Raises `ValueError` for bytes that are text in none of them.
    """
    text = data.decode(marked(data) or _without_mark(data))
    text = text.removeprefix("\ufeff").strip("\0")
    if "\0" in text and text.replace("\0", "").strip():
        raise ValueError("it has zero bytes inside, expected text in UTF-8")
    return text


def _without_mark(data: bytes) -> str:
    """The encoding of text without a byte order mark: in UTF-16 every other byte of plain letters
    is zero."""
    if b"\0" in data.strip(b"\0") and len(data) % 2 == 0:
        text = data.rstrip(b"\0")
        for at, encoding in ((1, "utf-16-le"), (0, "utf-16-be")):
            zeros, others = text[at::2], text[1 - at :: 2]
            if zeros.count(0) >= len(zeros) / 2 and not others.count(0):
                return encoding
    return "utf-8"


class Unusable(ValueError):
    """The captions of a sample can be read and are of no use. Says why."""


class Texts(NamedTuple):
    """The members of a sample that may hold its captions."""

    txt: bytes | None
    json: bytes | None


@dataclasses.dataclass(frozen=True)
class Reader:
    """Reads the captions of samples."""

    captions_key: str = "captions"
    caption_key: str = "caption"
    captions_from: Member = "json"  # which to take where both have captions
    txt_lines: Lines = "one"

    def of_row(self, key: str, texts: Texts) -> tuple[str, ...] | None:
        """As `__call__`, of the row with a key. Raises `BadSample` for what cannot be used."""
        try:
            return self(texts)
        except Unusable as error:
            raise BadSample(key, str(error)) from None
        except (ValueError, RecursionError) as error:
            raise BadSample(key, f"the caption cannot be read ({error})") from None

    def __call__(self, texts: Texts) -> tuple[str, ...] | None:
        """The non-empty captions, stripped; None if the members have no place for captions.

        Raises `ValueError` or `RecursionError` for what cannot be read, `Unusable` for the rest.
        """
        first, second = self.of_json, self.of_txt
        if self.captions_from == "txt":
            first, second = second, first
        captions = first(texts)
        if not captions:
            other = second(texts)
            captions = captions if other is None else other
        if captions == ():
            raise Unusable("empty caption")
        return captions

    def of_txt(self, texts: Texts) -> tuple[str, ...] | None:
        """The captions of the .txt; None without a .txt."""
        if texts.txt is None:
            return None
        text = decode(texts.txt)
        return _clean(_LINE_END.split(text) if self.txt_lines == "each" else [text])

    def of_json(self, texts: Texts) -> tuple[str, ...] | None:
        """The captions of the .json; None without a .json that has one of the keys."""
        captions, values = None, None if texts.json is None else json.loads(texts.json)
        if isinstance(values, dict):
            for key in (self.captions_key, self.caption_key):
                value = values.get(key)
                if value is not None and not captions:
                    captions = _clean(_strings(value))
        return captions


class Settings(Protocol):
    """The settings of a source that reads captions from files; None: taken from the files."""

    @property
    def captions_key(self) -> str: ...
    @property
    def caption_key(self) -> str: ...
    @property
    def captions_from(self) -> Member | None: ...
    @property
    def txt_lines(self) -> Lines | None: ...


def decide(
    where: str, settings: Settings, samples: Sequence[Texts], *, labels: bool = False
) -> tuple[Reader, tuple[Guess, ...]]:
    """The reader of a set's captions, and what was guessed for it.

    where: the path of the set. samples: of rows that are spread over it. labels: whether rows have
    labels, and so need no captions. Raises `DataError` if the samples hold captions under other
    keys alone, and if it is unclear whether lines are captions.
    """
    reader, guesses = Reader(settings.captions_key, settings.caption_key), []
    given = {"captions_from": settings.captions_from, "txt_lines": settings.txt_lines}
    try:
        for key, guess_from in (("captions_from", _guess_member), ("txt_lines", _guess_lines)):
            value = given[key]
            if value is None and (guess := guess_from(reader, samples)):
                guesses.append(guess)
                value = guess.value
            if value is not None:
                reader = dataclasses.replace(reader, **{key: value})
        if not labels:
            _refuse_other_keys(reader, samples)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    return reader, tuple(guesses)


def _guess_member(reader: Reader, samples: Sequence[Texts]) -> Guess | None:
    """Whether a set has its captions in .json or in .txt, where some .json have none."""
    both = [texts for texts in samples if None not in texts]
    without = sum(not _usable(reader.of_json, texts) for texts in both)
    if not without:
        return None
    said = (
        f"{without:,} of {len(both):,} .json looked at have no text under {reader.captions_key} or "
        f"{reader.caption_key}"
    )
    with_txt = sum(bool(_usable(reader.of_txt, texts)) for texts in samples)
    if without < _FEW * len(both) or with_txt < (1 - _FEW) * len(samples):
        return Guess("captions_from", "json", f"{said}, and take their .txt")
    return Guess("captions_from", "txt", said)


def _guess_lines(reader: Reader, samples: Sequence[Texts]) -> Guess | None:
    """Whether each line of a .txt is a caption, where some .txt have several lines."""
    if reader.captions_from == "json":
        samples = [texts for texts in samples if not _usable(reader.of_json, texts)]
    each = dataclasses.replace(reader, txt_lines="each")
    counts = [len(lines) for texts in samples if (lines := _usable(each.of_txt, texts))]
    several = sum(count > 1 for count in counts)
    if not several:
        return None
    if several == len(counts):
        return Guess("txt_lines", "each", f"each of {several:,} .txt looked at has several lines")
    said = f"{several:,} of {len(counts):,} .txt looked at have several lines"
    if several > len(counts) / 2:
        raise DataError(
            f"{said}: set {data_flag('txt_lines', 'each')} if each line is a caption, or "
            f"{data_flag('txt_lines', 'one')}"
        )
    return Guess("txt_lines", "one", said)


def _refuse_other_keys(reader: Reader, samples: Sequence[Texts]) -> None:
    """Raises `DataError`, without the name of a file, if all samples have a .json and no captions:
    names the keys that the .json have, and the setting for the likeliest."""
    if not samples or any(_usable(reader, texts) for texts in samples):
        return
    if any(texts.json is None or texts.txt is not None for texts in samples):
        return
    found: collections.Counter[str] = collections.Counter()
    likely: collections.Counter[tuple[str, str]] = collections.Counter()
    for texts in samples:
        values = _usable(json.loads, texts.json)
        for key, value in values.items() if isinstance(values, dict) else ():
            found[key] += 1
            likely[_setting(value), key] += _likeness(key, value)
    own = (reader.captions_key, reader.caption_key)
    best = [pair for pair, score in likely.most_common() if score > 0 and pair[1] not in own][:3]
    if not found or (not best and any(key in found for key in own)):
        return  # the rows are bad one by one
    keys = listed([shown(key) for key, _ in found.most_common()])
    flags = [data_flag(setting, key) for setting, key in best]
    fix = " or ".join(flags) or "--config.data.caption_key to the key of the captions"
    raise DataError(
        f"no captions: the .json have the keys {keys}, and no text under "
        f"{' or '.join(own)}; set {fix}"
    )


def _setting(value: Any) -> str:
    return "captions_key" if isinstance(value, list) else "caption_key"


def _likeness(key: str, value: Any) -> int:
    """How much the value of a key of a .json looks like captions; 0: not at all."""
    try:
        words = [text for text in _clean(_strings(value)) if not _ADDRESS.search(text)]
    except Unusable:
        return 0
    return (2 + bool(_TELLING.search(key))) * bool(words)


def _strings(value: Any) -> list[str]:
    """The strings of a value of a .json. Raises `Unusable` for anything else."""
    listed = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str | None) for text in listed):
        raise Unusable("the captions in .json are not a list of strings")
    return [text for text in listed if text is not None]


def _usable(read: Callable[..., T], *values: Any) -> T | None:
    """What a function reads; None for what it cannot read."""
    try:
        return read(*values)
    except (ValueError, RecursionError):
        return None


def _clean(texts: Iterable[str]) -> tuple[str, ...]:
    """The texts without zero characters, marks and surrounding blanks; empty ones are left out."""
    # JSON can contain half a surrogate pair, which UTF-8 cannot encode
    encodable = (t.encode("utf-8", "replace").decode().removeprefix("\ufeff") for t in texts)
    return tuple(t for t in (t.replace("\0", "").strip() for t in encodable) if t)
