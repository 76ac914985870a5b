"""Proof that an export is the model that was trained: the library loads the folder, and its
features, logits and token ids are compared with those of clipx.

torch is imported only together with the library that verifies.
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

# Limits of a proof in float32: least cosine of a row, largest difference relative to the largest
# logit
COSINE, RELATIVE = 0.99999, 1e-4
CAPTIONS = (
    "a photo of a dog",
    "Two men in red shirts, riding horses!",
    "The QUICK brown fox's 12 friends; it's 3 o'clock...",
    "  a   woman\twith an umbrella ",
    "x",
    "an old house with a garden, a fence, a gate, a dog, a cat and two children on bicycles " * 3,
)
# Libraries clean these captions differently: different token ids are reported but do not fail.
ODD_CAPTIONS = (
    "a caf\u00e9 in Z\u00fcrich",
    "bread &amp; butter",
    "\u201cquoted\u201d \u2014 text",
)
_SEED, _PICTURES = 20_210_103, 6


@dataclasses.dataclass(frozen=True)
class Proof:
    """How much the outputs of clipx and of a library differ."""

    library: str  # the modules that verified, with their versions
    image_cosine: float  # least cosine of any image's two features
    text_cosine: float
    logits: float  # largest absolute difference, divided by the largest absolute logit
    odd: tuple[str, ...]  # captions for which the library gives other token ids


def pictures(size: int) -> list[UInt8[np.ndarray, "h w 3"]]:
    """Fixed random images of `size` x `size` pixels, from smooth to noisy."""
    rng = np.random.default_rng(_SEED)
    made = []
    for i in range(_PICTURES):
        cells = min(size, 2 ** (i + 1))
        small = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
        made.append(np.asarray(small.resize((size, size), Image.Resampling.BICUBIC)))
    return made


def ours(
    model: Model, images: Sequence[UInt8[np.ndarray, "h w 3"]], ids: Int[np.ndarray, "t n"]
) -> Said:
    """The model's outputs under clipx, in float32 on the CPU. Without a logit scale the logits are
    cosines."""

    def rows(name: str, x: np.ndarray | jax.Array) -> np.ndarray:
        variables = {"params": model.params[name]}
        if name in model.batch_stats:
            variables["batch_stats"] = model.batch_stats[name]
        tower = getattr(model, name)
        raw = np.asarray(jax.jit(tower.apply)(variables, x).raw, np.float32)
        return np.pad(raw, ((0, 0), (0, model.width - raw.shape[1])))

    with jax.default_device(cpu()), jax.default_matmul_precision("highest"):
        pixels = np.stack(images)
        inputs = photometry.normalize(pixels, model.mean, model.std)  # pyright: ignore[reportArgumentType]
        image = rows("image", inputs)
        text = rows("text", np.asarray(ids, np.int32))
    scale = 0.0 if model.logit_scale is None else model.logit_scale
    return Said(image, text, logits(image, text, scale, model.logit_bias))


def logits(
    image: Float[np.ndarray, "i d"],
    text: Float[np.ndarray, "t d"],
    scale: np.ndarray | float,
    bias: np.ndarray | float | None,
) -> Float[np.ndarray, "i t"]:
    """`exp(scale) * cosine + bias` of every image with every text, from features of any length."""
    image, text = (x.astype(np.float64) for x in (image, text))
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    logits = np.exp(np.float64(scale)) * image @ text.T
    return (logits + (0 if bias is None else np.float64(bias))).astype(np.float32)


def needs(format_: Format, model: Model) -> None:
    """Raises `MissingLibrary` unless every module that verifies such an export can be imported."""
    for name in (*format_.judges, *format_.also_needs(model)):
        libraries.require(name)


def prove(
    format_: Format,
    folder: pathlib.Path,
    model: Model,
    tokenize: Callable[[Sequence[str]], Int[np.ndarray, "t n"]],
) -> Proof:
    """Compares the library's model in `folder` with `model` on fixed images and captions.

    tokenize: captions to ids, as in training.

    Raises `NotProven` for a folder that the library cannot load, for other token ids of a caption
    in `CAPTIONS`, and for features or logits that differ by more than `COSINE` and `RELATIVE`
    allow. Raises `MissingLibrary` without the library.
    """
    names = format_.judges
    images, captions = pictures(model.image.image_size), [*CAPTIONS, *ODD_CAPTIONS]
    try:
        theirs, their_ids = format_.says(folder, images, captions)
    except MissingLibrary:
        raise
    except Exception as error:
        raise NotProven(f"{names[-1]} cannot load it: {libraries.one_line(error)}") from error
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
    proof = Proof(
        library=", ".join(f"{n} {getattr(libraries.require(n), '__version__', '')}" for n in names),
        image_cosine=_cosine(said.image, theirs.image),
        text_cosine=_cosine(said.text[kept], theirs.text[kept]),
        logits=_relative_difference(said.logits[:, kept], theirs.logits[:, kept]),
        odd=tuple(c for c, ok in zip(captions, same) if not ok),
    )
    _check_limits(proof)
    return proof


def _check_limits(proof: Proof) -> None:
    faults = [
        f"{name} {value:.7f}, expected more than {COSINE}"
        for name, value in (
            ("the least cosine of an image is", proof.image_cosine),
            ("the least cosine of a caption is", proof.text_cosine),
        )
        if not value > COSINE
    ]
    if not proof.logits < RELATIVE:
        faults.append(
            f"logits differ by {proof.logits:.2g} of the largest, expected less than {RELATIVE:g}"
        )
    if faults:
        raise NotProven("; ".join(faults))


def _body(row: Int[np.ndarray, " n"], end: int, dropped: int | None) -> list[int]:
    """The ids up to the end mark, renumbered for a vocabulary without the id `dropped`."""
    ids = [int(i) for i in row]
    ids = ids[: ids.index(end) + 1] if end in ids else ids
    return ids if dropped is None else [i - (i > dropped) for i in ids]


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    """The least cosine of a row of `a` with the same row of `b`."""
    a, b = (x.astype(np.float64) for x in (a, b))
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(np.min((a * b).sum(1) / lengths))


def _relative_difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.max(np.abs(a.astype(np.float64) - b)) / np.max(np.abs(a)))
