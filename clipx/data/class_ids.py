"""Class names in place of WordNet ids such as n01440764, by which ImageNet's folders are named."""

from __future__ import annotations

import functools
import pathlib
import re

from clipx.data.text.wordnet import WordNet
from clipx.errors import ConfigError, DataError

# One line for each of the 1,000 classes: the id, and the name of OpenAI's list
# (github.com/openai/CLIP, MIT), which open_clip and CLIP_benchmark use.
_FILE = pathlib.Path(__file__).with_name("imagenet.txt")
_ID = re.compile(r"(n\d{8})(?:[-_ ](\S.*))?")  # Stanford Dogs writes n02085620-Chihuahua

_NUMBERED = re.compile(r"\d+\.[ _]?([^\W\d_].*)")


@functools.cache
def imagenet() -> dict[str, str]:
    """The names of ImageNet's 1,000 classes by their WordNet ids, in the order of the labels."""
    lines = _FILE.read_text(encoding="utf-8").splitlines()
    return {wnid: name for wnid, _, name in (line.partition(" ") for line in lines)}


def readable(classes: tuple[str, ...]) -> tuple[str, ...]:
    """`classes` with names in place of WordNet ids; other names stay.

    The name is what follows the id, if anything does; else that of ImageNet's list; else the first
    lemma of an installed WordNet. Without these the id itself stays. Where all names begin with a
    number and a dot, as CUB's 001.Black_footed_Albatross, it is left out.
    """
    numbered = [_NUMBERED.fullmatch(name) for name in classes]
    if all(numbered):
        return tuple(match[1].replace("_", " ") for match in numbered if match)
    return tuple(map(_readable, classes))


def _readable(name: str) -> str:
    match = _ID.fullmatch(name)
    if not match:
        return name
    wnid, rest = match.groups()
    if rest:
        return rest.replace("_", " ")
    return imagenet().get(wnid) or _lemma(wnid) or name


def _lemma(wnid: str) -> str:
    """The first lemma of a noun's synset in WordNet 3.0, whose offsets the ids are."""
    wordnet = _wordnet()
    lemmas = wordnet.noun(int(wnid[1:])) if wordnet else []
    return lemmas[0].replace("_", " ") if lemmas else ""


@functools.cache
def _wordnet() -> WordNet | None:
    """The installed WordNet, if there is one and it is of version 3.0."""
    try:
        wordnet = WordNet()
    except (ConfigError, DataError):
        return None
    return wordnet if "tench" in wordnet.noun(1440764) else None
