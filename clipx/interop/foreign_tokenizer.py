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
from clipx.interop.encoders import tokenizer
from clipx.interop.settings import Section
from clipx.interop.tokenizer import OPENAI_MERGES, PIECES, SETTINGS, SIGLIP, check_siglip

Found = dict[str, Any] | str | None

FAST, MERGES, VOCABULARY = "tokenizer.json", "merges.txt", "vocab.json"
_CLIP_CLASSES = (None, "CLIPTokenizer", "CLIPTokenizerFast", "PreTrainedTokenizerFast")
_SIGLIP_CLASSES = (None, SIGLIP, "SiglipTokenizerFast")
_CLIP_SIZE = 49408
_MARKS = ("<|startoftext|>", "<|endoftext|>")
_GOOGLE = re.compile(r"siglip(?!.*2)", re.IGNORECASE)  # SigLIP 2 has Gemma's tokenizer
_CLEANED = {"whitespace": "clip", "lower": "lower", "canonicalize": "canonical"}  # open_clip's
_GEMMA = ("GemmaTokenizer", "GemmaTokenizerFast", "Siglip2Tokenizer")


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


def library(
    folder: pathlib.Path,
    size: int,
    context: int,
    cleaning: str,
    where: str,
    *,
    pad_id: int | None = None,
    marks: str = "both",
) -> Found:
    """The tokenizer of a folder's `tokenizer.json`, as transformers reads it.

    size, context, pad_id: of the text tower; a `pad_id` of None for one that reads padding as any
    other token. cleaning: of texts before they reach the tokenizer."""
    if not (folder / FAST).is_file():
        return f"{folder} has no {FAST}: put the model's own there"
    options: dict[str, Any] = {"size": size, "pad_id": pad_id, "cleaning": cleaning, "notes": []}
    try:
        found, differences = tokenizer.find(folder, "", where, **options)
    except ConfigError as error:  # the towers can be read without it
        return " ".join(f"{error.found}, where clipx needs {error.expected}".split())
    if differences:
        return f"{folder}: {'; '.join(differences)}"
    return found.section | {"context": context, "marks": marks}


def siglip(folder: pathlib.Path, size: int, context: int, where: str) -> Found:
    """The tokenizer of a SigLIP folder of transformers. size, context: of the text tower. Raises
    `ConfigError` at `where` for a broken file, and for other settings than Google's."""
    settings = read_json(folder / SETTINGS, where) or {}
    kind = settings.get("tokenizer_class")
    if kind in _GEMMA:
        if kind == _GEMMA[-1] and (fault := _own_class(folder, settings, where)):
            return f"{SETTINGS} in {folder} names a {kind}, {fault}"
        given = library(folder, size, context, "raw", where)
        return (
            f"{SETTINGS} in {folder} names a {kind}: {given}" if isinstance(given, str) else given
        )
    if kind not in _SIGLIP_CLASSES:
        return f"{SETTINGS} in {folder} names a {kind}, which clipx does not have"
    return _pieces(folder, size, context, settings, where)


def _own_class(folder: pathlib.Path, settings: Mapping[str, Any], where: str) -> str:
    """What SigLIP 2's own class in transformers makes otherwise than a folder's files say; "" for
    nothing. It makes texts lower case, and pads on the left unless `settings` say otherwise."""
    fast = read_json(folder / FAST, where) or {}
    first = fast.get("normalizer")
    while isinstance(first, dict) and first.get("type") == "Sequence":
        first = next(iter(first.get("normalizers") or []), None)
    if fast and not (isinstance(first, dict) and first.get("type") == "Lowercase"):
        at = repr(str(folder))
        anew = f"AutoTokenizer.from_pretrained({at}).save_pretrained({at})"
        return f"whose lower case {FAST} does not have: let transformers write both anew, {anew}"
    if settings.get("padding_side") != "right":
        return "which pads on the left: write the padding_side of the model's training there"
    return ""


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


