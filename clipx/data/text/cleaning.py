"""How each method cleans captions before tokenisation, as functions from text to text."""

from __future__ import annotations

import html
import re
import string
import unicodedata

_CLIP_LITE_DELETES = re.compile(r"[,.'!?\"()*#:;~]")
_CLIP_LITE_WORDS = 30
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SIDES = re.compile("left|right")
_CJK = re.compile("[\u4e00-\u9fa5]")


def clip(text: str) -> str:
    """CLIP's rule: repairs the encoding, unescapes HTML entities twice, and collapses white space.

    Source: `basic_clean` and `whitespace_clean` of openai/CLIP.
    """
    # the check only saves time: other texts stay the same
    if not (text.isascii() and text.isprintable() and "&" not in text):
        import ftfy  # not at the top: most captions never need it

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return collapse(text)


def ascii_only(text: str) -> str:
    """ProtoCLIP's rule: deletes characters outside ASCII, then cleans as CLIP. "café" is "caf".

    Source: its data.py.
    """
    return clip(text.encode("ascii", "ignore").decode("ascii"))


def clip_lite(text: str) -> str:
    """CLIP-Lite's rule: lower case, without punctuation and accents, truncated to 30 words.

    Source: its transforms.py, with the same steps in the same order.
    """
    text = _CLIP_LITE_DELETES.sub("", _encodable(text).lower())
    text = text.replace("-", " ").replace("/", " ").replace("<person>", "person")
    text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    text = " ".join(text.split(" ")[:_CLIP_LITE_WORDS])
    letters = unicodedata.normalize("NFKD", text.lower())
    return "".join(c for c in letters if not unicodedata.combining(c))


def siglip(text: str) -> str:
    """SigLIP's rule: lower case, without ASCII punctuation, white space collapsed. "It's" is "its".

    Source: big_vision's canonicalize_text and transformers' SiglipTokenizer.
    """
    return collapse(text.lower().translate(_PUNCTUATION))


def canonical(text: str) -> str:
    """open_clip's "canonicalize": CLIP's repairs, then SigLIP's rule with a space for `_`."""
    return siglip(clip(text).replace("_", " "))


def lower(text: str) -> str:
    """open_clip's "lower": CLIP's rule in lower case."""
    return clip(text).lower()


def collapse(text: str) -> str:
    """`text` with single spaces between words, and none at its ends."""
    return " ".join(_encodable(text).split())


def raw(text: str) -> str:
    """`text` as it is: what a model's own tokenizer gets in transformers."""
    return _encodable(text)


def strip(text: str) -> str:
    """`text` without white space at its ends: what sentence-transformers gives to tokenizers."""
    return _encodable(text).strip()


def _encodable(text: str) -> str:
    """`text` with ? for halves of surrogate pairs, which JSON can contain but UTF-8 cannot."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


RULES = {
    "clip": clip,
    "ascii": ascii_only,
    "clip_lite": clip_lite,
    "siglip": siglip,
    "canonical": canonical,
    "lower": lower,
    "none": collapse,
    "strip": strip,
    "raw": raw,
}


def swap_left_right(text: str) -> str:
    """The caption of the mirrored image: "left" and "right" swapped, for text before cleaning.

    CLIP-Lite's rule, which only knows lower case and applies inside of words too: "bright" is
    "bleft".
    """
    return _SIDES.sub(lambda side: "right" if side[0] == "left" else "left", text)


def has_cjk(text: str) -> bool:
    """Whether `text` has a character from U+4E00 to U+9FA5. DeCLIP leaves out such captions."""
    return _CJK.search(text) is not None
