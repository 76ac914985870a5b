"""Tokenizers as files that transformers' `AutoTokenizer` reads; open_clip reads them through it."""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from clipx.errors import ConfigError, NotExpressible
from clipx.interop.model import Words

if TYPE_CHECKING:
    import tokenizers

CLIPX = "clipx_tokenizer.json"  # the complete clipx tokenizer; only clipx reads it
SETTINGS, PIECES, SIGLIP = "tokenizer_config.json", "spiece.model", "SiglipTokenizer"
# SHA-256 of OpenAI's 48,894 merges, one per line
OPENAI_MERGES = "f61f2adf497e6f5357c347aeb4646fabe82f341e946de5bdec5d2858e41bef4a"
_MARKS = {  # start, end, padding and unknown token
    "clip_bpe": ("<|startoftext|>", "<|endoftext|>", "<|endoftext|>", "<|endoftext|>"),
    "sentencepiece": ("<s>", "</s>", "<pad>", "<unk>"),
    "wordpiece": ("[CLS]", "[SEP]", "[PAD]", "[UNK]"),
}
_END_MARKS = (None, "</s>", "</s>", "<unk>")  # for texts without a start mark
_PUNCTUATION = r"[,.'!?\"()*#:;~]"  # deleted by CLIP-Lite
_ASCII_PUNCTUATION = r"[!-/:-@\[-`{-~]"  # deleted by SigLIP


def cleaning(rule: str, lower: bool) -> list[Any]:
    """Normalizers that apply a rule of clipx/data/text/cleaning.py. Three of its operations have no
    normalizer and are left out: fixing encodings, decoding HTML entities, and the cut after 30
    words."""
    from tokenizers import Regex, normalizers

    collapse = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    case = [normalizers.Lowercase()] * lower
    if rule == "clip_lite":
        return [
            normalizers.Lowercase(),
            normalizers.Replace(Regex(_PUNCTUATION), ""),
            normalizers.Replace(Regex("[-/]"), " "),
            normalizers.Replace("<person>", "person"),
            *collapse,
            normalizers.NFKD(),
            normalizers.StripAccents(),
        ]
    if rule == "siglip":
        return [
            normalizers.Lowercase(),
            normalizers.Replace(Regex(_ASCII_PUNCTUATION), ""),
            *collapse,
        ]
    if rule == "canonical":
        return [normalizers.Replace("_", " "), *cleaning("siglip", lower)]
    if rule == "lower":
        return cleaning("clip", lower=True)
    if rule in ("raw", "strip"):
        return [normalizers.Strip()] * (rule == "strip")
    first = {
        "clip": [normalizers.NFC()],
        "ascii": [normalizers.Replace(Regex(r"[^\x00-\x7F]"), "")],
        "none": [],
    }[rule]
    return [*first, *collapse, *case]


def unpacked(saved: Mapping[str, Any]) -> str:
    """The text that a clipx tokenizer saved: its merges or word pieces."""
    return zlib.decompress(base64.b64decode(saved["payload"])).decode("utf-8")


def is_openai(saved: Mapping[str, Any]) -> bool:
    """Whether a saved CLIP tokenizer has OpenAI's merges. Without a payload it does."""
    if not saved["payload"]:
        return True
    return hashlib.sha256(unpacked(saved).encode()).hexdigest() == OPENAI_MERGES


def clip_files(merges: str, vocabulary: dict[str, int], context: int) -> dict[str, str]:
    """Files for `CLIPTokenizer`, by name: the vocabulary, with both marks appended, the merges and
    the settings."""
    start, end, *_ = _MARKS["clip_bpe"]
    vocabulary = vocabulary | {start: len(vocabulary), end: len(vocabulary) + 1}
    settings = _settings(_MARKS["clip_bpe"], "CLIPTokenizer", context, mask=True)
    return {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "#version: 0.2\n" + merges + "\n",
        SETTINGS: _dump(settings),
    }


def siglip_files(model: bytes, context: int) -> dict[str, str | bytes]:
    """Files for `SiglipTokenizer`, by name: a SentencePiece model whose end mark also pads, and the
    settings."""
    settings = _settings(_END_MARKS, SIGLIP, context, mask=False) | {"do_lower_case": True}
    return {PIECES: model, SETTINGS: _dump(settings)}


