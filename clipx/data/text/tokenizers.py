"""Tokenizers with one interface: CLIP's byte pairs, SentencePiece, BERT's word pieces, and those of
transformers that come as one file.

A text becomes `[sot] + text + [eot]`, or `text + [eot]` for SigLIP. It is truncated before the end
mark and padded to the context length. The ids that a model is built from (`vocab_size`, `pad_id`,
`sot_id`, `eot_id`, `mask_id`) follow from the config alone, so a model can be built without opening
a vocabulary.
"""

from __future__ import annotations

import abc
import base64
import dataclasses
import itertools
import re
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from clipx.config import reading
from clipx.data.text import cleaning, vocabulary
from clipx.data.text.tokenizer_config import TokenizerConfig
from clipx.errors import ConfigError, DataError
from clipx.ops import tokenizer_json


class Tokenizer(abc.ABC):
    """Converts texts to ids and back. It can be pickled and called from many threads.

    Attributes:
        pieces: entries of the vocabulary that have a text; None if that is all of `vocab_size`.
    """

    pieces: int | None = None

    def __init__(self, config: TokenizerConfig):
        self.config = config
        self.vocab_size, self.context = config.size, config.context
        self.pad_id, self.sot_id, self.eot_id = config.pad_id, config.sot_id, config.eot_id
        self._clean = cleaning.RULES[config.cleaning]

    @abc.abstractmethod
    def body(self, text: str) -> list[int]:
        """The ids of one text without marks, not truncated."""

    @abc.abstractmethod
    def _text(self, ids: list[int]) -> str: ...

    @abc.abstractmethod
    def _payload(self) -> bytes: ...

    def __call__(self, texts: Sequence[str]) -> Int32[np.ndarray, "t n"]:
        """Ids [t, context] of each text with its marks, truncated or padded."""
        ids = np.full((len(texts), self.context), self.pad_id, np.int32)
        start = [] if self.sot_id is None else [self.sot_id]
        for row, text in zip(ids, texts, strict=True):
            marked = [*start, *self.body(text)][: self.context - 1] + [self.eot_id]
            row[: len(marked)] = marked
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of one row of ids up to its end mark: cleaned and in lower case."""
        body = itertools.takewhile(lambda i: i != self.eot_id, map(int, ids))
        return self._text([i for i in body if i not in (self.sot_id, self.config.mask_id)])

    def save(self) -> dict[str, Any]:
        """A dict for `load` that can be stored as JSON: the config, and the vocabulary unless an
        installed package has it."""
        payload = base64.b64encode(self._payload()).decode("ascii")
        return {"config": dataclasses.asdict(self.config), "payload": payload}

    def __reduce__(self):
        return load, (self.save(),)


class _ClipBPE(Tokenizer):
    """CLIP's byte-pair encoding. A mark in a text, such as `<|endoftext|>`, becomes the id of the
    mark, as in openai/CLIP's tokenizer."""

    # a mark counts only where a token can start: after white space, a letter or a digit
    _MARKS = re.compile(r"(?<![^\s\w]|_)((?:<\|startoftext\|>|<\|endoftext\|>)+)")

    @abc.abstractmethod
    def _plain(self, text: str) -> list[int]: ...

    def body(self, text: str) -> list[int]:
        text = self._clean(text).lower()
        if "<|" not in text:
            return self._plain(text)
        sot, eot = self.sot_id, self.eot_id
        assert sot is not None  # of CLIP's encodings
        ids: list[int] = []
        for i, part in enumerate(self._MARKS.split(text)):
            if i % 2:
                ids += [sot if mark == "start" else eot for mark in re.findall("start|end", part)]
            else:
                ids += self._plain(part)
        return ids


class _BundledBPE(_ClipBPE):
    """CLIP's encoding with the vocabulary that is part of the package `instant_clip_tokenizer`."""

    # open_clip's marks, which that package takes for marks and OpenAI's tokenizer does not
    _FOREIGN = re.compile(r"(?<=<start)(?=_of_text>)|(?<=<end)(?=_of_text>)")

    def __init__(self, config: TokenizerConfig):
        super().__init__(config)
        try:
            import instant_clip_tokenizer
        except ImportError:
            raise ConfigError(
                "config.tokenizer.name",
                "'clip_bpe', but instant_clip_tokenizer is not installed",
                "a package or a file with CLIP's vocabulary",
                "pip install instant-clip-tokenizer, or set config.tokenizer.path to "
                "bpe_simple_vocab_16e6.txt.gz",
            ) from None
        package: Any = instant_clip_tokenizer  # has no types
        self._tokenizer = package.Tokenizer()

    def _plain(self, text: str) -> list[int]:
        if "_of_text>" not in text:
            return self._tokenizer.encode(text)
        return [i for part in self._FOREIGN.split(text) for i in self._tokenizer.encode(part)]

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids).strip()

    def _payload(self) -> bytes:
        return b""


