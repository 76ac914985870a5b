"""The layers that towers are made of.

Compute runs in the tower's `dtype`; parameters are float32; normalisation and softmax run in
float32 at least. Dropout takes one key per row, so a row's mask depends on its own key alone.
"""

from __future__ import annotations

import difflib
import functools
import math
import re
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.nn import initializers
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int, Int32, Key

from clipx.errors import ConfigError
from clipx.models import cpu
from clipx.models.attention import attention
from clipx.models.tpu import PRODUCTS, add_bias, layer_norm
from clipx.types import Array, on_tpu

# "gelu" is exact; "quick_gelu" is CLIP's x * sigmoid(1.702 x); "gelu_tanh" is the tanh
# approximation, which big_vision's SigLIP and JAX's default use; "relu" is what NLLB's encoder uses
Activation = Literal["gelu", "quick_gelu", "gelu_tanh", "relu"]

# torch's default for linear and convolution kernels: uniform within 1/sqrt(fan_in)
torch_uniform = initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def torch_bias(fan_in: int) -> Callable:
    """torch's default initialiser for biases: uniform within 1/sqrt(fan_in)."""

    def init(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
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


def reduction_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype of sums, norms and softmax: float64 for float64, else float32."""
    return jnp.promote_types(dtype, jnp.float32)


def wide(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """`x` in float32 at least, the dtype in which heads and losses compute."""
    return x.astype(reduction_dtype(x.dtype))


def unit(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """Rows scaled to length 1, float32 at least. A row shorter than 1e-6 is divided by 1e-6, and so
    value and gradient are finite everywhere."""
    x = x.astype(reduction_dtype(x.dtype))
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-12))


def mean_tokens(
    x: Float[Array, "b n c"], valid: Bool[Array, "b n"] | None = None
) -> Float[Array, "b c"]:
    """The mean over the `valid` tokens (None: all), in `x`'s dtype, summed in float32 at least."""
    weight = jnp.ones(x.shape[:2], x.dtype) if valid is None else valid
    weight = weight[..., None].astype(reduction_dtype(x.dtype))
    return ((x * weight).sum(1) / weight.sum(1)).astype(x.dtype)


def text_lengths(
    ids: Int32[Array, "b n"], eot_id: int, pad_id: int, *, last: bool = False
) -> Int[Array, " b"]:
    """Tokens of each row that are not padding, 1 at least. Padding is what follows the first
    `eot_id` (`last`: the last one), or, in a row without one, the run of `pad_id`s at its end."""
    is_eot = ids == eot_id
    text_end = ids.shape[1] - (ids != pad_id)[:, ::-1].argmax(axis=1)
    first_end, last_end = is_eot.argmax(axis=1) + 1, ids.shape[1] - is_eot[:, ::-1].argmax(axis=1)
    return jnp.where(is_eot.any(axis=1), last_end if last else first_end, text_end)


class LayerNorm(nn.LayerNorm):
    """Layer normalisation with statistics in float32 at least, variance in two passes."""

    epsilon: float = 1e-5
    use_fast_variance: bool = False

    @nn.compact
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Float[Array, "*r c"]
    ) -> Float[Array, "*r c"]:
        if not on_tpu():
            return super().__call__(x)
        scale = self.param("scale", self.scale_init, x.shape[-1:], jnp.float32)
        bias = self.param("bias", self.bias_init, x.shape[-1:], jnp.float32)
        return layer_norm(x, scale, bias, self.epsilon, self.dtype)


class BatchNorm(nn.Module):
    """Batch normalisation over every axis but the last, like torch's BatchNorm.

    In training the statistics are those of the given rows: in the global view, those of the
    complete batch on any mesh. The collection `batch_stats` holds the running mean and the running
    unbiased variance (flax keeps the biased one). Each call in training updates them with weight
    `momentum`; the collection must be mutable then.
    """

    dtype: str = "float32"
    epsilon: float = 1e-5
    momentum: float = 0.1  # weight of the new statistics (torch's convention)
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
                    updated = (1 - self.momentum) * running.value + self.momentum * new
                    running.value = jax.lax.stop_gradient(updated).astype(running.value.dtype)
        scale = self.param("scale", self.scale_init, (width,), jnp.float32)
        bias = self.param("bias", initializers.zeros, (width,), jnp.float32)
        gain = jax.lax.rsqrt(var + self.epsilon) * scale
        return ((wide - mean) * gain + bias).astype(self.dtype)


def drop(
    x: Float[Array, "b n c"],
    rate: float,
    keys: Key[Array, " b"] | None,
    index: int | Int[Array, ""],
) -> Float[Array, "b n c"]:
    """`x` after inverted dropout; `keys=None` drops nothing. Row i's mask depends on `keys[i]` and
    `index` alone; `index` tells the dropouts of a tower apart."""
    if not rate or keys is None:
        return x
    keep = jax.vmap(
        lambda key: jax.random.bernoulli(jax.random.fold_in(key, index), 1 - rate, x.shape[1:])
    )(keys)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def dropout_keys(
    rate: float, train: bool, keys: Key[Array, " b"] | None
) -> Key[Array, " b"] | None:
    """`keys` if dropout is on, else None. Raises `ValueError` if it is on and `keys` is None."""
    if not (train and rate):
        return None
    if keys is None:
        raise ValueError(f"dropout of {rate} in training needs `keys`, one per row")
    return keys


