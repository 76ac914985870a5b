"""What the towers are made of, and `Tower`, what every one of them is.

Compute runs in the tower's `dtype`; parameters are float32; normalisation and softmax run in
float32 at least. Dropout is drawn from one key per row, so a row's mask depends on nothing else.
"""

from __future__ import annotations

import difflib
import functools
import math
import re
from collections.abc import Iterable
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn import initializers
from jaxtyping import Array, Bool, Float, Int, Int32, Key

from clipx.errors import ConfigError
from clipx.models.attention import attention
from clipx.models.tpu import add_bias, layer_norm, on_tpu
from clipx.types import Encoded, PyTree

# exact; CLIP's x * sigmoid(1.702 x); by a tanh, as big_vision's SigLIP and JAX's default have it
Activation = Literal["gelu", "quick_gelu", "gelu_tanh"]

# torch's default for linear and convolution kernels: uniform within 1/sqrt(fan_in)
torch_uniform = initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def torch_bias(fan_in: int):
    """torch's default initialiser for biases: uniform within 1/sqrt(fan_in)."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -1, 1) * fan_in**-0.5

    return init


def check(ok: bool, where: str, found: Any, expected: str, fix: str = "") -> None:
    """Raises `ConfigError` unless `ok`."""
    if not ok:
        raise ConfigError(where, str(found), expected, fix)


def check_name(where: str, name: str, known: Iterable[str]) -> None:
    """Raises `ConfigError`, with the nearest known name, unless `name` is known."""
    known = tuple(known)
    if name not in known:
        plain = {re.sub(r"\W", "", k).casefold(): k for k in known}
        near = difflib.get_close_matches(re.sub(r"\W", "", name).casefold(), plain, n=1, cutoff=0)
        fix = f"did you mean {plain[near[0]]!r}?"
        raise ConfigError(where, repr(name), "one of " + ", ".join(known), fix)


def reduction_dtype(dtype) -> jnp.dtype:
    """float64 for float64, else float32: what sums, norms and softmax are computed in."""
    return jnp.promote_types(dtype, jnp.float32)


def wide(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """`x` in float32 at least, which is what heads and losses compute in."""
    return x.astype(reduction_dtype(x.dtype))


def unit(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """Rows of length 1, float32 at least. Rows shorter than 1e-6 stay shorter than 1, so that value
    and gradient are finite everywhere."""
    x = x.astype(reduction_dtype(x.dtype))
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-12))


def mean_tokens(
    x: Float[Array, "b n c"], valid: Bool[Array, "b n"] | None = None
) -> Float[Array, "b c"]:
    """The mean over (valid) tokens, in `x`'s dtype, summed in float32 at least."""
    weight = jnp.ones(x.shape[:2], x.dtype) if valid is None else valid
    weight = weight[..., None].astype(reduction_dtype(x.dtype))
    return ((x * weight).sum(1) / weight.sum(1)).astype(x.dtype)


def text_lengths(ids: Int32[Array, "b n"], eot_id: int, pad_id: int) -> Int[Array, " b"]:
    """Tokens of each row that are no padding, 1 at least. Padding is what follows the first
    `eot_id`, or, in a row without one, the `pad_id`s at its end."""
    is_eot = ids == eot_id
    text_end = ids.shape[1] - (ids != pad_id)[:, ::-1].argmax(axis=1)
    return jnp.where(is_eot.any(axis=1), is_eot.argmax(axis=1) + 1, text_end)


class PositionTable(NamedTuple):
    """Where a tower keeps learned positions that can be resized for other inputs."""

    path: tuple[str, ...]  # of the table [rows, channels], in the tower's `params`
    first: int  # rows in front of the positions, a class token's: they have no place
    shape: tuple[int, ...]  # what the other rows cover: (side, side) patches, or (tokens,)


