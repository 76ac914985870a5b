"""`TokenizerConfig`: selects a tokenizer, and tells the ids that a model is built from without
opening a vocabulary."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal

from clipx.config.ranges import Count, CountOrZero, Range, Tokens
from clipx.data.text import vocabulary
from clipx.errors import ConfigError
from clipx.ops import tokenizer_json

# default sizes: those of OpenAI's vocabulary with its two marks and of bert-base-uncased; models of
# SentencePiece have no usual size
_VOCAB = {"clip_bpe": 49_408, "sentencepiece": 49_408, "wordpiece": 30_522}
OWN_MASK = ("wordpiece", "huggingface")  # kinds that never add an id for the mask


@dataclasses.dataclass(frozen=True)
class MarkIds:
    """The ids of the marks of a `tokenizer.json`. None: it has no such mark."""

    pad: CountOrZero
    end: CountOrZero
    start: CountOrZero | None = None
    unknown: CountOrZero | None = None
    mask: CountOrZero | None = None


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Selects a tokenizer, and tells what is known about it without opening a file."""

    # sentencepiece without a path is trained on the captions of the run
    name: Literal["clip_bpe", "sentencepiece", "wordpiece", "huggingface"]
    # rows of the embedding table; None: the usual size, which the constructor fills in
    vocab_size: Annotated[int, Range(5, 10_000_000)] | None = None
    context: Tokens = 77  # ids per text, marks included
    # a merges file (.txt, .txt.gz), a SentencePiece model, a vocab.txt, or (huggingface) a
    # tokenizer.json or the folder of one; '': see `build`
    path: str = ""
    model: Literal["unigram", "bpe"] = "unigram"  # kind of a SentencePiece model to train
    sample: Count = 200_000  # maximal number of captions to train a SentencePiece model on
    # add an id for masked words; word pieces always have one, and huggingface has its file's
    mask: bool = False
    # see cleaning.py; huggingface gives its library's ids with "raw" or "strip"
    cleaning: Literal[
        "clip", "ascii", "clip_lite", "siglip", "canonical", "lower", "none", "strip", "raw"
    ] = "clip"
    # end: no start mark, padded with the end mark (SigLIP); start: padding in place of the end mark
    # (huggingface alone; CLIPA)
    marks: Literal["both", "end", "start"] = "both"
    ids: MarkIds | None = None  # huggingface alone: the marks of its file

    def __post_init__(self) -> None:
        if isinstance(self.ids, Mapping):  # from a tokenizer that was saved
            object.__setattr__(self, "ids", MarkIds(**self.ids))
        self._check_huggingface()
        bpe = self.name == "clip_bpe"
        if self.vocab_size is None:
            object.__setattr__(self, "vocab_size", _VOCAB[self.name] + (bpe and self.mask))
        least = max(vocabulary.WORDPIECE_MARKS.values()) + 1
        if self.name == "wordpiece" and self.size < least:
            raise ConfigError("config.tokenizer.vocab_size", str(self.size), f"at least {least}")
        if self.marks == "end" and self.name != "sentencepiece":
            raise ConfigError(
                "config.tokenizer.marks",
                f"'end', with {self.name}",
                "'both', as only sentencepiece supports 'end'",
                "set config.tokenizer.marks=both",
            )
        if self.marks == "start" and self.name != "huggingface":
            raise ConfigError(
                "config.tokenizer.marks",
                f"'start', with {self.name}",
                "'both', 'end' with sentencepiece; only huggingface supports 'start'",
                "set config.tokenizer.marks=both",
            )
        bundled = _VOCAB["clip_bpe"] + self.mask
        if bpe and not self.path and self.vocab_size != bundled:
            raise ConfigError(
                "config.tokenizer.vocab_size",
                str(self.vocab_size),
                f"{bundled}, the size of OpenAI's vocabulary{' and the mask' * self.mask}",
                "leave it out, or name a merges file in config.tokenizer.path",
            )
        if self.name == "wordpiece" and not self.path:
            raise ConfigError(
                "config.tokenizer.path",
                "nothing",
                "the path of a vocabulary of word pieces",
                "name a vocab.txt, such as bert-base-uncased's",
            )

    def _check_huggingface(self) -> None:
        if self.name != "huggingface":
            if self.ids is not None:
                fix = "remove config.tokenizer.ids"
                found = f"{self.ids}, with {self.name}"
                raise ConfigError("config.tokenizer.ids", found, "None: the kind tells them", fix)
            return
        if not self.path:
            expected = "a tokenizer.json, or a folder with one"
            raise ConfigError("config.tokenizer.path", "nothing", expected)
        if self.ids is None or self.vocab_size is None:
            key = "vocab_size" if self.ids is not None else "ids"
            content = tokenizer_json.read(self.path)
            known = tokenizer_json.ids(content, self.path)
            size = tokenizer_json.size(content, self.path)
            flags = [f"--config.tokenizer.ids.{k}={v}" for k, v in known.items() if v is not None]
            flags = [f"--config.tokenizer.vocab_size={size}", *flags]
            raise ConfigError(
                f"config.tokenizer.{key}",
                "nothing",
                "what a model is built from, as no run opens the file for it",
                f"leave the section to config.text.init_from, or set {' '.join(flags)}",
            )
        if self.mask and self.ids.mask is None:
            found = f"true, and {self.path} has no mask"
            raise ConfigError("config.tokenizer.mask", found, "a tokenizer that has a mask")

    @property
    def size(self) -> int:
        """`vocab_size`, which is never None after construction."""
        assert self.vocab_size is not None
        return self.vocab_size

    @property
    def pad_id(self) -> int:
        """The padding id; with `marks` "end" also that of the end mark.

        A text ends at its first `eot_id`, not at its first padding: in CLIP's vocabulary '!' has
        the padding id too.
        """
        if self.ids is not None:
            return self.ids.pad
        return self.eot_id if self.marks == "end" else 0

    @property
    def sot_id(self) -> int | None:
        """The id of the start mark; None if texts have none."""
        if self.ids is not None:
            return self.ids.start
        if self.marks == "end":
            return None
        return {"clip_bpe": self.size - 2, "sentencepiece": 2, "wordpiece": 101}[self.name]

    @property
    def eot_id(self) -> int:
        """The id of the end mark."""
        if self.ids is not None:
            return self.ids.pad if self.marks == "start" else self.ids.end
        if self.marks == "end":
            return 1
        return {"clip_bpe": self.size - 1, "sentencepiece": 3, "wordpiece": 102}[self.name]

    @property
    def unk_id(self) -> int | None:
        """The id of unknown pieces; None if the vocabulary covers every text."""
        if self.ids is not None:
            return self.ids.unknown
        if self.marks == "end":
            return 2
        return {"clip_bpe": None, "sentencepiece": 1, "wordpiece": 100}[self.name]

    @property
    def mask_id(self) -> int | None:
        """The id that hides a word and that no text contains; None without one.

        In CLIP's vocabulary it is before the two marks, whose ids are one higher then, as in
        DeCLIP.
        """
        if self.ids is not None:
            return self.ids.mask
        if self.name == "wordpiece":
            return 103
        last = self.size - (3 if self.name == "clip_bpe" else 1)
        return last if self.mask else None

    @property
    def special_ids(self) -> tuple[int, ...]:
        """The ids that are not part of a text, which masked language modelling must not mask.

        0 is among them: it pads, or with `marks` "end" it is unused. huggingface pads with an id
        of its file.
        """
        padding = 0 if self.ids is None else self.ids.pad
        ids = (padding, self.unk_id, self.sot_id, self.eot_id, self.mask_id)
        return tuple(i for i in ids if i is not None)
