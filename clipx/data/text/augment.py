"""Easy data augmentation of captions: synonyms, swaps, deletions, insertions (EDA, Wei and Zou
2019), by the rules of textaugment 1.3.4, which DeCLIP uses."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Literal

import numpy as np

from clipx.data.text.wordnet import WordNet
from clipx.errors import ConfigError

_CACHED = 1 << 14  # words whose synonyms are kept: some 10 MB
_SWAP_DRAWS = 3  # draws of a second place other than the first
_INSERT_DRAWS = 9  # draws of a word that has synonyms

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
    """What may happen to a caption; the defaults are DeCLIP's."""

    operations: tuple[Literal["synonym", "swap", "delete", "insert"], ...] = (
        *("synonym", "swap", "delete"),
    )
    probability: float = 0.1  # that a word is deleted
    count: int = 1  # words that get a synonym, swaps or insertions
    wordnet: str = ""  # its folder or zip file; '': where the system or NLTK has it

    def __post_init__(self):
        for field, right, expected in (
            ("operations", len(self.operations) > 0, "at least one operation"),
            ("probability", 0 <= self.probability <= 1, "from 0 to 1"),
            ("count", self.count >= 1, "at least 1"),
        ):
            if not right:
                found = str(getattr(self, field))
                raise ConfigError(f"config.data.text_augment.{field}", found, expected)


class TextAugment:
    """A caption to its augmentation, by one operation of the config's, each as likely.

    Words are what white space parts, so "dog," has no synonyms. The same generator gives the same
    caption. It pickles as its config, and may be called from many threads.
    Raises `ConfigError` where an operation needs WordNet and there is none.
    """

    def __init__(self, config: TextAugmentConfig):
        self.config = config
        if {"synonym", "insert"} & set(config.operations):
            lookup = functools.partial(synonyms, WordNet(config.wordnet))
            self._synonyms = functools.lru_cache(_CACHED)(lookup)

    def __reduce__(self):
        return TextAugment, (self.config,)

    def __call__(self, text: str, rng: np.random.Generator) -> str:
        """`text` after one operation, its words joined by single spaces; where it has none, `text`
        itself."""
        words = text.split()
        if not words:
            return text
        operation = self.config.operations[rng.integers(len(self.config.operations))]
        return " ".join(getattr(self, f"_{operation}")(words, rng))

    def _synonym(self, words: list[str], rng: np.random.Generator) -> list[str]:
        """The first `count` words of a random order that have synonyms become one, everywhere."""
        distinct = _without_stops(dict.fromkeys(words))
        replaced = 0
        for place in rng.permutation(len(distinct)):
            found = self._synonyms(distinct[place])
            if found:
                synonym = _choose(found, rng)
                words = [synonym if word == distinct[place] else word for word in words]
                replaced += 1
            if replaced == self.config.count:
                break
        return words

    def _swap(self, words: list[str], rng: np.random.Generator) -> list[str]:
        """Two words change places, unless three draws of the second give the first."""
        for _ in range(self.config.count):
            first, *others = rng.integers(len(words), size=1 + _SWAP_DRAWS)
            second = next((i for i in others if i != first), first)
            words[first], words[second] = words[second], words[first]
        return words

    def _delete(self, words: list[str], rng: np.random.Generator) -> list[str]:
        """Every word goes with the config's probability; one stays in any case."""
        kept = rng.random(len(words)) >= self.config.probability
        return [w for w, keep in zip(words, kept) if keep] or [_choose(words, rng)]

    def _insert(self, words: list[str], rng: np.random.Generator) -> list[str]:
        """A synonym of a random word goes in before a random word, unless nine have none."""
        for _ in range(self.config.count):
            candidates = _without_stops(words)
            for _ in range(_INSERT_DRAWS if candidates else 0):
                found = self._synonyms(_choose(candidates, rng))
                if found:
                    words.insert(rng.integers(len(words)), _choose(found, rng))
                    break
        return words


def synonyms(wordnet: WordNet, word: str) -> tuple[str, ...]:
    """Every lemma of every synset of `word` but `word` itself, in lower case, of the letters a to z
    and spaces, sorted; '' may be among them, as in textaugment."""
    names = (re.sub("[_-]", " ", name).lower() for name in wordnet.lemmas(word))
    return tuple(sorted({re.sub("[^a-z ]", "", name) for name in names} - {word}))


def _without_stops(words) -> list[str]:
    return [word for word in words if word not in STOP_WORDS]


def _choose(options, rng: np.random.Generator) -> str:
    return options[rng.integers(len(options))]
