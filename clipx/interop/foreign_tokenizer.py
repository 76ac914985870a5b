"""Which of clipx's tokenizers gives the same ids as the tokenizer files of a foreign model.

Each function returns the fields of a `TokenizerConfig`; a sentence about a tokenizer that clipx
does not have, which says what to do; or None where the folder has no tokenizer of its own."""

from __future__ import annotations

import hashlib
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict

from clipx.config import reading
from clipx.errors import ConfigError
from clipx.interop import weights
from clipx.interop.base import read_json
from clipx.interop.settings import Section
from clipx.interop.tokenizer import OPENAI_MERGES, PIECES, SETTINGS, SIGLIP, check_siglip

Found = dict[str, Any] | str | None

FAST, MERGES, VOCABULARY = "tokenizer.json", "merges.txt", "vocab.json"
_CLIP_CLASSES = (None, "CLIPTokenizer", "CLIPTokenizerFast", "PreTrainedTokenizerFast")
_SIGLIP_CLASSES = (None, SIGLIP, "SiglipTokenizerFast")
_CLIP_SIZE = 49408
_MARKS = ("<|startoftext|>", "<|endoftext|>")
_GOOGLE = re.compile(r"siglip(?!.*2)", re.IGNORECASE)  # SigLIP 2 has Gemma's tokenizer


class _BytePairs(TypedDict):
    """The model in a `tokenizer.json` of CLIP's kind."""

    vocab: dict[str, int]
    merges: list[str | list[str]]


class _Added(TypedDict):
    content: str
    id: int


class _Fast(TypedDict):
    """A `tokenizer.json` of CLIP's kind."""

    model: _BytePairs
    added_tokens: NotRequired[list[_Added] | None]


def siglip(folder: pathlib.Path, size: int, context: int, where: str) -> Found:
    """The tokenizer of a SigLIP folder of transformers. size, context: of the text tower. Raises
    `ConfigError` at `where` for a broken file, and for other settings than Google's."""
    settings = read_json(folder / SETTINGS, where) or {}
    kind = settings.get("tokenizer_class")
    if kind not in _SIGLIP_CLASSES:
        return f"{SETTINGS} in {folder} names a {kind}, which clipx does not have"
    return _pieces(folder, size, context, settings, where)


def _pieces(
    folder: pathlib.Path, size: int, context: int, settings: Mapping[str, Any], where: str
) -> Found:
    pieces = folder / PIECES
    if not pieces.is_file():
        return f"no {PIECES} of a {SIGLIP} in the folder {folder}: put the model's own there"
    weights.check_content(pieces, where)
    check_siglip(settings, where, context)
    return {
        "name": "sentencepiece",
        "vocab_size": size,
        "context": context,
        "path": str(pieces),
        "cleaning": "siglip",
        "marks": "end",
    }


def open_clip(folder: pathlib.Path, config: Mapping[str, Any], where: str) -> Found:
    """The tokenizer of an open_clip folder. config: a `model_cfg`. Raises `ConfigError` at `where`
    as `siglip` does."""
    text = Section(config, "model_cfg").section("text_cfg")
    name, options = text.get("hf_tokenizer_name"), text.get("tokenizer_kwargs", {})
    if not name:
        cleaned = options.get("clean", "lower") if isinstance(options, dict) else options
        if cleaned == "lower" and not text.get("tokenizer_mode"):
            return None
        return f"its text_cfg cleans captions by {cleaned!r}, which clipx does not"
    google = options == {"clean": "canonicalize"} and not text.get("tokenizer_mode")
    if not (google and _GOOGLE.search(str(name))) and not (google and name == "."):
        return f"it is {name!r} of transformers, which clipx does not have"
    size, context = text.size("vocab_size", _CLIP_SIZE), text.size("context_length", 77)
    settings = read_json(folder / SETTINGS, where) or {}
    return _pieces(folder, size, context, settings, where)


