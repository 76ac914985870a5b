"""The tokenizer of a text encoder's folder, as a section of `config.tokenizer`."""

from __future__ import annotations

import pathlib
from typing import Any, NamedTuple

from clipx.config import reading
from clipx.errors import ConfigError, DataError
from clipx.interop import weights
from clipx.interop.base import read_json
from clipx.interop.settings import Section, keys
from clipx.interop.tokenizer import SETTINGS
from clipx.ops import tokenizer_json

SPECIAL, ADDED, PIECES = "special_tokens_map.json", "added_tokens.json", "vocab.txt"
FILES = (tokenizer_json.FILE, PIECES, "vocab.json", "sentencepiece.bpe.model")
# keys of tokenizer_config.json that change no id of a text
_HARMLESS = keys(
    "tokenizer_class name_or_path special_tokens_map_file tokenizer_file full_tokenizer_file "
    "use_fast legacy backend is_local local_files_only processor_class auto_map errors "
    "clean_up_tokenization_spaces do_basic_tokenize never_split wordpieces_prefix trim_offsets "
    "model_input_names bos_token eos_token cls_token sep_token mask_token pad_token unk_token "
    "pad_token_type_id pad_to_multiple_of padding max_length stride truncation "
    "truncation_strategy max_len added_tokens_decoder additional_special_tokens "
    "extra_special_tokens model_specific_special_tokens sp_model_kwargs vocab_file merges_file "
    "tokenizer_type transformers_version init_inputs from_slow extra_ids"
)
_TOKENS = {"pad": "pad_token", "unknown": "unk_token", "mask": "mask_token"}
_SHORTEST, _LONGEST = 3, 2**16  # tokens of a text
# which `TokenizerConfig` has for wordpiece
_WORDPIECE_MARKS = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}


class Found(NamedTuple):
    section: dict[str, Any]  # of config.tokenizer, without its `context`
    length: int  # most tokens of a text


def find(
    folder: pathlib.Path,
    kind: str,
    where: str,
    *,
    size: int,
    pad_id: int | None,
    cleaning: str,
    notes: list[str],
) -> tuple[Found, list[str]]:
    """(the tokenizer of a folder, in what transformers' differs from it).

    kind, size, pad_id: the model's `model_type`, vocabulary and padding, None for a model that
    reads padding as any other token. cleaning: of texts before
    they reach the tokenizer. notes: gets a line for each guess.

    Raises `ConfigError` at `where` for a folder without `tokenizer.json`, unless its `vocab.txt` is
    bert-base-uncased's kind of word pieces.
    """
    settings = Section(read_json(folder / SETTINGS, where) or {}, SETTINGS, SETTINGS, _HARMLESS)
    length = settings.get("model_max_length", _LONGEST)
    length = int(length) if isinstance(length, int | float) and length < _LONGEST else _LONGEST
    if length < _SHORTEST:
        found = f"{folder / SETTINGS} with model_max_length {length}"
        raise ConfigError(where, found, f"at least {_SHORTEST} tokens, marks included")
    file = folder / tokenizer_json.FILE
    if not file.is_file() and (folder / PIECES).is_file() and kind in ("bert", "distilbert"):
        section = _word_pieces(folder / PIECES, settings, where, size)
        notes.append(
            f"{folder} has no {file.name}: {PIECES} is read as word pieces, where a mark that a "
            "caption spells, such as [SEP], is ordinary text"
        )
        return Found(section, length), settings.unread("text.settings")
    if file.is_file():
        weights.check_content(file, where)
    content = tokenizer_json.read(str(folder), where)
    try:
        ids = tokenizer_json.ids(content, str(file), _names(folder, settings, where), where)
        rows = tokenizer_json.size(content, str(file))
    except DataError as error:
        raise ConfigError(where, str(error), "a complete file", "download it again") from None
    if rows > size:
        found = f"{file} with {rows} ids, and a model of {size}"
        raise ConfigError(where, found, "the tokenizer that belongs to the model")
    differences = _differences(reading.parse_json(content), settings)
    if missing := _added(folder, content, where):
        differences.append(f"text.tokenizer: {missing!r} of {ADDED} is not in {file.name}")
    if kind not in ("bert", "distilbert") and pad_id not in (None, ids["pad"]):
        # their positions are counted from the model's id of padding
        differences.append(f"text.pad_id: {pad_id} in the model, {ids['pad']} in its tokenizer")
    section = {
        "name": "huggingface",
        "path": str(folder),
        "vocab_size": size,
        "cleaning": cleaning,
        "ids": ids,
    }
    return Found(section, length), differences