class Tower(nn.Module):
    """Base of every tower: pictures or token ids in, `Encoded` out. Its fields are config keys.

    `__call__(x, *, train=False, keys=None) -> Encoded` fills every field; row i of each comes from
    row i of `x` and `keys[i]` (BatchNorm in training excepted). `keys` are typed PRNG keys, needed
    only when `train` and `dropout`.

    Code outside of `clipx/models/` never tests which tower it has. A tower declares what others
    need to know: `from_tokenizer`, `needs_start_mark`, `backbone_width`, `position_table` and
    `unseen_settings`. None of these is a config key.
    """

    # fields that a config's tokenizer gives, and its tower's section may not
    from_tokenizer: ClassVar[tuple[str, ...]] = ()
    # whether the tower is read out at the start mark of a text, so that every text must have one
    needs_start_mark: ClassVar[bool] = False

    embed_dim: int = 512  # width of the shared space; 0: no projection, raw is the backbone
    dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16"  # of compute; parameters: float32

    def __post_init__(self):
        self.check()
        super().__post_init__()

    @nn.nowrap
    def check(self) -> None:
        """Raises `ConfigError` for fields that cannot go together. Runs on every Linen clone."""
        check(self.embed_dim >= 0, self.at("embed_dim"), self.embed_dim, "0 or more")

    @property
    def backbone_width(self) -> int:
        """Channels of `Encoded.backbone`."""
        raise TypeError(f"{type(self).__name__} declares no backbone_width")

    @property
    def output_width(self) -> int:
        """Channels of `Encoded.raw`: of the projection, or of the backbone without one."""
        return self.embed_dim or self.backbone_width

    @property
    def position_table(self) -> PositionTable | None:
        """The positions that change with the size of pictures or the length of texts; None where
        any size that the config allows takes the same array."""
        return None

    @property
    def unseen_settings(self) -> dict[str, Any]:
        """The settings that change the output and leave the shapes of arrays as they are. Models
        that differ in one of them are different models, whatever their arrays."""
        return {}

    @nn.nowrap
    def at(self, field: str) -> str:
        """Where a config error about `field` is."""
        return f"{type(self).__name__}.{field}"

    @nn.nowrap
    def pretrained(self) -> dict[str, PyTree]:
        """The entries of this tower's `params` that training starts from in place of random ones;
        {} for a tower that reads no file."""
        return {}

    def encoded(
        self, pooled: Float[Array, "b c"], tokens: Float[Array, "b n c"], *, bias: bool = False
    ) -> Encoded:
        """The four fields, through a projection that starts as N(0, 1/c) (CLIP, clip/model.py).
        A bias starts as torch's linear layers start it."""
        raw = pooled
        if self.embed_dim:
            width = pooled.shape[-1]
            raw = nn.Dense(
                self.embed_dim,
                use_bias=bias,
                dtype=self.dtype,
                kernel_init=initializers.normal(width**-0.5),
                bias_init=torch_bias(width),
                name="projection",
            )(pooled)
        return Encoded(unit=unit(raw), raw=raw, backbone=pooled, tokens=tokens)


class LayerNorm(nn.LayerNorm):
    """Layer normalisation with statistics in float32 at least, variance in two passes."""

    epsilon: float = 1e-5
    use_fast_variance: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*r c"]) -> Float[Array, "*r c"]:
        if not on_tpu():
            return super().__call__(x)
        scale = self.param("scale", self.scale_init, x.shape[-1:], jnp.float32)
        bias = self.param("bias", self.bias_init, x.shape[-1:], jnp.float32)
        return layer_norm(x, scale, bias, self.epsilon, self.dtype)


class BatchNorm(nn.Module):
    """Batch normalisation over every axis but the last, as torch's BatchNorm.

    In training the statistics are those of the rows given, which in the global view is the whole
    batch on any mesh. The collection `batch_stats` holds the running mean and the running unbiased
    variance (flax keeps the biased one), moved by 0.1 a call; it must be mutable in training.
    """

    dtype: str = "float32"
    epsilon: float = 1e-5
    momentum: float = 0.1  # weight of the new statistics, torch's convention
    scale_init: Any = initializers.ones

    @nn.compact
    def __call__(self, x: Float[Array, "... c"], *, train: bool = False) -> Float[Array, "... c"]:
        width = x.shape[-1]
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (width,), jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, (width,), jnp.float32)
        wide = x.astype(reduction_dtype(x.dtype))
        mean, var = running_mean.value, running_var.value
        if train:
            axes = tuple(range(x.ndim - 1))
            rows = x.size // width
            mean = wide.mean(axes)
            var = jnp.square(wide - mean).mean(axes)
            if not self.is_initializing():
                unbiased = var * (rows / max(rows - 1, 1))
                for running, new in ((running_mean, mean), (running_var, unbiased)):
                    moved = (1 - self.momentum) * running.value + self.momentum * new
                    running.value = jax.lax.stop_gradient(moved).astype(running.value.dtype)
        scale = self.param("scale", self.scale_init, (width,), jnp.float32)
        bias = self.param("bias", initializers.zeros, (width,), jnp.float32)
        gain = jax.lax.rsqrt(var + self.epsilon) * scale
        return ((wide - mean) * gain + bias).astype(self.dtype)