def clip(folder: pathlib.Path, size: int, context: int, where: str) -> Found:
    """The tokenizer of a CLIP folder of transformers: OpenAI's, or the folder's own merges. size,
    context: of the text tower. Raises `ConfigError` at `where` for a broken file."""
    settings = read_json(folder / SETTINGS, where) or {}
    fast = read_json(folder / FAST, where)
    kind = settings.get("tokenizer_class")
    if kind not in _CLIP_CLASSES:
        return f"{SETTINGS} in {folder} names a {kind}, which clipx does not have"
    length = settings.get("model_max_length")
    if isinstance(length, int) and length < context:
        return f"{SETTINGS} in {folder} cuts texts to {length} tokens, its text tower has {context}"
    if settings.get("do_lower_case", True) is not True:
        return f"{SETTINGS} in {folder} keeps capital letters, which clipx does not"
    if fast is not None:
        found = _fast(fast, folder, where)
        if isinstance(found, str):
            return found
        merges, ids = found
    elif (folder / MERGES).is_file():
        merges, ids = _merges(folder / MERGES, where), {}
        for name in (VOCABULARY, "added_tokens.json"):
            ids |= read_json(folder / name, where, dict[str, int]) or {}
    else:
        return None
    return _clip_fields(folder, merges, ids, size, context, where)


def _fast(
    fast: Mapping[str, Any], folder: pathlib.Path, where: str
) -> tuple[list[str], dict[str, int]] | str:
    """(merges, ids of all tokens) of a `tokenizer.json`; a sentence about another kind. Raises
    `ConfigError` at `where` for a broken file."""
    given = fast.get("model")
    model: dict[str, Any] = given if isinstance(given, dict) else {}
    if (model.get("type"), model.get("end_of_word_suffix")) != ("BPE", "</w>"):
        return f"{FAST} in {folder} has no byte pairs like CLIP's"
    try:
        read: _Fast = reading.shaped(fast, _Fast)
    except ValueError as error:
        found = f"{folder / FAST} ({error})"
        raise ConfigError(where, found, "a tokenizer that transformers saved") from None
    merges = [" ".join(m) if isinstance(m, list) else m for m in read["model"]["merges"]]
    added = {mark["content"]: mark["id"] for mark in read.get("added_tokens") or []}
    return merges, read["model"]["vocab"] | added


def _clip_fields(
    folder: pathlib.Path,
    merges: list[str],
    ids: Mapping[str, int],
    size: int,
    context: int,
    where: str,
) -> Found:
    if ids != _clip_ids(merges) or size != len(ids):
        return (
            f"the vocabulary in {folder} has {len(ids)} ids for {len(merges)} merges and a text "
            f"tower of {size} words, which are not CLIP's ids of these merges"
        )
    if hashlib.sha256("\n".join(merges).encode()).hexdigest() == OPENAI_MERGES:
        return {"name": "clip_bpe", "context": context}
    path = folder / MERGES
    if not path.is_file() or _merges(path, where) != merges:
        return (
            f"{FAST} in {folder} has merges of its own: write them to {path}, one in a line, below "
            "a line '#version: 0.2'"
        )
    return {"name": "clip_bpe", "vocab_size": size, "context": context, "path": str(path)}


def _merges(path: pathlib.Path, where: str) -> list[str]:
    """The merges of a file with a line for the version and one for each merge."""
    weights.check_content(path, where)
    try:
        lines = reading.read_text(path).split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(where, f"{path} ({error})", "a file of merges") from None
    return [line for line in lines[1:] if len(line.split()) == 2]


def _clip_ids(merges: list[str]) -> dict[str, int]:
    """The id of each token of CLIP's byte pairs with these merges (openai/CLIP,
    simple_tokenizer.py)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = [*map(chr, shown), *(chr(256 + i) for i in range(len(hidden)))]
    words = ["".join(merge.split()) for merge in merges]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *words, *_MARKS]
    return {token: i for i, token in enumerate(tokens)}
