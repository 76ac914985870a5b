"""The source that reads what lies at a path, whatever it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

from clipx.config import binding
from clipx.data.base import Account, Example, Guess, Source
from clipx.data.captions import Lines, Member
from clipx.data.discover import discover
from clipx.data.limits import Limits


@dataclasses.dataclass(frozen=True)
class Auto(Source):
    """Finds out what lies at `path`, and reads it with the source for it: tar shards, a table,
    pictures beside their texts, or class folders. A training run looks before it assembles
    anything, and its config.json holds the source that it found.

    The other keys are those of the source that is taken. The constructor raises `DataError` if
    nothing, or more than one thing, lies there that clipx reads, and lists what does.
    """

    path: str | tuple[str, ...]  # a folder, a file, a glob or a brace range, or several
    # of `webdataset`, and all but the last of `files`
    captions_key: str | None = None
    caption_key: str | None = None
    captions_from: Member | None = None
    txt_lines: Lines | None = None
    truncated: Literal["refuse", "keep"] | None = None
    without_captions: bool | None = None  # of `files`
    # of `table`
    image: str | None = None
    captions: str | tuple[str, ...] | None = None
    separator: str | None = None
    quotes: Literal["", "cells", "letters"] | None = None
    root: str | None = None
    where: str | None = None
    label: str | None = None
    classes: tuple[str, ...] = ()  # of `table` and `webdataset`
    # of `folder`
    names: str | None = None
    classes_from: Literal["", "folder", "path"] | None = None

    def __post_init__(self) -> None:
        self._inner: Source
        self._found: tuple[Guess, ...]
        names = [field.name for field in dataclasses.fields(self) if field.name != "path"]
        given = {name: getattr(self, name) for name in names}
        given = {name: value for name, value in given.items() if value not in (None, ())}
        found = discover(self.path, given)
        cls = binding.find("data.sources", found.source, Source)
        values = binding.check(cls, {**given, **found.values}, where="config.data")
        inner = cls(**values)
        guesses: list[Guess] = [Guess("source", found.source, found.what)]
        guesses += (
            Guess(key, value, "found there")
            for key, value in found.values.items()
            if value != getattr(self, key)
        )
        for name, value in (
            ("_inner", inner),
            ("_found", (*guesses, *inner.guesses())),
            ("classes", inner.classes),
        ):
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self._inner)

    def __getitem__(self, row: int) -> Example:
        return self._inner[row]

    def glance(self, row: int) -> Example:
        return self._inner.glance(row)

    def limit(self, limits: Limits) -> None:
        super().limit(limits)
        self._inner.limit(limits)

    def keys(self) -> Iterator[str]:
        return self._inner.keys()

    def account(self) -> Account | None:
        return self._inner.account()

    def guesses(self) -> tuple[Guess, ...]:
        return self._found
