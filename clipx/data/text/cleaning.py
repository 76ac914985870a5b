"""Captions as each method cleans them before it cuts them into tokens: plain functions of text."""

from __future__ import annotations

import html
import re
import string
import unicodedata

import ftfy

_CLIP_LITE_DELETES = re.compile(r"[,.'!?\"()*#:;~]")
_CLIP_LITE_WORDS = 30
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SIDES = re.compile("left|right")
_CJK = re.compile("[\u4e00-\u9fa5]")


def clip(text: str) -> str:
    """`text` with its encoding repaired, entities resolved twice and white space collapsed, as
    openai/CLIP's `basic_clean` and `whitespace_clean` do."""
    if not (text.isascii() and text.isprintable() and "&" not in text):  # ftfy leaves these alone
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return collapse(text)


def ascii_only(text: str) -> str:
    """`text` without its characters outside ASCII, then cleaned as CLIP does: "café" is "caf".
    ProtoCLIP's rule (its data.py)."""
    return clip(text.encode("ascii", "ignore").decode("ascii"))


def clip_lite(text: str) -> str:
    """`text` in lower case, without punctuation or accents, cut to 30 words. CLIP-Lite's rule (its
    transforms.py), step by step in its order."""
    text = _CLIP_LITE_DELETES.sub("", _whole(text).lower())
    text = text.replace("-", " ").replace("/", " ").replace("<person>", "person")
    text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    text = " ".join(text.split(" ")[:_CLIP_LITE_WORDS])
    letters = unicodedata.normalize("NFKD", text.lower())
    return "".join(c for c in letters if not unicodedata.combining(c))


def siglip(text: str) -> str:
    """`text` in lower case, without ASCII punctuation, white space collapsed: "It's" is "its".
    SigLIP's rule (big_vision's canonicalize_text, transformers' SiglipTokenizer)."""
    return collapse(text.lower().translate(_PUNCTUATION))


def collapse(text: str) -> str:
    """`text` with every run of white space as one space, and none at its ends."""
    return " ".join(_whole(text).split())


def _whole(text: str) -> str:
    """`text` without halves of surrogate pairs, which JSON can hold and UTF-8 cannot."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


RULES = {
    "clip": clip,
    "ascii": ascii_only,
    "clip_lite": clip_lite,
    "siglip": siglip,
    "none": collapse,
}


def swap_left_right(text: str) -> str:
    """The caption of the mirrored picture: "left" and "right" changed over wherever they stand in
    lower case, within words too ("bright" is "bleft"). CLIP-Lite's rule, for text not cleaned yet.
    """
    return _SIDES.sub(lambda side: "right" if side[0] == "left" else "left", text)


def has_cjk(text: str) -> bool:
    """Whether a character of U+4E00 to U+9FA5 is in `text`: DeCLIP leaves such captions out."""
    return _CJK.search(text) is not None
