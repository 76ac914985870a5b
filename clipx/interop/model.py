"""A model in transit between clipx and a library: two towers, their NumPy arrays and token ids."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Float

from clipx.errors import ConfigError, NotExpressible
from clipx.interop.preprocessing import Interpolation, Resize
from clipx.interop.rules import Arrays
from clipx.models.base import Tower
from clipx.models.transformer import merge_adapters, unstack_blocks
from clipx.models.vit import SIZES, ViT
from clipx.types import PyTree


def _flatten(tree: PyTree) -> dict[str, Any]:
    """{"a/b/c": leaf} of nested dicts."""
    return traverse_util.flatten_dict(tree, sep="/")  # pyright: ignore[reportReturnType]


@dataclasses.dataclass(frozen=True)
class Words:
    """The vocabulary of a model: its size, text length and special token ids."""

    kind: Literal["clip_bpe", "sentencepiece", "wordpiece", "huggingface"]
    vocab_size: int
    context: int  # tokens per text
    pad_id: int
    sot_id: int | None  # None if texts have no start mark
    eot_id: int
    mask_id: int | None = None  # replaces words in masked training; no caption contains it
    plain: bool = True  # OpenAI's byte pairs and cleaning, which every CLIP library has

    @property
    def dropped(self) -> int | None:
        """The row of the token embedding that an export leaves out: the mask's. One that is part of
        the vocabulary, as BERT's is, stays."""
        return None if self.kind in ("wordpiece", "huggingface") else self.mask_id

    def without_mask(self) -> Words:
        """The ids of an export, whose token embedding has no row for the mask: higher ids move down
        by 1."""
        gone = self.dropped
        if gone is None:
            return self

        def moved(i: int) -> int:
            return i - (i > gone)

        return dataclasses.replace(
            self,
            vocab_size=self.vocab_size - 1,
            pad_id=moved(self.pad_id),
            sot_id=None if self.sot_id is None else moved(self.sot_id),
            eot_id=moved(self.eot_id),
            mask_id=None,
        )


@dataclasses.dataclass(frozen=True)
class Model:
    """Two towers and everything else that a score needs, as float32 NumPy arrays."""

    image: Tower
    text: Tower
    params: PyTree  # {"image": ..., "text": ...}, one entry per block (`scan=False`)
    batch_stats: PyTree
    logit_scale: Float[np.ndarray, ""] | None  # its logarithm; None if the file has none
    logit_bias: Float[np.ndarray, ""] | None
    mean: tuple[float, float, float]  # RGB mean for normalisation, of values in 0..1
    std: tuple[float, float, float]
    words: Words
    resize: Resize = "shortest"  # how an image becomes a square
    interpolation: Interpolation = "bicubic"
    # what else the model's own library does and clipx does not, as "name: description"
    differences: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # what of the file is left out, without a part in any feature

    @property
    def flat(self) -> Arrays:
        """Every array by its path, such as `params/image/...` or `batch_stats/image/...`."""
        return _flatten({"params": self.params, "batch_stats": self.batch_stats})

    @property
    def width(self) -> int:
        """Width of the shared embedding space. The output of a narrower tower without a projection
        is padded with zeros."""
        return max(self.image.output_width, self.text.output_width)


def make_model(image: Tower, text: Tower, variables: Mapping[str, PyTree], **rest: Any) -> Model:
    """A `Model` with float32 copies of a run's variables, whether its blocks are scanned or not.
    Low-rank adapters are merged into their kernels.

    rest: the other fields of `Model`.
    """

    def plain(tower: Tower) -> Tower:
        fields = {"dtype": "float32", "scan": False, "dropout": 0.0, "lora_rank": 0}
        fields |= {"head_dropout": 0.0, "head_init": "random"}
        return tower.clone(**{k: v for k, v in fields.items() if hasattr(tower, k)})

    def towers(tree: PyTree) -> PyTree:
        kept = {name: tree[name] for name in ("image", "text") if name in tree}
        kept = unstack_blocks(jax.tree.map(np.asarray, kept))
        adapters = {"image": image.lora, "text": text.lora}
        kept = {name: merge_adapters(tower, adapters[name]) for name, tower in kept.items()}
        return jax.tree.map(lambda x: np.asarray(x, np.float32), kept)

    return Model(
        image=plain(image),
        text=plain(text),
        params=towers(variables["params"]),
        batch_stats=towers(variables.get("batch_stats", {})),
        **rest,
    )


def vit_shape(shape: tuple[int, int, int, int], patch: int) -> dict[str, Any]:
    """Fields of a `ViT` whose `shape` is (width, depth, heads, MLP width): a variant's name if one
    has that shape, otherwise the sizes themselves."""
    for name, known in SIZES.items():
        if known == shape:
            return {"variant": f"ViT-{name}/{patch}"}
    width, depth, heads, mlp_width = shape
    return {
        "variant": f"ViT-B/{patch}",
        "width": width,
        "depth": depth,
        "heads": heads,
        "mlp_ratio": mlp_width / width,
    }


