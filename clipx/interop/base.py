"""What the formats share: two towers as arrays, and rules between our names and layouts and theirs.

A rule goes both ways and loses nothing, so that what was read can be written again to the bit.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Float

from clipx.errors import ConfigError, NotExpressible
from clipx.models.layers import Tower
from clipx.models.resnet import PLAIN, ResNet
from clipx.models.transformer import unstack_blocks
from clipx.models.vit import SIZES, ViT
from clipx.types import PyTree

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Words:
    """The ids of a model's texts, as its towers know them."""

    kind: Literal["clip_bpe", "sentencepiece", "wordpiece"]
    vocab_size: int
    context: int
    pad_id: int
    sot_id: int | None  # None where a text has no start mark
    eot_id: int
    mask_id: int | None = None  # of hidden words, which no text gives
    plain: bool = True  # OpenAI's byte pairs, cleaned as OpenAI cleans: what CLIP's tokenizers do

    @property
    def dropped(self) -> int | None:
        """The row of the embedding that a library's tokenizer has no id for: the mask's, unless it
        is one of BERT's own."""
        return None if self.kind == "wordpiece" else self.mask_id

    def without_mask(self) -> Words:
        """The same ids with the mask's row taken out: what stands behind it moves down by one."""
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
    """Two towers and what a score needs beside them, in float32 NumPy."""

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
        """Of the space that both towers are written into: the wider one's, zeros fill the other."""
        return max(out_width(self.image), out_width(self.text))


def make_model(image: Tower, text: Tower, variables: Mapping[str, PyTree], **rest: Any) -> Model:
    """A `Model` of float32 copies, from towers and variables as a run has them, scanned or not."""

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
    """The fields of a `ViT` of this width, depth, heads and MLP width: a variant where there is
    one of that shape, else its sizes."""
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


def tower_width(tower: Tower) -> int:
    """Channels of what a tower says before its projection."""
    if isinstance(tower, ViT):
        return tower.shape[0]
    if isinstance(tower, ResNet):
        blocks, width = tower.shape
        bottleneck = tower.modified or PLAIN[tower.variant][1]
        return width * 2 ** (len(blocks) - 1) * (4 if bottleneck else 1)
    return tower.width


def ratio(mlp_width: int, width: int) -> float:
    """What torch's models multiply by `width`, and cut to a whole number, for an MLP's width."""
    found = mlp_width / width
    return found if int(width * found) == mlp_width else (mlp_width + 0.5) / width


def out_width(tower: Tower) -> int:
    """Channels of what a tower says."""
    return tower.embed_dim or tower_width(tower)


def check_widths(model: Model) -> None:
    """Raises `NotExpressible` for projections into spaces of two widths. Without a projection a
    narrower tower is filled up with zeros."""
    for tower in (model.image, model.text):
        if tower.embed_dim not in (0, model.width):
            raise NotExpressible(
                f"one tower is projected to {tower.embed_dim} channels, the other has {model.width}"
            )


def check_padding(model: Model, own: bool) -> None:
    """Raises `NotExpressible` where what stands after a text changes what is said of it, and the
    tokenizer puts something else there than in training: CLIP's for transformers does, its own
    (`own`) does not."""
    text = model.text
    counts = not getattr(text, "causal", True) or (text.pool == "last" and not text.mask_padding)
    if counts and model.words.kind == "clip_bpe" and not own:
        raise NotExpressible(
            "transformers' CLIP tokenizer pads with the end mark, training did with 0, and this "
            "text tower reads padding; a SentencePiece tokenizer has an id for it"
        )


class Rule(NamedTuple):
    """Our arrays by path, theirs by name, and the functions between them."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    out: Callable[..., tuple[np.ndarray, ...]]
    back: Callable[..., tuple[np.ndarray, ...]]


def write(rules: Iterable[Rule], arrays: Arrays) -> Arrays:
    """Their arrays, contiguous, from ours. Raises `ValueError` if one of ours is left over."""
    left, found = dict(arrays), {}
    for rule in rules:
        made = rule.out(*(left.pop(path) for path in rule.ours))
        found |= {name: np.ascontiguousarray(x) for name, x in zip(rule.theirs, made, strict=True)}
    if left:
        raise ValueError(f"no rule for {', '.join(sorted(left))}")
    return found


# what libraries have stored at one time or other, and compute themselves
_NOT_LEARNED = ("num_batches_tracked", "position_ids", "attn_mask")
_NOT_LEARNED += ("input_resolution", "context_length", "vocab_size")  # in OpenAI's scripts


def read(rules: Iterable[Rule], arrays: Mapping[str, np.ndarray], where: str) -> PyTree:
    """{"params": ..., "batch_stats": ...} from their arrays, in float32. Raises `ConfigError` for
    the first array that is missing, and for one that no rule reads."""
    left, found = dict(arrays), {}
    for rule in rules:
        missing = [name for name in rule.theirs if name not in left and not _computed(name)]
        if missing:
            raise ConfigError(
                where,
                f"no {missing[0]}",
                f"the {len(list(arrays))} arrays of a model as its config describes it",
                "a whole file, or the config that belongs to it",
            )
        theirs = [left.pop(name, None) for name in rule.theirs]
        theirs = [x if x is None else np.asarray(x).astype(np.float32) for x in theirs]
        found |= dict(zip(rule.ours, rule.back(*theirs), strict=True))
    left = [name for name in left if not _computed(name)]
    if left:
        raise ConfigError(
            where,
            f"{left[0]}" + (f" and {len(left) - 1} more" if len(left) > 1 else ""),
            "no arrays beyond those of the model that the config describes",
        )
    return traverse_util.unflatten_dict(found, sep="/")


def _computed(name: str) -> bool:
    return name.endswith(_NOT_LEARNED)


def same(ours: str, theirs: str) -> Rule:
    """An array as it is."""
    return Rule((ours,), (theirs,), lambda x: (x,), lambda x: (x,))


def transposed(ours: str, theirs: str) -> Rule:
    """A dense kernel [in, out] as torch's weight [out, in]."""
    return Rule((ours,), (theirs,), lambda x: (x.T,), lambda x: (x.T,))