def _names(folder: pathlib.Path, settings: Section, where: str) -> dict[str, str]:
    """How the model calls its marks, by the keys of `tokenizer_json.ids`."""
    special = read_json(folder / SPECIAL, where) or {}
    found = {}
    for mark, key in _TOKENS.items():
        name = settings.get(key) or special.get(key)
        name = name.get("content") if isinstance(name, dict) else name
        if isinstance(name, str):
            found[mark] = name
    return found


def _differences(content: dict[str, Any], settings: Section) -> list[str]:
    """The settings that transformers takes from `tokenizer_config.json` and that `tokenizer.json`
    says otherwise, or that no tokenizer of clipx has."""
    inside = {
        key: value
        for part in ("normalizer", "pre_tokenizer")
        for key, value in _leaves(content.get(part))
    }
    there = {"do_lower_case": inside.get("lowercase", "Lowercase" in map(str, inside.values()))}
    for key, name in (
        ("strip_accents", "strip_accents"),
        ("tokenize_chinese_chars", "handle_chinese_chars"),
        ("add_prefix_space", "add_prefix_space"),
    ):
        there[key] = inside.get(name)
    found = []
    for key, value in there.items():
        given = settings.get(key)
        if given is not None and value is not None and given != value:
            found.append(
                f"text.settings.{SETTINGS}.{key}: {given!r} in the model, {value!r} in "
                f"{tokenizer_json.FILE}"
            )
    for key in ("truncation_side", "padding_side"):
        if (side := settings.get(key, "right")) != "right":
            found.append(f"text.settings.{SETTINGS}.{key}: {side!r} in the model, right in clipx")
    if settings.get("split_special_tokens", False):
        found.append(f"text.settings.{SETTINGS}.split_special_tokens: true in the model")
    return found + settings.unread("text.settings")


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    """(key, value) of every entry in nested objects."""
    if isinstance(tree, list):
        return [leaf for x in tree for leaf in _leaves(x)]
    if not isinstance(tree, dict):
        return []
    return [*tree.items(), *(leaf for x in tree.values() for leaf in _leaves(x))]


def _added(folder: pathlib.Path, content: str, where: str) -> str | None:
    """A token of `added_tokens.json` that `tokenizer.json` does not have, or with another id."""
    added: dict[str, int] = read_json(folder / ADDED, where, dict[str, int]) or {}
    source = str(folder / tokenizer_json.FILE)
    ids = {token: tokenizer_json.token_id(content, source, token) for token in added}
    return next((token for token, i in added.items() if ids[token] != i), None)


def _word_pieces(file: pathlib.Path, settings: Section, where: str, size: int) -> dict[str, Any]:
    """The section for a `vocab.txt` whose ids the kind `wordpiece` gives. Raises `ConfigError` for
    one of another kind, which says how to make a `tokenizer.json`."""
    uncased = ("do_lower_case", "strip_accents", "tokenize_chinese_chars")
    wrong = [f"another {key}" for key in uncased if settings.get(key, True) is not True]
    settings.get("split_special_tokens")  # which is how word pieces do it
    weights.check_content(file, where)
    try:
        pieces = reading.read_bytes(file).decode(errors="replace").splitlines()
    except OSError as error:
        raise ConfigError(where, f"{file} ({error.strerror})", "a list of word pieces") from None
    if any(pieces[i : i + 1] != [mark] for mark, i in _WORDPIECE_MARKS.items()):
        wrong.append("other ids of its marks")
    if wrong:
        try:
            tokenizer_json.read(str(file.parent), where)
        except ConfigError as error:
            error.found += f"; and {file.name} has {wrong[0]} than bert-base-uncased's"
            raise
    return {"name": "wordpiece", "path": str(file), "vocab_size": size, "cleaning": "none"}