class Lora(NamedTuple):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) of the dense layers of a tower's blocks:
    `alpha / rank` times the product of two thin matrices is added to each kernel."""

    rank: int
    alpha: float


def activate(x: Float[Array, "*b"], name: Activation) -> Float[Array, "*b"]:
    """The nonlinearity `name` of x."""
    if name == "quick_gelu":
        return x * jax.nn.sigmoid(1.702 * x)
    if name == "relu":
        return jax.nn.relu(x)
    return jax.nn.gelu(x, approximate=name == "gelu_tanh")


class MLP(nn.Module):
    """Two dense layers with a nonlinearity between."""

    width: int
    activation: Activation
    dtype: str
    kernel_inits: tuple[Any, Any] = (torch_uniform, torch_uniform)
    lora: Lora | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        def dense(name: str, x: Array, width: int, kernel_init: Callable) -> Array:
            bias_init = torch_bias(x.shape[-1])
            return Affine((width,), self.dtype, kernel_init, bias_init, lora=self.lora, name=name)(
                x
            )

        y = checkpoint_name(dense("fc", x, self.width, self.kernel_inits[0]), PRODUCTS)
        y = activate(y, self.activation)
        return dense("proj", y, x.shape[-1], self.kernel_inits[1])


class Affine(nn.Module):
    """A linear layer from the last `inputs` axes of x to `shape`, with DenseGeneral's parameters:
    `kernel` [*inputs, *shape] and, with `use_bias`, `bias` [*shape]. With `lora` there are `lora_a`
    [*inputs, rank], as random as torch's kernels, and `lora_b` [rank, *shape], which starts at
    zero.

    On TPUs it multiplies flattened rows, which gives the layout that the attention kernel takes.
    """

    shape: tuple[int, ...]
    dtype: str
    kernel_init: Any
    bias_init: Any = initializers.zeros
    inputs: int = 1  # number of axes
    lora: Lora | None = None
    use_bias: bool = True

    @nn.compact
    def __call__(
        self, x: Float[Array, "*b"], *, order: tuple[int, ...] | None = None
    ) -> Float[Array, "*rows"]:
        """[..., *shape]; on TPUs with `order`, the axes of `shape` in that order and flattened."""
        lead, inputs = x.shape[: -self.inputs], x.shape[-self.inputs :]
        fan_out = math.prod(self.shape)

        def param(name: str, init: Callable, *shape: tuple[int, ...]) -> Array:
            """A parameter with the axes of all `shape`s, initialised with one axis for each."""
            flat = tuple(map(math.prod, shape))

            def shaped(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
                return init(key, flat, dtype).reshape(shape)

            return self.param(name, shaped, sum(shape, ()), jnp.float32).astype(self.dtype)

        x = x.astype(self.dtype)
        kernel = param("kernel", self.kernel_init, inputs, self.shape)
        bias = param("bias", self.bias_init, self.shape) if self.use_bias else None
        low = None  # x in the adapter's few channels, and the kernel from these to the output
        if self.lora is not None:
            rank = (self.lora.rank,)
            a = param("lora_a", torch_uniform, inputs, rank)
            b = param("lora_b", initializers.zeros, rank, self.shape)
            low = jnp.tensordot(x, a, self.inputs) * (self.lora.alpha / self.lora.rank), b
        if not on_tpu():
            y = cpu.product(x, kernel, self.inputs)
            y = y if bias is None else y + bias
            return y if low is None else y + jnp.tensordot(*low, 1)
        if order is not None and bias is not None:
            bias = bias.transpose(order)

        def product(x: Array, kernel: Array) -> Array:
            """Rows of x times a kernel of `shape` outputs, both flattened."""
            kernel = kernel.reshape(-1, *self.shape)
            if order is not None:
                kernel = kernel.transpose(0, *(i + 1 for i in order))
            # without the barrier the compiler gives x the layout that suits the kernel's many axes
            kernel = jax.lax.optimization_barrier(kernel.reshape(-1, fan_out))
            return jnp.dot(x.reshape(-1, len(kernel)), kernel)

        y = product(x, kernel)
        y = y if bias is None else add_bias(y, bias.reshape(-1))
        if low is not None:
            y = y + product(*low)
        return y.reshape(*lead, *(self.shape if order is None else (fan_out,)))


class PoolAttention(nn.Module):
    """Multi-head attention of query tokens over all tokens, without an output projection. Kernels:
    `q` [d, heads, head width], `kv` [c, 2, heads, head width]; the heads' widths sum to d."""

    heads: int
    dtype: str
    kernel_init: Any
    bias_init: Any = initializers.zeros

    @nn.compact
    def __call__(
        self, queries: Float[Array, "b m d"], tokens: Float[Array, "b n c"]
    ) -> Float[Array, "b m d"]:
        shape = (self.heads, queries.shape[-1] // self.heads)
        dense = functools.partial(
            nn.DenseGeneral,
            dtype=self.dtype,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            dot_general=cpu.dot_general,
        )
        q = dense(shape, name="q")(queries)
        kv = dense((2, *shape), name="kv")(tokens)
        return attention(q, kv[:, :, 0], kv[:, :, 1]).reshape(queries.shape)