def dense(ours: str, theirs: str, bias: bool = True) -> list[Rule]:
    rules = [transposed(f"{ours}/kernel", f"{theirs}.weight")]
    return rules + [same(f"{ours}/bias", f"{theirs}.bias")] * bias


def norm(ours: str, theirs: str) -> list[Rule]:
    return [same(f"{ours}/scale", f"{theirs}.weight"), same(f"{ours}/bias", f"{theirs}.bias")]


def conv(ours: str, theirs: str) -> Rule:
    """A kernel [h, w, in, out] as torch's [out, in, h, w]."""
    return Rule(
        (f"{ours}/kernel",),
        (f"{theirs}.weight",),
        lambda x: (x.transpose(3, 2, 0, 1),),
        lambda x: (x.transpose(2, 3, 1, 0),),
    )


def batch_norm(tower: str, ours: str, theirs: str) -> list[Rule]:
    """A BatchNorm of `tower` with its running statistics, and torch's count of batches, unused."""
    stats = f"batch_stats/{tower}/{ours}"
    count = Rule((), (f"{theirs}.num_batches_tracked",), lambda: (np.int64(0),), lambda _: ())
    return [
        *norm(f"params/{tower}/{ours}", theirs),
        same(f"{stats}/mean", f"{theirs}.running_mean"),
        same(f"{stats}/var", f"{theirs}.running_var"),
        count,
    ]


def heads_in(
    ours: tuple[str, ...],
    theirs: tuple[str, ...],
    heads: int,
    parts: tuple[int, ...],
    before: str = ".",
) -> list[Rule]:
    """Projections to queries, keys and values. Ours are modules of `parts` projections each, with
    kernels [c, part, heads, head width] (no part axis where there is one), theirs are the names of
    as many weights [., c] as there are in `theirs`: one for each projection, or one for all.
    `before` stands before "weight" and "bias"."""

    def out(weight: bool, *arrays):
        rows = []
        for x, count in zip(arrays, parts):
            x = x.reshape(len(x) if weight else 1, count, -1)
            rows += list(x.transpose(1, 2, 0) if weight else x[0])
        return tuple(np.concatenate(part) for part in np.split(np.stack(rows), len(theirs)))

    def back(weight: bool, *arrays):
        rows = np.concatenate(arrays)
        rows = rows.reshape(sum(parts), -1, *rows.shape[1:])
        found, start = [], 0
        for count in parts:
            x = rows[start : start + count]
            x = x.transpose(2, 0, 1) if weight else x
            axes = (count,) * (count > 1)
            found.append(x.reshape(*x.shape[:1] * weight, *axes, heads, -1))
            start += count
        return tuple(found)

    def rule(leaf: str, ending: str, weight: bool) -> Rule:
        return Rule(
            tuple(f"{name}/{leaf}" for name in ours),
            tuple(name + ending for name in theirs),
            functools.partial(out, weight),
            functools.partial(back, weight),
        )

    return [rule("kernel", f"{before}weight", True), rule("bias", f"{before}bias", False)]


def heads_out(ours: str, theirs: str, heads: int) -> list[Rule]:
    """The projection of joined heads, kernel [heads, head width, c]."""
    kernel = Rule(
        (f"{ours}/kernel",),
        (f"{theirs}.weight",),
        lambda x: (x.reshape(-1, x.shape[-1]).T,),
        lambda x: (x.T.reshape(heads, -1, len(x)),),
    )
    return [kernel, same(f"{ours}/bias", f"{theirs}.bias")]


def words(path: str, theirs: str, dropped: int | None) -> Rule:
    """The embedding of words, without the row `dropped`."""

    def out(x):
        return (x if dropped is None else np.delete(x, dropped, axis=0),)

    return Rule((path,), (theirs,), out, lambda x: (x,))


def constant(theirs: str, make: Callable[[], np.ndarray]) -> Rule:
    """An array that theirs has and ours has not, and that changes nothing."""
    return Rule((), (theirs,), lambda: (make(),), lambda _: ())


def scaled(rules: Iterable[Rule], factor: float) -> list[Rule]:
    """The same rules, theirs being `factor` times ours."""
    if factor == 1:
        return list(rules)

    def times(function: Callable, by: float):
        return lambda *arrays: tuple(np.float32(by) * x for x in function(*arrays))

    return [
        rule._replace(out=times(rule.out, factor), back=times(rule.back, 1 / factor))
        for rule in rules
    ]


def identity(rows: int, columns: int) -> Callable[[], np.ndarray]:
    """A projection [rows, columns] that copies, or pads with zeros."""
    return lambda: np.eye(rows, columns, dtype=np.float32)


@functools.cache
def shapes(tower: Tower) -> PyTree:
    """What a tower's variables look like, abstract."""
    size = getattr(tower, "image_size", None)
    if size is None:
        example = jax.ShapeDtypeStruct((1, tower.context), jnp.int32)
    else:
        example = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    found = jax.eval_shape(tower.init, jax.random.key(0), example)
    return {k: v for k, v in found.items() if k in ("params", "batch_stats")}


def same_everywhere(model: Model, where: str) -> Model:
    """`model`, if its arrays are those of its towers; else `ConfigError` for the first one that is
    not."""
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
