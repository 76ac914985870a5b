"""Easy data augmentation of captions by synonyms, swaps, deletions and insertions (EDA, Wei and Zou
2019), with the rules of textaugment 1.3.4, which DeCLIP uses."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

import numpy as np

from clipx.config.ranges import Fraction, Range
from clipx.data.text.wordnet import WordNet
from clipx.errors import ConfigError

_CACHED = 1 << 14  # words whose synonyms are cached: about 10 MB
_SWAP_TRIES = 3  # samples of a second position that must differ from the first
_INSERT_TRIES = 9  # samples of a word that must have synonyms

_STOPS = """
i me my myself we our ours ourselves you you're you've you'll you'd your yours yourself yourselves
he him his himself she she's her hers herself it it's its itself they them their theirs themselves
what which who whom this that that'll these those am is are was were be been being have has had
having do does did doing a an the and but if or because as until while of at by for with about
against between into through during before after above below to from up down in out on off over
under again further then once here there when where why how all any both each few more most other
some such no nor not only own same so than too very s t can will just don don't should should've now
d ll m o re ve y ain aren aren't couldn couldn't didn didn't doesn doesn't hadn hadn't hasn hasn't
haven haven't isn isn't ma mightn mightn't mustn mustn't needn needn't shan shan't shouldn shouldn't
wasn wasn't weren weren't won won't wouldn wouldn't
"""
STOP_WORDS = frozenset(_STOPS.split())  # NLTK's English list of 179


@dataclasses.dataclass(frozen=True)
class TextAugmentConfig:
    """The operations on a caption. The defaults are DeCLIP's."""

    operations: tuple[Literal["synonym", "swap", "delete", "insert"], ...] = (
        *("synonym", "swap", "delete"),
    )
    probability: Fraction = 0.1  # of deleting each word
    count: Annotated[int, Range(1, 1000)] = 1  # number of synonyms, swaps or insertions per caption
    wordnet: str = ""  # folder or zip file of WordNet; '': searches the usual places

    def __post_init__(self) -> None:
        if not self.operations:
            raise ConfigError(
                "config.data.text_augment.operations", "none", "at least one operation"
            )


class TextAugment:
    """Augments captions, each by one operation of the config, sampled uniformly.

    Words are separated by white space only, so "dog," has no synonyms. The result depends only on
    the caption and the generator. An instance can be pickled and called from many threads.

    The constructor raises `ConfigError` if an operation needs WordNet and there is none.
    """

    def __init__(self, config: TextAugmentConfig):
        self.config = config
        if {"synonym", "insert"} & set(config.operations):
            lookup = functools.partial(synonyms, WordNet(config.wordnet))
            self._synonyms = functools.lru_cache(_CACHED)(lookup)

    def __reduce__(self):
        return TextAugment, (self.config,)

    def __call__(self, text: str, rng: np.random.Generator) -> str:
        """`text` after one operation, with single spaces between words. A text without words is
        returned unchanged."""
        words = text.split()
        if not words:
            return text
        operation = self.config.operations[rng.integers(len(self.config.operations))]
        return " ".join(getattr(self, f"_{operation}")(words, rng))

    def _synonym(self, words: list[str], rng: np.random.Generator) -> list[str]:
        """Replaces up to `count` random words that have synonyms, at all their occurrences."""
        distinct = _without_stops(dict.fromkeys(words))
        replaced = 0
        for index in rng.permutation(len(distinct)):
            options = self._synonyms(distinct[index])
            if options:
                synonym = _choose(options, rng)
                words = [synonym if word == distinct[index] else word for word in words]
                replaced += 1
            if replaced == self.config.count:
                break
        return words

    def _swap(self, words: list[str], rng: np.random.Generator) -> list[str]:
        """Swaps two random words, unless all samples of the second position equal the first."""
        for _ in range(self.config.count):
            first, *others = rng.integers(len(words), size=1 + _SWAP_TRIES)
            second = next((i for i in others if i != first), first)
            words[first], words[second] = words[second], words[first]
        return words

    def _delete(self, words: list[str], rng: np.random.Generator) -> list[str]:
        """Deletes every word with the config's probability, but keeps at least one."""
        kept = rng.random(len(words)) >= self.config.probability
        return [w for w, keep in zip(words, kept) if keep] or [_choose(words, rng)]

    def _insert(self, words: list[str], rng: np.random.Generator) -> list[str]:
        """Inserts a synonym of a random word before a random word, unless none of the sampled
        words has synonyms."""
        for _ in range(self.config.count):
            candidates = _without_stops(words)
            for _ in range(_INSERT_TRIES if candidates else 0):
                options = self._synonyms(_choose(candidates, rng))
                if options:
                    words.insert(rng.integers(len(words)), _choose(options, rng))
                    break
        return words


def synonyms(wordnet: WordNet, word: str) -> tuple[str, ...]:
    """The sorted lemmas of all synsets of `word`, without `word` itself.

    They are in lower case, reduced to the letters a to z and spaces. '' may be among them, as in
    textaugment.
    """
    names = (re.sub("[_-]", " ", name).lower() for name in wordnet.lemmas(word))
    return tuple(sorted({re.sub("[^a-z ]", "", name) for name in names} - {word}))


def _without_stops(words: Iterable[str]) -> list[str]:
    return [word for word in words if word not in STOP_WORDS]


def _choose(options: Sequence[str], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]