def open_clip(
    folder: pathlib.Path,
    config: Mapping[str, Any],
    where: str,
    *,
    size: int | None = None,
    pad_id: int | None = None,
) -> Found:
    """The tokenizer of an open_clip folder. config: a `model_cfg`. size, pad_id: of a text tower
    that transformers builds. Raises `ConfigError` at `where` as `siglip` does."""
    text = Section(config, "model_cfg").section("text_cfg")
    name, options = text.get("hf_tokenizer_name"), text.get("tokenizer_kwargs", {})
    if not name:
        cleaned = options.get("clean", "lower") if isinstance(options, dict) else options
        if cleaned == "lower" and not text.get("tokenizer_mode"):
            return None
        return f"its text_cfg cleans captions by {cleaned!r}, which clipx does not"
    size, context = size or text.size("vocab_size", _CLIP_SIZE), text.size("context_length", 77)
    mode, google = text.get("tokenizer_mode"), options == {"clean": "canonicalize"}
    google = google and not mode and (name == "." or bool(_GOOGLE.search(str(name))))
    if google:
        rest = (folder, size, context)
        given = None if (folder / PIECES).is_file() else library(*rest, "canonical", where)
        if isinstance(given, dict):
            return given
        found = _pieces(*rest, read_json(folder / SETTINGS, where) or {}, where)
        both = isinstance(found, str) and given is not None and (folder / FAST).is_file()
        return f"{found}; nor can its other tokenizer be read: {given}" if both else found
    about = Section(options, "tokenizer_kwargs", "tokenizer_kwargs")
    cleaning = about.get("clean", "whitespace")
    marks = "start" if about.flag("strip_sep_token", False) else "both"
    if mode or cleaning not in _CLEANED or about.unread():
        stated = ", ".join([*([f"tokenizer_mode {mode!r}"] if mode else []), *about.unread()])
        return f"it is {name!r} of transformers with {stated or cleaning!r}"
    rest = (size, context, _CLEANED[cleaning], where)
    given = library(folder, *rest, pad_id=pad_id, marks=marks)
    return f"it is {name!r} of transformers: {given}" if isinstance(given, str) else given


def clip(folder: pathlib.Path, size: int, context: int, where: str) -> Found:
    """The tokenizer of a CLIP folder of transformers: OpenAI's, or the folder's own merges. size,
    context: of the text tower. Raises `ConfigError` at `where` for a broken file."""
    settings = read_json(folder / SETTINGS, where) or {}
    fast = read_json(folder / FAST, where)
    kind = settings.get("tokenizer_class")
    if kind not in _CLIP_CLASSES:
        if fast is not None:
            return library(folder, size, context, "raw", where)
        return f"{SETTINGS} in {folder} names a {kind}, which clipx does not have without a {FAST}"
    length = settings.get("model_max_length")
    if isinstance(length, int) and length < context:
        return f"{SETTINGS} in {folder} cuts texts to {length} tokens, its text tower has {context}"
    if settings.get("do_lower_case", True) is not True:
        return f"{SETTINGS} in {folder} keeps capital letters, which clipx does not"
    if fast is not None:
        given = _fast(fast, folder, where)
        if given is None:
            other = library(folder, size, context, "raw", where)
            if isinstance(other, dict):
                return other
            return f"{FAST} in {folder} has no byte pairs like CLIP's, and is no other: {other}"
        merges, ids = given
    elif (folder / MERGES).is_file():
        merges, ids = _merges(folder / MERGES, where), {}
        for name in (VOCABULARY, "added_tokens.json"):
            ids |= read_json(folder / name, where, dict[str, int]) or {}
    else:
        return None
    return _clip_fields(folder, merges, ids, size, context, where)


def _fast(
    fast: Mapping[str, Any], folder: pathlib.Path, where: str
) -> tuple[list[str], dict[str, int]] | None:
    """(merges, ids of all tokens) of a `tokenizer.json`; None for another kind than CLIP's. Raises
    `ConfigError` at `where` for a broken file."""
    given = fast.get("model")
    model: dict[str, Any] = given if isinstance(given, dict) else {}
    if (model.get("type"), model.get("end_of_word_suffix")) != ("BPE", "</w>"):
        return None
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
        if (folder / FAST).is_file() and size >= len(ids):
            return library(folder, size, context, "raw", where)
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
