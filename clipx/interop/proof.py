"""The proof of an export: the library itself loads the folder, and says what we say.

torch comes with the libraries that are asked; nothing else here needs it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import pathlib
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from clipx.errors import MissingLibrary, NotProven
from clipx.interop.base import Model
from clipx.ops import photometry

COSINE, RELATIVE = 0.99999, 1e-4  # what an export is held to, in float32
CAPTIONS = (
    "a photo of a dog",
    "Two men in red shirts, riding horses!",
    "The QUICK brown fox's 12 friends; it's 3 o'clock...",
    "  a   woman\twith an umbrella ",
    "x",
    "an old house with a garden, a fence, a gate, a dog, a cat and two children on bicycles " * 3,
)
# What ftfy, entities or another library's marks may make of these is reported, and stops nothing.
ODD_CAPTIONS = (
    "a caf\u00e9 in Z\u00fcrich",
    "bread &amp; butter",
    "\u201cquoted\u201d \u2014 text",
)
_SEED, _PICTURES = 20_210_103, 6


@dataclasses.dataclass(frozen=True)
class Said:
    """What a model says of pictures and captions: float32 rows of any length, and their scores."""

    image: Float[np.ndarray, "i d"]
    text: Float[np.ndarray, "t d"]
    logits: Float[np.ndarray, "i t"]


@dataclasses.dataclass(frozen=True)
class Proof:
    """How far two models are apart."""

    library: str
    image_cosine: float  # the least of any row
    text_cosine: float
    logits: float  # the largest difference, over the largest logit
    odd: tuple[str, ...]  # captions that the library cuts into other tokens


def library(name: str) -> Any:
    """A module, imported. Raises `MissingLibrary` for one that is not there or does not import."""
    try:
        with quiet():
            if name not in sys.modules:
                _torchvision()
            return importlib.import_module(name)
    except ImportError as error:
        if getattr(error, "name", None) == name:
            raise MissingLibrary(f"{name} is not installed") from None
        raise MissingLibrary(f"{name} does not import ({_line(error)})") from None
    except Exception as error:  # a torchvision that does not match its torch raises RuntimeError
        raise MissingLibrary(f"{name} does not import ({_line(error)})") from None


@functools.cache
def _torchvision() -> None:
    """Imports torchvision where it is installed, which open_clip, timm and transformers do too.

    Built for another torch, a CUDA wheel beside a CPU torch for one, it does not find its compiled
    operators and fails where it describes two of them. No picture or model here needs these: with
    both declared, the rest of it works.
    """
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            return
        torch = importlib.import_module("torch")
        declared = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            declared.define(f"{operator}(Tensor dets, Tensor scores, float threshold) -> Tensor")
        _KEPT.append(declared)  # which takes its operators along when it goes
        for module in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
            del sys.modules[module]
        importlib.import_module("torchvision")


_KEPT: list[Any] = []


@contextlib.contextmanager
def quiet():
    """Without the libraries' warnings, which are not about the model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


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
    """What our towers say, in float32 on the CPU."""

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


def cpu() -> jax.Device:
    """The host; where JAX was told to leave it alone, the first device."""
    try:
        return jax.devices("cpu")[0]
    except RuntimeError:
        return jax.devices()[0]


def logits(image, text, scale, bias) -> Float[np.ndarray, "i t"]:
    """The score of every picture with every text, from features and the logarithm of a scale."""
    image, text = (x.astype(np.float64) for x in (image, text))
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    logits = np.exp(np.float64(scale)) * image @ text.T
    return (logits + (0 if bias is None else np.float64(bias))).astype(np.float32)


def open_clip_says(folder: pathlib.Path, images, captions) -> tuple[Said, Int[np.ndarray, "t n"]]:
    """What open_clip's model of the folder says, through its own transform and tokenizer, and the
    ids of the captions."""
    torch, open_clip = library("torch"), library("open_clip")
    name = f"local-dir:{folder}"
    with quiet(), torch.no_grad():
        model, _, transform = open_clip.create_model_and_transforms(name, precision="fp32")
        tokenizer = open_clip.get_tokenizer(name)
        model.eval()
        batch = torch.stack([transform(Image.fromarray(x)) for x in images])
        ids = tokenizer(list(captions))
        image, text = model.encode_image(batch), model.encode_text(ids)
        scores, _ = model.get_logits(batch, ids)
    return Said(*(x.numpy() for x in (image, text, scores))), ids.numpy()


def huggingface_says(folder: pathlib.Path, images, captions) -> tuple[Said, Any]:
    """What transformers' model of the folder says, through its own processor, and the ids."""
    torch, transformers = library("torch"), library("transformers")
    with quiet(), torch.no_grad():
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        processor = transformers.AutoProcessor.from_pretrained(folder)
        inputs = processor(
            text=list(captions),
            images=[Image.fromarray(x) for x in images],
            return_tensors="pt",
            padding="max_length",
            truncation=True,
        )
        said = model(**inputs)
        # the features before normalisation, which the outputs above are after
        image = model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
        rest = {k: v for k, v in inputs.items() if k != "pixel_values"}
        text = model.get_text_features(**rest).pooler_output
    ids = inputs["input_ids"].numpy()
    return Said(*(x.numpy() for x in (image, text, said.logits_per_image))), ids


JUDGES = {
    "open_clip": (open_clip_says, ("torch", "open_clip")),
    "huggingface": (huggingface_says, ("torch", "transformers")),
}


def needs(format_: str, *, tokenizer: bool) -> None:
    """Raises `MissingLibrary` unless what judges a format is installed and imports."""
    names = JUDGES[format_][1] + ("transformers",) * tokenizer
    for name in names:
        library(name)


def prove(
    format_: str,
    folder: pathlib.Path,
    model: Model,
    tokenize: Callable[[Sequence[str]], Int[np.ndarray, "t n"]],
) -> Proof:
    """How near the library's model in `folder` is to ours, captions included.

    Raises `NotProven` for a folder that the library does not load, captions that it cuts into other
    tokens, and towers or logits further away than `COSINE` and `RELATIVE`.
    """
    says, names = JUDGES[format_]
    images, captions = pictures(model.image.image_size), [*CAPTIONS, *ODD_CAPTIONS]
    try:
        theirs, their_ids = says(folder, images, captions)
    except MissingLibrary:
        raise
    except Exception as error:
        raise NotProven(f"{names[-1]} does not load it: {_line(error)}") from error
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
        library=", ".join(f"{n} {getattr(library(n), '__version__', '')}" for n in names),
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
    """The ids up to the end mark, as an export without the row `dropped` has them."""
    ids = [int(i) for i in ids]
    ids = ids[: ids.index(end) + 1] if end in ids else ids
    return ids if dropped is None else [i - (i > dropped) for i in ids]


def _cosine(a, b) -> float:
    a, b = (x.astype(np.float64) for x in (a, b))
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(np.min((a * b).sum(1) / lengths))


def _apart(a, b) -> float:
    return float(np.max(np.abs(a.astype(np.float64) - b)) / np.max(np.abs(a)))