def drop(
    x: Float[Array, "b n c"], rate: float, keys: Key[Array, " b"] | None, index
) -> Float[Array, "b n c"]:
    """`x` with inverted dropout; row i's mask comes from `keys[i]` and `index` alone."""
    if not rate or keys is None:
        return x
    keep = jax.vmap(
        lambda key: jax.random.bernoulli(jax.random.fold_in(key, index), 1 - rate, x.shape[1:])
    )(keys)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def dropout_keys(
    rate: float, train: bool, keys: Key[Array, " b"] | None
) -> Key[Array, " b"] | None:
    """`keys` where dropout is on, else None. Raises `ValueError` where it is on without keys."""
    if not (train and rate):
        return None
    if keys is None:
        raise ValueError(f"dropout of {rate} in training needs `keys`, one per row")
    return keys


class MLP(nn.Module):
    """Two dense layers with a GELU between."""

    width: int
    activation: Activation
    dtype: str
    kernel_inits: tuple[Any, Any] = (torch_uniform, torch_uniform)

    @nn.compact
    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        def dense(name, x, width, kernel_init):
            return Affine((width,), self.dtype, kernel_init, torch_bias(x.shape[-1]), name=name)(x)

        y = dense("fc", x, self.width, self.kernel_inits[0])
        if self.activation == "quick_gelu":
            y = y * jax.nn.sigmoid(1.702 * y)
        else:
            y = jax.nn.gelu(y, approximate=self.activation == "gelu_tanh")
        return dense("proj", y, x.shape[-1], self.kernel_inits[1])


class Affine(nn.Module):
    """A linear layer from the last axes of its input to `shape`, its parameters those of a
    DenseGeneral: `kernel` [*inputs, *shape] and `bias` [*shape].

    On TPUs rows are flattened, for the layout that attention's kernel takes.
    """

    shape: tuple[int, ...]
    dtype: str
    kernel_init: Any
    bias_init: Any = initializers.zeros
    inputs: int = 1  # axes

    @nn.compact
    def __call__(
        self, x: Float[Array, "*b"], *, order: tuple[int, ...] | None = None
    ) -> Float[Array, "*rows"]:
        """[..., *shape]; with `order`, the axes of `shape` in that order and flattened."""
        lead, inputs = x.shape[: -self.inputs], x.shape[-self.inputs :]
        fan_in, fan_out = math.prod(inputs), math.prod(self.shape)

        def kernel_init(key, shape, dtype):
            return self.kernel_init(key, (fan_in, fan_out), dtype).reshape(shape)

        def bias_init(key, shape, dtype):
            return self.bias_init(key, (fan_out,), dtype).reshape(shape)

        kernel = self.param("kernel", kernel_init, (*inputs, *self.shape), jnp.float32)
        bias = self.param("bias", bias_init, self.shape, jnp.float32)
        x, kernel, bias = (a.astype(self.dtype) for a in (x, kernel, bias))
        if not on_tpu():
            return jnp.tensordot(x, kernel, self.inputs) + bias
        kernel = kernel.reshape(fan_in, *self.shape)
        if order is not None:
            kernel = kernel.transpose(0, *(i + 1 for i in order))
            bias = bias.transpose(order)
        # behind a barrier, or the compiler gives x the layout that suits the kernel's many axes
        kernel = jax.lax.optimization_barrier(kernel.reshape(fan_in, fan_out))
        y = jnp.dot(x.reshape(-1, fan_in), kernel)
        y = add_bias(y, bias.reshape(-1))
        return y.reshape(*lead, *(self.shape if order is None else (fan_out,)))


class PoolAttention(nn.Module):
    """Attention of query tokens over all tokens, heads joined, before any output projection:
    `q` [c, heads, head width], `kv` [c, 2, heads, head width]."""

    heads: int
    dtype: str
    kernel_init: Any
    bias_init: Any = initializers.zeros

    @nn.compact
    def __call__(
        self, queries: Float[Array, "b m c"], tokens: Float[Array, "b n c"]
    ) -> Float[Array, "b m c"]:
        shape = (self.heads, tokens.shape[-1] // self.heads)
        dense = functools.partial(
            nn.DenseGeneral,
            dtype=self.dtype,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
        )
        q = dense(shape, name="q")(queries)
        kv = dense((2, *shape), name="kv")(tokens)
        return attention(q, kv[:, :, 0], kv[:, :, 1]).reshape(queries.shape)
