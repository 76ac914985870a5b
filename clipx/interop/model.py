"""A model on its way between clipx and a library: two towers as NumPy arrays, and its words."""

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
from clipx.interop.rules import Arrays
from clipx.models.layers import Tower
from clipx.models.transformer import unstack_blocks
from clipx.models.vit import SIZES
from clipx.types import PyTree


@dataclasses.dataclass(frozen=True)
class Words:
    """The token ids of a model's texts."""

    kind: Literal["clip_bpe", "sentencepiece", "wordpiece"]
    vocab_size: int
    context: int
    pad_id: int
    sot_id: int | None  # None if texts have no start mark
    eot_id: int
    mask_id: int | None = None  # hides words in training; no text has it
    plain: bool = True  # OpenAI's byte pairs and cleaning, which every CLIP library has

    @property
    def dropped(self) -> int | None:
        """The row of the table of words that an export leaves out: the mask's. BERT's own mask is
        one of its words and stays."""
        return None if self.kind == "wordpiece" else self.mask_id

    def without_mask(self) -> Words:
        """The ids of an export, whose table has no row for the mask: later ids move down by 1."""
        gone = self.dropped
        if gone is None:
            return self

        def moved(i: int | None) -> int | None:
            return None if i is None else i - (i > gone)

        return dataclasses.replace(
            self,
            vocab_size=self.vocab_size - 1,
            pad_id=moved(self.pad_id),
            sot_id=moved(self.sot_id),
            eot_id=moved(self.eot_id),
            mask_id=None,
        )


@dataclasses.dataclass(frozen=True)
class Model:
    """Two towers and all else that a score needs, in float32 NumPy."""

    image: Tower
    text: Tower
    params: PyTree  # {"image": ..., "text": ...}, one entry a block (`scan=False`)
    batch_stats: PyTree
    logit_scale: Float[np.ndarray, ""]  # the logarithm
    logit_bias: Float[np.ndarray, ""] | None
    mean: tuple[float, float, float]  # of RGB in 0..1
    std: tuple[float, float, float]
    words: Words
    resize: Literal["shortest", "squash"] = "shortest"  # how a picture becomes a square
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"

    @property
    def flat(self) -> Arrays:
        """Every array by its path, `params/image/...` or `batch_stats/image/...`."""
        tree = {"params": self.params, "batch_stats": self.batch_stats}
        return traverse_util.flatten_dict(tree, sep="/")

    @property
    def width(self) -> int:
        """Channels of the shared space. A narrower tower without a projection is padded with
        zeros."""
        return max(self.image.output_width, self.text.output_width)


def make_model(image: Tower, text: Tower, variables: Mapping[str, PyTree], **rest: Any) -> Model:
    """A `Model` of float32 copies, from a run's towers and variables, scanned or not.

    rest: the other fields of `Model`.
    """

    def plain(tower: Tower) -> Tower:
        fields = {"dtype": "float32", "scan": False, "dropout": 0.0}
        return tower.clone(**{k: v for k, v in fields.items() if hasattr(tower, k)})

    def towers(tree: PyTree) -> PyTree:
        kept = {name: tree[name] for name in ("image", "text") if name in tree}
        kept = unstack_blocks(jax.tree.map(np.asarray, kept))
        return jax.tree.map(lambda x: np.asarray(x, np.float32), kept)

    return Model(
        image=plain(image),
        text=plain(text),
        params=towers(variables["params"]),
        batch_stats=towers(variables.get("batch_stats", {})),
        **rest,
    )


def vit_shape(shape: tuple[int, int, int, int], patch: int) -> dict[str, Any]:
    """The fields of a `ViT` of this width, depth, heads and MLP width: a named variant if one has
    that shape, else the sizes themselves."""
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
    """The ratio for which torch's models, which compute `int(width * ratio)`, get `mlp_width`."""
    found = mlp_width / width
    return found if int(width * found) == mlp_width else (mlp_width + 0.5) / width


def check_widths(model: Model) -> None:
    """Raises `NotExpressible` for projections to two different widths."""
    for tower in (model.image, model.text):
        if tower.embed_dim not in (0, model.width):
            raise NotExpressible(
                f"one tower is projected to {tower.embed_dim} channels, the other has {model.width}"
            )


def check_padding(model: Model, own: bool) -> None:
    """Raises `NotExpressible` if padding changes the features of a text and the export's tokenizer
    pads with another id than training did. transformers' CLIP tokenizer does; CLIP's own (`own`)
    does not. For a `TextTransformer`."""
    text = model.text
    counts = not text.causal or (text.pool == "last" and not text.mask_padding)
    if counts and model.words.kind == "clip_bpe" and not own:
        raise NotExpressible(
            "transformers' CLIP tokenizer pads with the end mark, training did with 0, and this "
            "text tower reads padding; a SentencePiece tokenizer has an id for it"
        )


@functools.cache
def shapes(tower: Tower) -> PyTree:
    """A tower's variables, abstract."""
    size = getattr(tower, "image_size", None)
    if size is None:
        example = jax.ShapeDtypeStruct((1, tower.context), jnp.int32)
    else:
        example = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    found = jax.eval_shape(tower.init, jax.random.key(0), example)
    return {k: v for k, v in found.items() if k in ("params", "batch_stats")}


def checked(model: Model, where: str) -> Model:
    """`model` itself. Raises `ConfigError` at `where` for the first array that its towers want in
    another shape, or that is missing."""
    for name in ("image", "text"):
        expected = traverse_util.flatten_dict(shapes(getattr(model, name)), sep="/")
        for path, x in expected.items():
            kind, _, rest = path.partition("/")
            found = model.flat.get(f"{kind}/{name}/{rest}")
            if found is None or found.shape != x.shape:
                raise ConfigError(
                    where,
                    f"{name}/{rest} of shape {None if found is None else found.shape}",
                    f"{x.shape}, of the model that the config describes",
                )
    return model


def cpu() -> jax.Device:
    """The host's device; the first device if JAX has no CPU backend."""
    try:
        return jax.devices("cpu")[0]
    except RuntimeError:
        return jax.devices()[0]
