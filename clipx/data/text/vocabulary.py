"""Vocabularies: read from files and checked, or trained on captions, and what cuts text by them.

Errors about a config value name `config.tokenizer`; what is wrong inside a file is a `DataError`.
"""

from __future__ import annotations

import gzip
import io
import pathlib
import zlib
from collections.abc import Iterable
from typing import Literal

from clipx.errors import ConfigError, DataError

CLIP_LETTERS = 512  # the 256 bytes, and the same at a word's end
SENTENCEPIECE_MARKS = {"pad": 0, "unk": 1, "bos": 2, "eos": 3}
MARKS = {"both": SENTENCEPIECE_MARKS, "end": {"unk": 2, "eos": 1}}  # by TokenizerConfig.marks
_CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"  # openai/CLIP's split
WORDPIECE_MARKS = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}


def _read(path: str, what: str) -> bytes:
    file = pathlib.Path(path).expanduser()
    try:
        return file.read_bytes()
    except OSError as error:
        found = f"{str(file)!r} ({error.strerror})"
        raise ConfigError("config.tokenizer.path", found, f"{what} that can be read") from None


def read_merges(path: str, vocab_size: int, marks: int) -> str:
    """The merges, one a line, of a vocabulary of `vocab_size` ids, `marks` of them marks, from a
    file like OpenAI's bpe_simple_vocab_16e6.txt.gz: a header, then more lines than are used."""
    data = _read(path, "a merges file")
    try:
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a merges file ({error})") from None
    merges = [line for line in text.split("\n")[1:] if len(line.split()) == 2]
    least = CLIP_LETTERS + marks
    if not 0 <= vocab_size - least <= len(merges):
        raise ConfigError(
            "config.tokenizer.vocab_size",
            f"{vocab_size}, with {len(merges)} merges in {path}",
            f"{least} more than the merges to use: {least} to {len(merges) + least}",
            "a file of a version line and then one merge a line, or another vocab_size",
        )
    return "\n".join(merges[: vocab_size - least])


def read_wordpieces(path: str, vocab_size: int) -> str:
    """The pieces, one a line, of a file like bert-base-uncased's vocab.txt, which must number its
    marks in the same way."""
    data = _read(path, "BERT's vocab.txt")
    try:
        text = data.decode("utf-8").replace("\r\n", "\n").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a vocabulary of word pieces ({error})") from None
    pieces = text.split("\n")
    ids = {piece: i for i, piece in enumerate(pieces)}
    if any(ids.get(mark) != i for mark, i in WORDPIECE_MARKS.items()):
        found = ", ".join(f"{mark} {ids.get(mark, 'nowhere')}" for mark in WORDPIECE_MARKS)
        raise ConfigError(
            "config.tokenizer.path",
            f"{path}, with {found}",
            "one piece a line, with "
            + ", ".join(f"{mark} {i}" for mark, i in WORDPIECE_MARKS.items()),
            "bert-base-uncased's vocab.txt",
        )
    _check_size(path, len(pieces), vocab_size, vocab_size)
    return text


def byte_pairs(merges: str):
    """CLIP's byte-pair encoding by these merges, as a `tokenizers.Tokenizer` without marks."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    pairs = [tuple(line.split()) for line in merges.splitlines()]
    # the printable bytes first, then the rest: the order of their stand-in characters
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


def word_pieces(pieces: str):
    """BERT's uncased encoding by these pieces, as a `tokenizers.Tokenizer` without marks."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    vocab = {piece: i for i, piece in enumerate(pieces.split("\n"))}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()  # lower case, no accents
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _numbered(marks: str) -> dict[str, int]:
    """The ids of all marks of a SentencePiece model; -1 is none."""
    return SENTENCEPIECE_MARKS | {"bos": -1} | MARKS[marks]


def read_sentencepiece(path: str, vocab_size: int, most: int, marks: str = "both") -> bytes:
    """A SentencePiece model of at most `most` pieces whose marks are numbered as `MARKS` says."""
    import sentencepiece

    data = _read(path, "a SentencePiece model")
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=data)
    except RuntimeError:
        raise DataError(f"{path}: not a SentencePiece model") from None
    found = {mark: getattr(model, f"{mark}_id")() for mark in SENTENCEPIECE_MARKS}
    fit = [name for name, ids in MARKS.items() if ids.items() <= found.items()]
    if fit != [marks]:
        wanted = _numbered(marks)
        flags = " ".join(f"--{mark}_id={i}" for mark, i in wanted.items())
        raise DataError(
            f"{path}: its pad, unk, bos and eos ids are {tuple(found.values())}, expected "
            f"{tuple(wanted.values())}; "
            + (f"set config.tokenizer.marks={fit[0]}" if fit else f"train it with {flags}")
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
    """A SentencePiece model of at most `pieces`: seconds for 30,000 captions, the same each time.

    Raises:
        DataError: there is no text in the captions.
        ConfigError: they have more different characters than there may be pieces.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(text for text in captions if text),
            model_writer=model,
            model_type=kind,
            vocab_size=pieces,
            hard_vocab_limit=False,  # few captions give fewer pieces, and that is fine
            normalization_rule_name="nmt_nfkc_cf",  # folds case
            max_sentence_length=1 << 16,
            num_threads=1,  # more would make the result depend on their timing
            minloglevel=2,
            **{f"{mark}_id": i for mark, i in _numbered(marks).items()},
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2].strip()
        if "ocabulary size" not in reason:
            raise DataError(
                f"the captions give no vocabulary: {reason or 'there is no text in them'}"
            ) from None
        raise ConfigError(
            "config.tokenizer.vocab_size",
            f"room for {pieces} pieces",
            "more than the different characters of the captions",
            reason,
        ) from None
    return model.getvalue()
