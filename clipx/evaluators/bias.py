"""Bias as a direction: what a prompt finds, before and after it is taken out of the pictures."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
from jaxtyping import Float

from clipx.errors import ConfigError
from clipx.evaluators.base import Encode, Evaluator, Pictures, read_entries, rows_of, unit
from clipx.types import Metric

_GROUPS = ("a", "b")
_KEYS = {"image": str, "group": str}


@dataclasses.dataclass(frozen=True)
class Bias(Evaluator):
    """Mean cosines of a prompt with the pictures of either group that are nearest to it, with the
    pictures as they are (`before`) and with the direction from one word list to the other taken out
    of them (`after`): `<prompt>/a_before`, `<prompt>/b_before`, `<prompt>/a_after`,
    `<prompt>/b_after`; and `gap_before` and `gap_after`, the mean over prompts of the distance
    between the groups.

    path: the folder of the pictures.
    annotations: a JSON file, a list of {"image": path in that folder, "group": "a" or "b"}.
    prompts: sentences such as "a picture of a doctor".
    words_a, words_b: pairs of words that differ in the direction alone, in the order of the groups;
    the default is gender's (Bolukbasi et al. 2016, arXiv:1607.06520).
    top: so many of each group's nearest pictures; all, where it has fewer.

    The direction g is the first principal component of the differences between the words of each
    pair, on embeddings that are not normalised; a picture's z becomes z - g (z.g)/(g.g) before its
    cosine is taken. Prompts stay as they are. It is the protocol of CLIP-Lite's bias_eda.py, less
    its faults: numbers stand under their own names, "before" holds no edited picture, no picture is
    left out, and all go through the evaluation transform. Words and prompts are tokenised as in
    training, where that file's are not cleaned.

    The pictures of the original are COCO's, its annotations pickles, one for each split. Where you
    trust them, `json.dump` writes a list of this layout from the entries of such a `<split>.data`:
    "image" is the COCO file's name, "group" is "a" where the first of its two-way gender vector
    (man, woman) is set, else "b". Nothing here opens a pickle.
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
    top: int = 10
    batch_size: int = 256

    def __post_init__(self):
        for name in ("top", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"bias.{name}", str(getattr(self, name)), "at least 1")
        if not self.prompts:
            raise ConfigError("bias.prompts", "none", "at least one sentence")
        pairs = list(zip(self.words_a, self.words_b))
        if len(self.words_a) != len(self.words_b) or not pairs:
            raise ConfigError(
                "bias.words_b",
                f"{len(self.words_b)} words for the {len(self.words_a)} of words_a",
                "as many, and at least one: they are pairs",
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
        found = {
            f"{prompt}/{name}": float(values[i])
            for i, prompt in enumerate(self.prompts)
            for name, values in means.items()
        }
        for when in ("before", "after"):
            gap = np.abs(means[f"a_{when}"] - means[f"b_{when}"])
            found[f"gap_{when}"] = float(gap.mean())
        return found

    def _nearest(self, prompts, rows) -> Float[np.ndarray, " p"]:
        return np.sort(prompts @ unit(rows).T, axis=1)[:, -self.top :].mean(axis=1)

    def _files(self) -> dict[str, list[pathlib.Path]]:
        """The pictures of each group."""
        folder = pathlib.Path(self.path).expanduser()
        if not folder.is_dir():
            raise ConfigError("bias.path", f"no folder {self.path!r}", "the folder of the pictures")
        files = {group: [] for group in _GROUPS}
        for entry in read_entries(self.annotations, "bias.annotations", _KEYS):
            if entry["group"] not in files:
                raise ConfigError(
                    "bias.annotations", f"group {entry['group']!r} of {entry['image']!r}", "a or b"
                )
            files[entry["group"]].append(folder / entry["image"])
        for group, own in files.items():
            if not own:
                raise ConfigError(
                    "bias.annotations", f"no picture of group {group!r}", "pictures of both"
                )
        return files


def direction(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " d"]:
    """The unit row along which pairs differ most, its sign arbitrary. A pair's two distances from
    its middle are one row and its negative, so that their mean is 0 and their first principal
    component the first right-singular vector of half the differences."""
    return np.linalg.svd((a - b) / 2, full_matrices=False)[2][0]


def without(rows: Float[np.ndarray, "n d"], g: Float[np.ndarray, " d"]) -> Float[np.ndarray, "n d"]:
    """`rows` less their part along `g`."""
    return rows - np.outer(rows @ g / (g @ g), g)