class _MergesBPE(_ClipBPE):
    """CLIP's encoding with the vocabulary of a merges file (a header line, then one merge per
    line)."""

    def __init__(self, config: TokenizerConfig, merges: str):
        super().__init__(config)
        self._merges = merges
        self._tokenizer = vocabulary.byte_pairs(merges)

    def _plain(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids).strip()

    def _payload(self) -> bytes:
        return zlib.compress(self._merges.encode("utf-8"))


class _SentencePiece(Tokenizer):
    """A SentencePiece model whose marks have the ids of vocabulary.py. A mark in a text, such as
    `</s>`, is ordinary text."""

    def __init__(self, config: TokenizerConfig, model: bytes):
        super().__init__(config)
        import sentencepiece

        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.pieces = self._processor.get_piece_size()

    def body(self, text: str) -> list[int]:
        return self._processor.encode(self._clean(text))

    def _text(self, ids: list[int]) -> str:
        pieces = self._processor.get_piece_size()
        return self._processor.decode([i for i in ids if self.pad_id < i < pieces])

    def _payload(self) -> bytes:
        return self._model


class _WordPiece(Tokenizer):
    """BERT's uncased word pieces. A mark in a text, such as `[MASK]`, is ordinary text."""

    def __init__(self, config: TokenizerConfig, pieces: str):
        super().__init__(config)
        self._pieces = pieces
        self._tokenizer = vocabulary.word_pieces(pieces)

    def body(self, text: str) -> list[int]:
        return self._tokenizer.encode(self._clean(text), add_special_tokens=False).ids

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode([i for i in ids if i != self.pad_id])

    def _payload(self) -> bytes:
        return zlib.compress(self._pieces.encode("utf-8"))


class _HuggingFace(Tokenizer):
    """The tokenizer of a `tokenizer.json`. It gives transformers' ids: a mark in a text, such as
    `</s>`, is that mark where the file says so."""

    def __init__(self, config: TokenizerConfig, content: str):
        super().__init__(config)
        self._content = content
        self._tokenizer = tokenizer_json.build(content, config.path)

    def body(self, text: str) -> list[int]:
        ids = tokenizer_json.encode(self._tokenizer, self._clean(text))
        marks = self.config.ids
        if self.config.marks != "start" or marks is None:
            return ids
        return [self.pad_id if i == marks.end else i for i in ids]

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode([i for i in ids if i != self.pad_id]).strip()

    def _payload(self) -> bytes:
        return zlib.compress(self._content.encode("utf-8"), 9)


def build(config: TokenizerConfig, captions: Iterable[str] | None = None) -> Tokenizer:
    """The tokenizer of `config`.

    Without `config.path`, `clip_bpe` uses the vocabulary of the package instant_clip_tokenizer, and
    `sentencepiece` is trained on `captions`. Training takes seconds for 30,000 captions and is
    deterministic.

    Raises:
        ConfigError: the file cannot be read, or its vocabulary does not fit `vocab_size`.
        DataError: the file is not a vocabulary, or the captions have no text to train on.
    """
    path, size = config.path, config.size
    if config.name == "clip_bpe":
        if not path:
            return _BundledBPE(config)
        merges = vocabulary.read_merges(path, size, 2 + config.mask)
        try:
            return _MergesBPE(config, merges)
        except Exception as error:  # the package raises no other kind
            raise DataError(f"{path}: not a merges file ({error})") from None
    if config.name == "wordpiece":
        return _WordPiece(config, vocabulary.read_wordpieces(path, size))
    if config.ids is not None:
        content = tokenizer_json.read(path)
        tokenizer_json.check(content, path, size, dataclasses.asdict(config.ids))
        return _HuggingFace(config, content)
    if path:
        model = vocabulary.read_sentencepiece(path, size, size - config.mask, config.marks)
        return _SentencePiece(config, model)
    if captions is None:
        raise ConfigError(
            "config.tokenizer.path",
            "nothing, and no captions to train on",
            "a SentencePiece model",
            "name a .model file, or train one on the captions of a run",
        )
    rule = cleaning.RULES[config.cleaning]
    texts = (rule(text) for text in itertools.islice(captions, config.sample))
    model = vocabulary.train_sentencepiece(texts, size - config.mask, config.model, config.marks)
    return _SentencePiece(config, model)


def load(saved: dict[str, Any]) -> Tokenizer:
    """The tokenizer from `Tokenizer.save`, without reading a file. Raises `DataError` for anything
    else."""
    try:
        config = TokenizerConfig(**saved["config"])
        payload = base64.b64decode(saved["payload"])
        if config.name == "sentencepiece":
            return _SentencePiece(config, payload)
        if not payload:
            return _BundledBPE(config)
        kinds = {"wordpiece": _WordPiece, "huggingface": _HuggingFace, "clip_bpe": _MergesBPE}
        return kinds[config.name](config, reading.unpack(payload).decode("utf-8"))
    except ConfigError:
        raise
    except Exception as error:  # of packages, which raise many kinds
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"a saved tokenizer cannot be read ({reason})") from None
