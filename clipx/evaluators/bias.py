"""Bias as a direction: which pictures a prompt finds, before and after the direction is removed."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
from jaxtyping import Float

from clipx.config.ranges import Count
from clipx.errors import ConfigError
from clipx.evaluators.base import Encode, Evaluator, Pictures, read_entries, rows_of, unit
from clipx.types import Metric

_GROUPS = ("a", "b")
_KEYS = {"image": str, "group": str}


@dataclasses.dataclass(frozen=True)
class Bias(Evaluator):
    """Mean cosine of each prompt with its nearest pictures in either group of people.

    `<prompt>/a_before` and `<prompt>/b_before` use the pictures' embeddings as they are;
    `<prompt>/a_after` and `<prompt>/b_after` use embeddings without the direction from one word
    list to the other. `gap_before` and `gap_after` are the absolute difference between the groups,
    averaged over prompts.

    path: the folder of the pictures.
    annotations: a JSON file, a list of {"image": path in that folder, "group": "a" or "b"}.
    prompts: sentences such as "a picture of a doctor".
    words_a, words_b: pairs of words that differ only in the direction; words_a belongs to group a.
    The default is gender (Bolukbasi et al. 2016, arXiv:1607.06520).
    top: the number of nearest pictures of each group; a smaller group uses all of its pictures.

    The direction g is the first principal component of the differences between the words of each
    pair, on unnormalised embeddings. A picture's z becomes z - g (z.g)/(g.g) before its cosine is
    taken. Prompts are not changed.

    This is the protocol of CLIP-Lite's bias_eda.py with its faults fixed: every number has its own
    name, "before" uses no edited picture, no picture is left out, and all pictures go through the
    evaluation transform. Words and prompts are tokenised as in training; that file does not clean
    them.

    The original uses COCO's pictures, and annotations in one pickle per split, `<split>.data`.
    Nothing here opens a pickle. If you trust it, write its entries with `json.dump` in the layout
    above: "image" is the COCO file's name; "group" is "a" if the first element of the entry's
    two-way gender vector (man, woman) is set, else "b".
    """

    metrics = {
        "gap_before": Metric("less"),
        "gap_after": Metric("less"),
        "*/?_before": Metric(),
        "*/?_after": Metric(),
    }

    pictures: Pictures
    path: str
    annotations: str
    prompts: tuple[str, ...]
    words_a: tuple[str, ...] = (
        *("man", "boy", "he", "father", "son", "guy", "male", "his", "himself", "john"),
    )
    words_b: tuple[str, ...] = (
        *("woman", "girl", "she", "mother", "daughter", "gal", "female", "her", "herself", "mary"),
    )
    top: Count = 10
    batch_size: Count = 256

    def __post_init__(self):
        if not self.prompts:
            raise ConfigError("bias.prompts", "none", "at least one sentence")
        pairs = list(zip(self.words_a, self.words_b))
        if len(self.words_a) != len(self.words_b) or not pairs:
            raise ConfigError(
                "bias.words_b",
                f"{len(self.words_b)} words, and {len(self.words_a)} in words_a",
                "as many words as in words_a, and at least one: they are pairs",
            )
        for a, b in pairs:
            if a == b:
                raise ConfigError("bias.words_b", f"{a!r} paired with itself", "another word")
        if self.pictures is not None:
            self._files()

    def __call__(self, encode: Encode) -> dict[str, float]:
        words = rows_of(encode.text, [[*self.words_a, *self.words_b]], "raw")
        g = direction(*np.split(words, 2))
        prompts = unit(rows_of(encode.text, [list(self.prompts)], "raw"))
        means = {}
        for group, files in self._files().items():
            rows = rows_of(encode.image, self.pictures(files, self.batch_size), "raw")
            means[f"{group}_before"] = self._nearest(prompts, rows)
            means[f"{group}_after"] = self._nearest(prompts, without(rows, g))
        metrics = {
            f"{prompt}/{name}": float(values[i])
            for i, prompt in enumerate(self.prompts)
            for name, values in means.items()
        }
        for when in ("before", "after"):
            gap = np.abs(means[f"a_{when}"] - means[f"b_{when}"])
            metrics[f"gap_{when}"] = float(gap.mean())
        return metrics

    def _nearest(
        self, prompts: Float[np.ndarray, "p d"], rows: Float[np.ndarray, "n d"]
    ) -> Float[np.ndarray, " p"]:
        """Mean cosine of each prompt with the `top` rows nearest to it."""
        return np.sort(prompts @ unit(rows).T, axis=1)[:, -self.top :].mean(axis=1)

    def _files(self) -> dict[str, list[pathlib.Path]]:
        """The picture files of each group. Raises `ConfigError` for a missing or wrong file."""
        folder = pathlib.Path(self.path).expanduser()
        if not folder.is_dir():
            raise ConfigError("bias.path", f"no folder {self.path!r}", "the folder of the pictures")
        files: dict[str, list[pathlib.Path]] = {group: [] for group in _GROUPS}
        for entry in read_entries(self.annotations, "bias.annotations", _KEYS):
            if entry["group"] not in files:
                raise ConfigError(
                    "bias.annotations", f"group {entry['group']!r} of {entry['image']!r}", "a or b"
                )
            files[entry["group"]].append(folder / entry["image"])
        for group, paths in files.items():
            if not paths:
                raise ConfigError(
                    "bias.annotations", f"no picture of group {group!r}", "pictures of both groups"
                )
        return files


def direction(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " d"]:
    """The unit vector along which pairs differ most; its sign is arbitrary.

    The offsets of a pair from its middle are one vector and its negative. So the offsets have mean
    0, and their first principal component is the first right-singular vector of (a - b) / 2.
    """
    return np.linalg.svd((a - b) / 2, full_matrices=False)[2][0]


def without(rows: Float[np.ndarray, "n d"], g: Float[np.ndarray, " d"]) -> Float[np.ndarray, "n d"]:
    """`rows` without their component along `g`."""
    return rows - np.outer(rows @ g / (g @ g), g)
