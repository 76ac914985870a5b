"""BERT as a text tower, with its weights from a Hugging Face checkpoint if wanted."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.nn import initializers
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int32, Key

from clipx.config.ranges import Count, CountOrZero, Depth, Rate, Ratio, Width
from clipx.errors import ConfigError
from clipx.models.base import Tower
from clipx.models.layers import (
    Affine,
    LayerNorm,
    Lora,
    check,
    drop,
    dropout_keys,
    reduction_dtype,
    text_lengths,
)
from clipx.types import Array, PyTree, constrain_rows

_EPS = 1e-12
_normal = initializers.normal(0.02)
_Norm = functools.partial(LayerNorm, epsilon=_EPS)


class BertAttention(nn.Module):
    """Self-attention with dropout on the attention weights.

    Parameters have the layout of `transformer.SelfAttention`.
    """

    heads: int
    dropout: float
    dtype: str
    lora: Lora | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n c"],
        valid: Bool[Array, "b n"],
        keys: Key[Array, " b"] | None,
        index: int,
    ) -> Float[Array, "b n c"]:
        width, (rows, length) = x.shape[-1], valid.shape
        shape = (3, self.heads, width // self.heads)
        dense = functools.partial(Affine, dtype=self.dtype, kernel_init=_normal, lora=self.lora)
        q, k, v = jnp.moveaxis(dense(shape, name="qkv")(x), 2, 0)
        wide = reduction_dtype(x.dtype)
        logits = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=wide)
        seen = jnp.where(valid[:, None, None], logits * shape[-1] ** -0.5, -jnp.inf)
        weights = nn.softmax(seen).reshape(rows, -1, length)
        weights = drop(weights, self.dropout, keys, index).reshape(logits.shape).astype(v.dtype)
        y = jnp.einsum("bhts,bshd->bthd", weights, v)
        return dense((width,), inputs=2, name="out")(y)


class BertMLP(nn.Module):
    width: int
    dtype: str
    lora: Lora | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        dense = functools.partial(Affine, dtype=self.dtype, kernel_init=_normal, lora=self.lora)
        y = nn.gelu(dense((self.width,), name="fc")(x), approximate=False)
        return dense((x.shape[-1],), name="proj")(y)


class BertBlock(nn.Module):
    """One post-LN block: the norm comes after the sum."""

    heads: int
    mlp_width: int
    dropout: float
    dtype: str
    lora: Lora | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n c"],
        valid: Bool[Array, "b n"],
        keys: Key[Array, " b"] | None,
        index: int,
    ) -> Float[Array, "b n c"]:
        attention = BertAttention(self.heads, self.dropout, self.dtype, self.lora, name="attn")
        y = drop(attention(x, valid, keys, index), self.dropout, keys, index + 1)
        x = _Norm(dtype=self.dtype, name="ln_attn")(x + y)
        y = BertMLP(self.mlp_width, self.dtype, self.lora, name="mlp")(x)
        y = drop(y, self.dropout, keys, index + 2)
        return constrain_rows(_Norm(dtype=self.dtype, name="ln_mlp")(x + y))


class BERT(Tower):
    """BERT-base (Devlin et al. 2019, arXiv 1810.04805) with its pooler, of any depth and size.

    `backbone` of the result is the pooler's output, tanh(W x + b) of the first token, which must be
    the tokenizer's start mark. `tokens` are the last layer's. Padding is masked in attention: the
    tokens after the first `eot_id`, or, in a row without one, the `pad_id`s at its end. Texts may
    be shorter than `positions`. Every token has the first segment type. Dropout acts on embeddings,
    on attention weights, and on the output of both halves of a block.

    `init_from`: a safetensors file in the layout of Hugging Face's `bert-base-uncased`. A shallower
    tower takes the first layers of the file.
    """

    from_tokenizer: ClassVar[tuple[str, ...]] = ("vocab_size", "context", "eot_id", "pad_id")
    needs_start_mark: ClassVar[bool] = True
    adaptable: ClassVar[bool] = True

    vocab_size: Count = 30522
    context: Count = 30  # tokens per text, as the tokenizer makes them
    positions: Count = 512  # rows of the position table
    width: Width = 768
    depth: Depth = 12
    heads: Width = 12
    mlp_ratio: Ratio = 4.0
    eot_id: CountOrZero = 102
    pad_id: CountOrZero = 0
    dropout: Rate = 0.1

    @nn.nowrap
    def check(self) -> None:
        super().check()
        check(
            self.width % self.heads == 0,
            self.at("heads"),
            f"{self.heads} heads for a width of {self.width}",
            "a number that divides the width",
        )
        check(
            self.positions >= self.context,
            self.at("positions"),
            f"{self.positions}, for texts of {self.context} tokens",
            f"at least {self.context}",
        )

    @property
    def backbone_width(self) -> int:
        """The width of a block."""
        return self.width

    @property
    def unseen_settings(self) -> dict[str, Any]:
        """The heads. `positions` does not change the output: texts use the table's first rows."""
        return {"heads": self.heads}

    @nn.compact
    def features(
        self, x: Int32[Array, "b n"], *, train: bool = False, keys: Key[Array, " b"] | None = None
    ) -> tuple[Float[Array, "b c"], Float[Array, "b n c"]]:
        ids, length = x, x.shape[1]
        if length > self.positions:
            raise ValueError(
                f"{self.at('positions')}={self.positions}, but the texts {x.shape} are longer"
            )
        keys = dropout_keys(self.dropout, train, keys)
        valid = jnp.arange(length) < text_lengths(ids, self.eot_id, self.pad_id)[:, None]

        def table(name: str, rows: int, init: Callable = _normal) -> Array:
            return self.param(name, init, (rows, self.width), jnp.float32)

        def zero_padding(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
            return _normal(key, shape, dtype).at[self.pad_id].set(0)

        # Summed before the cast to `dtype`. An id outside the table gives NaN, not another token.
        x = jnp.take(table("token_embedding", self.vocab_size, zero_padding), ids, axis=0)
        x = x + table("positional_embedding", self.positions)[:length]
        x = x + table("type_embedding", 2)[0]
        x = _Norm(dtype=self.dtype, name="ln_embedding")(x)
        x = drop(x, self.dropout, keys, 0)
        for i in range(self.depth):
            x = BertBlock(
                self.heads,
                round(self.width * self.mlp_ratio),
                self.dropout,
                self.dtype,
                self.lora,
                name=f"block_{i}",
            )(x, valid, keys, 1 + 3 * i)
        pooler = nn.Dense(self.width, dtype=self.dtype, kernel_init=_normal, name="pooler")
        return jnp.tanh(pooler(x[:, 0])), x

    @nn.nowrap
    def pretrained(self) -> dict[str, PyTree]:
        """The entries of `params` that `init_from` holds, as float32 NumPy arrays; {} without it.

        Training starts from them instead of random values. The projection is not among them. Raises
        `ConfigError` if the file is missing or is not a safetensors file, and for the first array
        that is missing or has another shape.
        """
        if not self.init_from:
            return {}
        with _open(self.init_from) as file:
            return _read(functools.partial(_get, self.init_from, file), self)


_WHERE = "config.text.init_from"


def _open(path: str) -> Any:  # a context manager of safetensors, which has no public type
    import safetensors

    try:
        return safetensors.safe_open(pathlib.Path(path).expanduser(), framework="numpy")
    except OSError as error:
        found = f"{path!r} ({error.strerror or error})"
        raise ConfigError(_WHERE, found, "a safetensors file that can be read") from None
    except safetensors.SafetensorError as error:
        raise ConfigError(_WHERE, f"{path!r} ({error})", "a safetensors file") from None


def _get(path: str, file: Any, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The array `name` of the file, in float32.

    The file may have the name with or without the prefix "bert.", and, if it is old, "gamma" and
    "beta" for the weight and bias of a norm.
    """
    names = [name]
    if "LayerNorm" in name:
        names.append(name.replace(".weight", ".gamma").replace(".bias", ".beta"))
    names += ["bert." + n for n in names]
    present = sorted(set(names) & set(file.keys()))
    if not present:
        raise ConfigError(
            _WHERE,
            f"no array {name} in {path!r}",
            "a BERT with Hugging Face's names and at least config.text.depth layers",
        )
    file_shape = tuple(file.get_slice(present[0]).get_shape())
    if file_shape != shape:
        only_vocabulary = name.endswith("word_embeddings.weight") and file_shape[1:] == shape[1:]
        raise ConfigError(
            _WHERE,
            f"{present[0]} of shape {file_shape} in {path!r}",
            f"shape {shape}, as the config describes the tower",
            f"config.tokenizer.vocab_size={file_shape[0]}, with the vocabulary of that file"
            if only_vocabulary
            else "",
        )
    return file.get_tensor(present[0]).astype(np.float32)


def _read(get: Callable[[str, tuple[int, ...]], np.ndarray], tower: BERT) -> dict[str, PyTree]:
    """The arrays of a Hugging Face file, in the names and layouts of `tower`'s params."""
    c, hidden = tower.width, round(tower.width * tower.mlp_ratio)
    heads = (tower.heads, c // tower.heads)

    def norm(name: str) -> dict[str, np.ndarray]:
        return {"scale": get(f"{name}.weight", (c,)), "bias": get(f"{name}.bias", (c,))}

    def dense(name: str, inputs: int = c, outputs: int = c) -> dict[str, np.ndarray]:
        kernel = get(f"{name}.weight", (outputs, inputs)).T
        return {"kernel": kernel, "bias": get(f"{name}.bias", (outputs,))}

    def block(name: str) -> dict[str, PyTree]:
        q, k, v = (dense(f"{name}.attention.self.{n}") for n in ("query", "key", "value"))
        out = dense(f"{name}.attention.output.dense")
        kernel = np.stack([x["kernel"].reshape(c, *heads) for x in (q, k, v)], axis=1)
        bias = np.stack([x["bias"].reshape(heads) for x in (q, k, v)])
        return {
            "attn": {
                "qkv": {"kernel": kernel, "bias": bias},
                "out": {"kernel": out["kernel"].reshape(*heads, c), "bias": out["bias"]},
            },
            "ln_attn": norm(f"{name}.attention.output.LayerNorm"),
            "mlp": {
                "fc": dense(f"{name}.intermediate.dense", c, hidden),
                "proj": dense(f"{name}.output.dense", hidden, c),
            },
            "ln_mlp": norm(f"{name}.output.LayerNorm"),
        }

    return {
        "token_embedding": get("embeddings.word_embeddings.weight", (tower.vocab_size, c)),
        "positional_embedding": get("embeddings.position_embeddings.weight", (tower.positions, c)),
        "type_embedding": get("embeddings.token_type_embeddings.weight", (2, c)),
        "ln_embedding": norm("embeddings.LayerNorm"),
        **{f"block_{i}": block(f"encoder.layer.{i}") for i in range(tower.depth)},
        "pooler": dense("pooler.dense"),
    }
