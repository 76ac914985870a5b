"""A run's tokenizer as files that open_clip or transformers loads."""

from __future__ import annotations

import base64
import importlib.util
import pathlib
from collections.abc import Mapping
from typing import Any

from clipx.data.text import vocabulary
from clipx.data.text.tokenizers import Tokenizer
from clipx.errors import ConfigError, NotExpressible, install_hint
from clipx.interop import tokenizer
from clipx.interop.base import Format
from clipx.interop.model import Model
from clipx.ops import tokenizer_json


def tokenizer_files(format_: Format, model: Model, own: Tokenizer) -> Mapping[str, str | bytes]:
    """The contents of the files of a run's tokenizer `own`, by file name; {} if the library already
    has this tokenizer."""
    if format_.has_tokenizer(model):
        return {}
    if format_.tokenizer_json:
        files = _files(format_, model, own)
        return {**files, **tokenizer.fixed_length(files, model.words.without_mask())}
    return _files(format_, model, own)


def _files(format_: Format, model: Model, own: Tokenizer) -> Mapping[str, str | bytes]:
    words, config, saved = model.words.without_mask(), own.config, own.save()
    attention_mask = format_.attention_mask(model)
    if not attention_mask and config.marks == "end" and config.cleaning == "siglip":
        return tokenizer.siglip_files(base64.b64decode(saved["payload"]), words.context)
    if words.kind == "clip_bpe":
        merges = _merges(saved)
        core = vocabulary.byte_pairs(merges)
        if config.cleaning == "clip" and not format_.tokenizer_json:
            return tokenizer.clip_files(merges, core.get_vocab(), words.context)
    elif words.kind == "huggingface":
        if format_.collapses_spaces and own.body("a  b") != own.body("a b"):
            raise NotExpressible(
                f"{format_.name} makes one space of several, which the run's tokenizer tells apart "
                "(train with config.tokenizer.cleaning=clip)"
            )
        core = tokenizer_json.build(tokenizer.unpacked(saved), config.path)
        return tokenizer.own_files(core, words, config.cleaning)
    elif words.kind == "wordpiece":
        core = vocabulary.word_pieces(tokenizer.unpacked(saved))
    else:
        core = tokenizer.sentencepiece(base64.b64decode(saved["payload"]))
    return tokenizer.files(core, words, config.cleaning, attention_mask=attention_mask)


def _merges(saved: Mapping[str, Any]) -> str:
    """The merges of a CLIP tokenizer: those saved with it, or OpenAI's from an installed open_clip.
    Raises `ConfigError` without either."""
    if saved["payload"]:
        return tokenizer.unpacked(saved)
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        raise ConfigError(
            "config.tokenizer.path",
            "no path, and instant_clip_tokenizer does not expose its merges",
            "a file of CLIP's merges, to write a tokenizer for transformers",
            f"{install_hint('interop')}, whose open_clip carries it",
        )
    path = pathlib.Path(spec.origin).with_name("bpe_simple_vocab_16e6.txt.gz")
    return vocabulary.read_merges(str(path), 49408, 2)