def check_siglip(settings: Mapping[str, Any], where: str, context: int) -> None:
    """Raises `ConfigError` at `where` for settings with which a `SiglipTokenizer` gives other ids
    than Google's. context: tokens of the text tower."""
    wanted = {"do_lower_case": True, "sp_model_kwargs": {}}
    wanted |= {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    for name, value in wanted.items():
        setting = settings.get(name)
        setting = setting.get("content", setting) if isinstance(setting, Mapping) else setting
        if setting not in (None, value):
            raise ConfigError(
                f"{where}: {SETTINGS}: {name}", repr(setting), f"{value!r}, as Google's SigLIP has"
            )
    length = settings.get("model_max_length")
    if isinstance(length, int) and length < context:
        raise ConfigError(
            f"{where}: {SETTINGS}: model_max_length",
            f"{length}, with a text tower of {context} tokens, which reads padding",
            f"{context}",
        )


def files(
    core: tokenizers.Tokenizer, words: Words, rule: str, *, attention_mask: bool = True
) -> dict[str, str]:
    """`tokenizer.json` and its settings, from a `core` that encodes one text without marks.

    words: the ids of the exported model. rule: the caption cleaning rule of training.
    attention_mask: whether the tokenizer also returns an attention mask; SigLIP's does not.

    Raises `NotExpressible` for a mark whose id in `core` differs from the model's.
    """
    from tokenizers import AddedToken, normalizers, processors

    marks = _MARKS[words.kind] if words.sot_id is not None else _END_MARKS
    start, end, pad, _ = marks
    ids = {end: words.eot_id} if start is None else {start: words.sot_id, end: words.eot_id}
    if words.kind != "clip_bpe":  # CLIP pads with its end mark
        ids[pad] = words.pad_id
    core.add_special_tokens([AddedToken(m, special=True, normalized=False) for m in ids])
    wrong = [m for m, i in ids.items() if core.token_to_id(m) != i]
    if wrong:
        raise NotExpressible(
            f"{wrong[0]} has id {core.token_to_id(wrong[0])} in the tokenizer, but id "
            f"{ids[wrong[0]]} in the model"
        )
    existing = [core.normalizer] if core.normalizer is not None else []
    core.normalizer = normalizers.Sequence([*cleaning(rule, words.kind == "clip_bpe"), *existing])
    first = "" if start is None else f"{start} "
    core.post_processor = processors.TemplateProcessing(
        single=f"{first}$A {end}",
        pair=f"{first}$A $B {end}",
        special_tokens=[(mark, ids[mark]) for mark in (start, end) if mark],
    )
    settings = _settings(marks, "PreTrainedTokenizerFast", words.context, attention_mask)
    return {"tokenizer.json": core.to_str(), SETTINGS: _dump(settings)}


def own_files(core: tokenizers.Tokenizer, words: Words, rule: str) -> dict[str, str]:
    """`tokenizer.json` and its settings, from a tokenizer that is a `tokenizer.json` already.

    words, rule: as for `files`. `core` puts the marks around a text itself.
    """
    from tokenizers import normalizers, processors

    if words.eot_id == words.pad_id:  # CLIPA's, which have padding in place of the end mark
        ids = [i for i in (words.sot_id, words.pad_id) if i is not None]
        named = [(str(core.id_to_token(i)), i) for i in ids]
        template = " ".join([*(name for name, _ in named[:-1]), "$A", named[-1][0]])
        core.post_processor = processors.TemplateProcessing(single=template, special_tokens=named)
    if added := cleaning(rule, lower=False):
        existing = [core.normalizer] if core.normalizer is not None else []
        core.normalizer = normalizers.Sequence([*added, *existing])
    ids = (words.sot_id, words.eot_id, words.pad_id)
    marks = [None if i is None else core.id_to_token(i) for i in ids]
    settings = _settings([*marks, None], "PreTrainedTokenizerFast", words.context, True)
    return {"tokenizer.json": core.to_str(), SETTINGS: _dump(settings)}


def fixed_length(files: Mapping[str, str | bytes], words: Words) -> dict[str, str | bytes]:
    """The `tokenizer.json` of `files`, which itself pads and cuts texts to the model's length."""
    from tokenizers import Tokenizer

    core = Tokenizer.from_str(str(files["tokenizer.json"]))
    core.enable_truncation(words.context)
    pad = core.id_to_token(words.pad_id)
    core.enable_padding(length=words.context, pad_id=words.pad_id, pad_token=str(pad))
    return {"tokenizer.json": core.to_str()}


def _settings(marks: Sequence[str | None], cls: str, context: int, mask: bool) -> dict[str, Any]:
    start, end, pad, unknown = marks
    return {
        "tokenizer_class": cls,
        "model_max_length": context,
        **({} if start is None else {"bos_token": start}),
        "eos_token": end,
        "pad_token": pad,
        **({} if unknown is None else {"unk_token": unknown}),
        "padding_side": "right",
        "truncation_side": "right",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"] if mask else ["input_ids"],
    }


def _dump(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def sentencepiece(model: bytes) -> tokenizers.Tokenizer:
    """A tokenizer that encodes as a SentencePiece model, unigram or BPE, does; without marks."""
    import sentencepiece as library
    import tokenizers
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

    proto = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    proto.ParseFromString(model)
    processor = library.SentencePieceProcessor(model_proto=model)
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    unknown = processor.unk_id()
    if proto.trainer_spec.model_type == 1:  # unigram
        core = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=unknown, byte_fallback=False))
    else:
        ids = {piece: i for i, (piece, _) in enumerate(pieces)}
        core = tokenizers.Tokenizer(
            models.BPE(ids, _merges(pieces), unk_token=pieces[unknown][0], fuse_unk=True)
        )
    charsmap = proto.normalizer_spec.precompiled_charsmap
    core.normalizer = normalizers.Sequence(
        [
            *([normalizers.Precompiled(charsmap)] if charsmap else []),
            normalizers.Replace(Regex(" {2,}"), " "),
            normalizers.Strip(),
        ]
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    core.decoder = decoders.Metaspace(prepend_scheme="always")
    return core


def _merges(pieces: list[tuple[str, float]]) -> list[tuple[str, str]]:
    """The merges of a SentencePiece BPE model. The model lists none: SentencePiece joins two
    neighbours if their union is a piece, the best score first."""
    known = {piece: score for piece, score in pieces}
    order = {piece: i for i, (piece, _) in enumerate(pieces)}
    merges = [
        (-score, order[piece[:i]], order[piece[i:]], piece[:i], piece[i:])
        for piece, score in pieces
        for i in range(1, len(piece))
        if piece[:i] in known and piece[i:] in known
    ]
    return [(left, right) for *_, left, right in sorted(merges)]