def ratio(mlp_width: int, width: int) -> float:
    """The `mlp_ratio` for which torch's models, with `int(width * mlp_ratio)`, get `mlp_width`."""
    exact = mlp_width / width
    return exact if int(width * exact) == mlp_width else (mlp_width + 0.5) / width


def check_heads(model: Model) -> None:
    """Raises `NotExpressible` for a head other than a projection, and for projections of different
    widths."""
    for name, tower in (("image", model.image), ("text", model.text)):
        if tower.head != "linear":
            raise NotExpressible(
                f"the {name} tower's head is an {tower.head}; the library's is a projection (train "
                f"with config.{name}.head=linear, or use the workdir: clipx.load)"
            )
        if tower.embed_dim not in (0, model.width):
            raise NotExpressible(
                f"one tower is projected to {tower.embed_dim} channels, the other has {model.width}"
            )


def check_bias(tower: Tower, name: str) -> None:
    """Raises `NotExpressible` if the projection of the tower `name` has a bias, for a library whose
    projection has none."""
    if tower.embed_dim and tower.biased_projection:
        raise NotExpressible(
            f"the {name} tower's projection has a bias; the library's has none (train with "
            f"config.{name}.projection_bias=false)"
        )


def check_tokens(image: ViT, library: str) -> None:
    """Raises `NotExpressible` for a ViT with what only timm's have."""
    given = {
        "registers": image.registers > 0,
        "layer_scale": image.layer_scale is not None,
        "norm_pooled": image.norm_pooled,
        "class_token": image.has_class != (image.pool == "class"),
    }
    if found := [name for name, present in given.items() if present]:
        names = " and ".join(f"config.image.{name}" for name in found)
        raise NotExpressible(f"{library} has no {names}; use --format=open_clip")


def check_padding(model: Model, own: bool) -> None:
    """Raises `NotExpressible` if the text tower reads padding and the export's tokenizer pads with
    another id than training. transformers' CLIP tokenizer does so; CLIP's own (`own`) does not. The
    model's text tower must be a `TextTransformer`."""
    text = model.text
    reads_padding = not text.causal or (text.pool == "last" and not text.mask_padding)
    if reads_padding and model.words.kind == "clip_bpe" and not own:
        raise NotExpressible(
            "this text tower reads padding; training padded with id 0, but transformers' CLIP "
            "tokenizer pads with the end mark. A SentencePiece tokenizer "
            "(config.tokenizer.name=sentencepiece) has an id for padding"
        )


@functools.cache
def shapes(tower: Tower) -> dict[str, Any]:
    """Shapes and dtypes of a tower's variables."""
    size = getattr(tower, "image_size", None)
    if size is None:
        example = jax.ShapeDtypeStruct((1, tower.context), jnp.int32)
    else:
        example = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(tower.init, jax.random.key(0), example)
    return {k: v for k, v in variables.items() if k in ("params", "batch_stats")}


def array_shapes(image: Tower, text: Tower) -> dict[str, tuple[int, ...]]:
    """Shapes of both towers' arrays, by the paths of `Model.flat`."""
    return tower_shapes("image", image) | tower_shapes("text", text)


def tower_shapes(name: str, tower: Tower) -> dict[str, tuple[int, ...]]:
    """Shapes of one tower's arrays, by the paths that they have in a model with the tower `name`:
    "image" or "text"."""
    variables = shapes(tower)  # pyright: ignore[reportArgumentType]  # modules hash
    return {
        f"{kind}/{name}/{path}": x.shape
        for kind, tree in variables.items()
        for path, x in _flatten(tree).items()
    }


def checked(model: Model, where: str) -> Model:
    """Returns `model` unchanged. Raises `ConfigError` at `where` for the first array that is
    missing or has another shape than its tower expects."""
    for path, shape in array_shapes(model.image, model.text).items():
        rest = path.partition("/")[2]
        array = model.flat.get(path)
        if array is None or array.shape != shape:
            found = f"no {rest}" if array is None else f"{rest} of shape {array.shape}"
            raise ConfigError(where, found, f"shape {shape}, as the model's config describes")
    return model


def scalar(arrays: Arrays, name: str, where: str) -> np.float32 | None:
    """Takes the array `name` of one value out of `arrays`; None if there is none. Raises
    `ConfigError` at `where` for an array of several values."""
    if name not in arrays:
        return None
    x = arrays.pop(name)
    if x.size != 1:
        raise ConfigError(where, f"{name} of shape {x.shape}", "one value")
    return np.float32(x.reshape(()))


def cpu() -> jax.Device:  # pyright: ignore[reportInvalidTypeForm]  # jaxlib has no stubs
    """The CPU device; the first device if JAX has no CPU backend."""
    try:
        return jax.devices("cpu")[0]
    except RuntimeError:
        return jax.devices()[0]
