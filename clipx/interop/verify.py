"""Whether an export is what was trained: the library loads the folder, and its features, scores and
token ids are compared with those of clipx.

torch is imported with the library that is asked, and for nothing else.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from clipx.errors import MissingLibrary, NotProven
from clipx.interop import libraries
from clipx.interop.base import Format, Said
from clipx.interop.model import Model, cpu
from clipx.ops import photometry

COSINE, RELATIVE = 0.99999, 1e-4  # the limits of a proof, in float32
CAPTIONS = (
    "a photo of a dog",
    "Two men in red shirts, riding horses!",
    "The QUICK brown fox's 12 friends; it's 3 o'clock...",
    "  a   woman\twith an umbrella ",
    "x",
    "an old house with a garden, a fence, a gate, a dog, a cat and two children on bicycles " * 3,
)
# Libraries clean these in different ways: other token ids are reported, and are no failure.
ODD_CAPTIONS = (
    "a caf\u00e9 in Z\u00fcrich",
    "bread &amp; butter",
    "\u201cquoted\u201d \u2014 text",
)
_SEED, _PICTURES = 20_210_103, 6


@dataclasses.dataclass(frozen=True)
class Proof:
    """How far two models are apart."""

    library: str
    image_cosine: float  # the least of any row
    text_cosine: float
    logits: float  # the largest difference, over the largest logit
    odd: tuple[str, ...]  # captions that the library cuts into other tokens


def pictures(size: int) -> list[UInt8[np.ndarray, "h w 3"]]:
    """Fixed random pictures of `size` pixels, from smooth ones to noise."""
    rng = np.random.default_rng(_SEED)
    found = []
    for i in range(_PICTURES):
        cells = min(size, 2 ** (i + 1))
        small = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
        found.append(np.asarray(small.resize((size, size), Image.Resampling.BICUBIC)))
    return found


def ours(
    model: Model, images: Sequence[UInt8[np.ndarray, "h w 3"]], ids: Int[np.ndarray, "t n"]
) -> Said:
    """What the towers say under clipx, in float32 on the CPU."""

    def rows(name: str, x) -> np.ndarray:
        variables = {"params": model.params[name]}
        if name in model.batch_stats:
            variables["batch_stats"] = model.batch_stats[name]
        tower = getattr(model, name)
        raw = np.asarray(jax.jit(tower.apply)(variables, x).raw, np.float32)
        return np.pad(raw, ((0, 0), (0, model.width - raw.shape[1])))

    with jax.default_device(cpu()), jax.default_matmul_precision("highest"):
        image = rows("image", photometry.normalize(np.stack(images), model.mean, model.std))
        text = rows("text", np.asarray(ids, np.int32))
    return Said(image, text, logits(image, text, model.logit_scale, model.logit_bias))


def logits(image, text, scale, bias) -> Float[np.ndarray, "i t"]:
    """The score of every picture with every text, from features and the logarithm of a scale."""
    image, text = (x.astype(np.float64) for x in (image, text))
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    logits = np.exp(np.float64(scale)) * image @ text.T
    return (logits + (0 if bias is None else np.float64(bias))).astype(np.float32)


def needs(format_: Format, model: Model) -> None:
    """Raises `MissingLibrary` unless everything that verifies such an export imports."""
    for name in (*format_.judges, *format_.also_needs(model)):
        libraries.require(name)


def prove(
    format_: Format,
    folder: pathlib.Path,
    model: Model,
    tokenize: Callable[[Sequence[str]], Int[np.ndarray, "t n"]],
) -> Proof:
    """How far the library's model in `folder` is from `model`, on fixed pictures and captions.

    tokenize: captions to ids, as in training. Raises `NotProven` for a folder that the library does
    not load, captions that it cuts into other tokens, and features or logits beyond `COSINE` and
    `RELATIVE`.
    """
    names = format_.judges
    images, captions = pictures(model.image.image_size), [*CAPTIONS, *ODD_CAPTIONS]
    try:
        theirs, their_ids = format_.says(folder, images, captions)
    except MissingLibrary:
        raise
    except Exception as error:
        raise NotProven(f"{names[-1]} does not load it: {libraries.one_line(error)}") from error
    our_ids = tokenize(captions)
    end = model.words.eot_id
    same = [
        _body(a, end, model.words.dropped) == _body(b, model.words.without_mask().eot_id, None)
        for a, b in zip(our_ids, their_ids)
    ]
    kept = np.array(same)
    wrong = next((c for c, ok in zip(CAPTIONS, same) if not ok), None)
    if wrong is not None:
        raise NotProven(f"{names[-1]} cuts the caption {wrong[:40]!r} into other tokens")
    said = ours(model, images, our_ids)
    found = Proof(
        library=", ".join(f"{n} {getattr(libraries.require(n), '__version__', '')}" for n in names),
        image_cosine=_cosine(said.image, theirs.image),
        text_cosine=_cosine(said.text[kept], theirs.text[kept]),
        logits=_apart(said.logits[:, kept], theirs.logits[:, kept]),
        odd=tuple(c for c, ok in zip(captions, same) if not ok),
    )
    _hold(found)
    return found


def _hold(proof: Proof) -> None:
    faults = [
        f"{name} {value:.7f} (at least {COSINE})"
        for name, value in (
            ("the least cosine of a picture is", proof.image_cosine),
            ("the least cosine of a caption is", proof.text_cosine),
        )
        if not value > COSINE
    ]
    if not proof.logits < RELATIVE:
        faults.append(f"logits differ by {proof.logits:.2g} of the largest (at most {RELATIVE})")
    if faults:
        raise NotProven("; ".join(faults))


def _body(ids, end: int, dropped: int | None) -> list[int]:
    """The ids up to the end mark, numbered as in an export without the row `dropped`."""
    ids = [int(i) for i in ids]
    ids = ids[: ids.index(end) + 1] if end in ids else ids
    return ids if dropped is None else [i - (i > dropped) for i in ids]


def _cosine(a, b) -> float:
    a, b = (x.astype(np.float64) for x in (a, b))
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(np.min((a * b).sum(1) / lengths))


def _apart(a, b) -> float:
    return float(np.max(np.abs(a.astype(np.float64) - b)) / np.max(np.abs(a)))
