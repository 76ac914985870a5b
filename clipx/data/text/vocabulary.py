"""Reads, checks and trains vocabularies, and builds encoders with the package `tokenizers`.

A file that does not fit the config raises `ConfigError`, a damaged file `DataError`.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

from clipx.config import reading, secrets
from clipx.errors import ConfigError, DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CLIP_LETTERS = 512  # an id for each of the 256 bytes, and another for each at the end of a word
SENTENCEPIECE_MARKS = {"pad": 0, "unk": 1, "bos": 2, "eos": 3}
MARKS = {"both": SENTENCEPIECE_MARKS, "end": {"unk": 2, "eos": 1}}  # ids by TokenizerConfig.marks
_CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"  # openai/CLIP's split
_LONGEST = 10_000  # characters of a line of a vocabulary
WORDPIECE_MARKS = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}


def _read(path: str, what: str) -> bytes:
    try:
        return reading.read_bytes(secrets.expand(path))
    except (OSError, secrets.MissingVariable) as error:
        found = f"{path!r} ({getattr(error, 'strerror', None) or error})"
        raise ConfigError("config.tokenizer.path", found, f"{what} that can be read") from None


def _check_lengths(lines: Iterable[str]) -> None:
    """Raises `ValueError` for a line that is longer than a part of a word is."""
    for number, line in enumerate(lines, 1):
        if len(line) > _LONGEST:
            raise ValueError(f"line {number} has {len(line):,} characters, at most {_LONGEST:,}")


def read_merges(path: str, vocab_size: int, marks: int) -> str:
    """The merges, one per line, of a vocabulary with `vocab_size` ids, of which `marks` are marks.

    The file is like OpenAI's bpe_simple_vocab_16e6.txt.gz: a header line, then at least as many
    merges as are used.
    """
    data = _read(path, "a merges file")
    try:
        text = (reading.unpack(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8")
        lines = text.split("\n")
        _check_lengths(lines)
    except ValueError as error:
        raise DataError(f"{path}: not a merges file ({error})") from None
    merges = [line for line in lines[1:] if len(line.split()) == 2]
    least = CLIP_LETTERS + marks
    if not 0 <= vocab_size - least <= len(merges):
        raise ConfigError(
            "config.tokenizer.vocab_size",
            f"{vocab_size}, with {len(merges)} merges in {path}",
            f"{least} to {len(merges) + least}, that is {least} plus the number of merges to use",
            "change vocab_size, or name a file with a version line and then one merge per line",
        )
    return "\n".join(merges[: vocab_size - least])


def read_wordpieces(path: str, vocab_size: int) -> str:
    """The pieces, one per line, of a file like bert-base-uncased's vocab.txt.

    Its marks must have the same ids as those of bert-base-uncased.
    """
    data = _read(path, "BERT's vocab.txt")
    try:
        text = data.decode("utf-8").replace("\r\n", "\n").removesuffix("\n")
        pieces = text.split("\n")
        _check_lengths(pieces)
    except ValueError as error:
        raise DataError(f"{path}: not a vocabulary of word pieces ({error})") from None
    ids = {piece: i for i, piece in enumerate(pieces)}
    if any(ids.get(mark) != i for mark, i in WORDPIECE_MARKS.items()):
        listed = ", ".join(f"{mark} {ids.get(mark, 'missing')}" for mark in WORDPIECE_MARKS)
        raise ConfigError(
            "config.tokenizer.path",
            f"{path}, whose ids of the marks are {listed}",
            "one piece per line, with the ids "
            + ", ".join(f"{mark} {i}" for mark, i in WORDPIECE_MARKS.items()),
            "name a file with these ids, such as bert-base-uncased's vocab.txt",
        )
    _check_size(path, len(pieces), vocab_size, vocab_size)
    return text


def byte_pairs(merges: str) -> Tokenizer:
    """CLIP's byte-pair encoding with these merges, without marks."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    pairs = [(left, right) for left, right in map(str.split, filter(None, merges.split("\n")))]
    # sorting the characters that stand for bytes puts printable bytes first, as in OpenAI's ids
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = alphabet + [c + "</w>" for c in alphabet] + [a + b for a, b in pairs]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    model = models.BPE(vocab=vocab, merges=pairs, end_of_word_suffix="</w>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_CLIP_WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " ")])
    return tokenizer


def word_pieces(pieces: str) -> Tokenizer:
    """BERT's uncased encoding with these pieces, without marks."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    vocab = {piece: i for i, piece in enumerate(pieces.split("\n"))}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()  # lower case, no accents
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _mark_ids(marks: str) -> dict[str, int]:
    """The id of every mark of a SentencePiece model; -1 for a mark that it does not have."""
    return SENTENCEPIECE_MARKS | {"bos": -1} | MARKS[marks]


def read_sentencepiece(path: str, vocab_size: int, most: int, marks: str = "both") -> bytes:
    """A SentencePiece model with at most `most` pieces, and with the ids of `MARKS[marks]`."""
    import sentencepiece

    data = _read(path, "a SentencePiece model")
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=data)
    except RuntimeError:
        raise DataError(f"{path}: not a SentencePiece model") from None
    ids = {mark: getattr(model, f"{mark}_id")() for mark in SENTENCEPIECE_MARKS}
    fitting = [name for name, usual in MARKS.items() if usual.items() <= ids.items()]
    if fitting != [marks]:
        expected = _mark_ids(marks)
        flags = " ".join(f"--{mark}_id={i}" for mark, i in expected.items())
        raise DataError(
            f"{path}: its pad, unk, bos and eos ids are {tuple(ids.values())}, expected "
            f"{tuple(expected.values())}; "
            + (f"set config.tokenizer.marks={fitting[0]}" if fitting else f"train it with {flags}")
        )
    _check_size(path, model.get_piece_size(), vocab_size, most)
    return data


def _check_size(path: str, pieces: int, vocab_size: int, most: int) -> None:
    if pieces > most:
        raise ConfigError(
            "config.tokenizer.vocab_size",
            f"{vocab_size}, with {pieces} pieces in {path}",
            f"at least {pieces + vocab_size - most}",
        )


def train_sentencepiece(
    captions: Iterable[str],
    pieces: int,
    kind: Literal["unigram", "bpe"],
    marks: str = "both",
) -> bytes:
    """A SentencePiece model with at most `pieces` pieces.

    Training takes seconds for 30,000 captions and is deterministic.

    Raises:
        DataError: there is no text in the captions.
        ConfigError: the captions have more distinct characters than `pieces`.
    """
    import sentencepiece

    mark_ids: dict[str, Any] = {f"{mark}_id": i for mark, i in _mark_ids(marks).items()}
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(text for text in captions if text),
            model_writer=model,
            model_type=kind,
            vocab_size=pieces,
            hard_vocab_limit=False,  # few captions may give fewer pieces
            normalization_rule_name="nmt_nfkc_cf",  # folds case
            max_sentence_length=1 << 16,
            num_threads=1,  # with more threads the result depends on their timing
            minloglevel=2,
            **mark_ids,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2].strip()
        if "ocabulary size" not in reason:
            raise DataError(
                "no vocabulary can be trained on the captions: "
                f"{reason or 'there is no text in them'}"
            ) from None
        raise ConfigError(
            "config.tokenizer.vocab_size",
            f"{pieces} pieces",
            "more pieces than the captions have distinct characters",
            f"set a larger vocab_size ({reason})",
        ) from None
    return model.getvalue()
