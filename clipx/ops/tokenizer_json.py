"""Reads `tokenizer.json`, the file in which the package `tokenizers` keeps a complete tokenizer, as
the models of transformers and sentence-transformers have it."""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from clipx.config import reading, secrets
from clipx.errors import ConfigError, DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILE = "tokenizer.json"
_WHERE = "config.tokenizer.path"
# how models name the marks that no text needs, where no file says it
_NAMES = {"pad": ("[PAD]", "<pad>"), "unknown": ("[UNK]", "<unk>"), "mask": ("[MASK]", "<mask>")}


def read(path: str, where: str = _WHERE) -> str:
    """The content of a `tokenizer.json`. path: the file or its folder. Raises `ConfigError` at
    `where` for a path without one."""
    file = pathlib.Path(path)
    try:
        file = pathlib.Path(secrets.expand(path))
        file = file / FILE if file.is_dir() else file
        return reading.read_text(file)
    except (OSError, UnicodeDecodeError, secrets.MissingVariable) as error:
        found = f"{str(file)!r} ({getattr(error, 'strerror', None) or error})"
        fix = (
            f'python -c "from transformers import AutoTokenizer as A; f = {str(file.parent)!r}; '
            'A.from_pretrained(f).save_pretrained(f)" makes it from the files of a slow tokenizer'
        )
        raise ConfigError(where, found, f"a {FILE}, or a folder with one", fix) from None


def build(content: str, source: str) -> Tokenizer:
    """The tokenizer, without the truncation and the padding that its file may ask for. source: the
    file, for errors. Raises `DataError` for anything else."""
    import tokenizers

    try:
        core = tokenizers.Tokenizer.from_str(content)
    except Exception as error:  # the package raises no other kind
        raise DataError(f"{source}: not a {FILE} ({error})") from None
    core.no_truncation()
    core.no_padding()
    return core


# to be asked, not changed: several functions ask about one file, and a large one takes a second
_parsed = functools.lru_cache(maxsize=1)(build)


def encode(core: Tokenizer, text: str, *, marks: bool = False) -> list[int]:
    """The ids of one text."""
    return core.encode(text, add_special_tokens=marks).ids


def ids(
    content: str, source: str, names: Mapping[str, str] | None = None, where: str = _WHERE
) -> dict[str, int | None]:
    """The ids that `TokenizerConfig.ids` holds: "start" and "end", as the file puts them around a
    text, "pad", "unknown" and "mask".

    names: how the model calls the last three, if its other files say so. Raises `ConfigError` at
    `where` for a tokenizer that puts no end mark behind a text, or several marks on one side.
    """
    core = _parsed(content, source)
    bare, marked = encode(core, "a"), encode(core, "a", marks=True)
    at = next((i for i in range(len(marked)) if marked[i : i + len(bare)] == bare), -1)
    before, after = marked[:at], marked[at + len(bare) :]
    if at < 0 or len(before) > 1 or len(after) != 1:
        shown = " ".join(str(core.id_to_token(i)) for i in marked)
        expected = "one mark behind a text, and one or none in front of it"
        raise ConfigError(where, f"{source}, which makes {shown!r} of 'a'", expected)
    model, padding = (json.loads(content).get(key) or {} for key in ("model", "padding"))
    own = {"pad": padding.get("pad_token"), "unknown": model.get("unk_token")}
    given: dict[str, str] = {k: v for k, v in {**own, **(names or {})}.items() if v}

    def named(mark: str) -> int | None:
        known = [given[mark], *_NAMES[mark]] if mark in given else _NAMES[mark]
        return next((i for name in known if (i := core.token_to_id(name)) is not None), None)

    pad, unknown = named("pad"), named("unknown")
    unknown = model.get("unk_id") if unknown is None else unknown
    if pad is None:
        found = f"{source}, without a token {given.get('pad') or ' or '.join(_NAMES['pad'])}"
        raise ConfigError(where, found, "a token that fills texts up to their common length")
    start = before[0] if before else None
    return {"pad": pad, "start": start, "end": after[0], "unknown": unknown, "mask": named("mask")}


def size(content: str, source: str) -> int:
    """The rows of a table with every id."""
    return 1 + max(_parsed(content, source).get_vocab(with_added_tokens=True).values())


def token_id(content: str, source: str, token: str) -> int | None:
    """The id of a token; None without one."""
    return _parsed(content, source).token_to_id(token)


def check(content: str, source: str, vocab_size: int, expected: Mapping[str, int | None]) -> None:
    """Raises `ConfigError` for a file with more ids than `vocab_size`, or that puts other marks
    around a text than the `expected` ids say."""
    rows = size(content, source)
    if rows > vocab_size:
        raise ConfigError(
            "config.tokenizer.vocab_size",
            f"{vocab_size}, with {rows} ids in {source}",
            f"at least {rows}",
            f"config.tokenizer.vocab_size={rows}",
        )
    found = ids(content, source)
    for mark in ("start", "end"):
        if found[mark] != expected[mark]:
            raise ConfigError(
                f"config.tokenizer.ids.{mark}",
                str(expected[mark]),
                f"{found[mark]}, as {source} puts it around a text",
                f"config.tokenizer.ids.{mark}={found[mark]}",
            )
