"""Heads on the towers' features: critics that score pairs, discriminators, and projections.

All heads compute in the dtype of their inputs, which are float32 at least. In a head with
BatchNorm rows depend on each other, so it belongs in an objective's `loss`, not in `embed`.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn import initializers
from jax.typing import DTypeLike
from jaxtyping import Float, Shaped

from clipx.errors import ConfigError
from clipx.models.layers import (
    BatchNorm,
    LayerNorm,
    torch_bias,
    torch_uniform,
    unit,
    wide,
)
from clipx.types import Array, constrain_rows

_TILE = 2**22  # hidden units of one tile of pairs: 16 MiB of float32


def _dense(width: int, fan_in: int, **options: Any) -> nn.Dense:
    """A dense layer with torch's initialisation, in the dtype of its input."""
    return nn.Dense(
        width, **{"kernel_init": torch_uniform, "bias_init": torch_bias(fan_in)} | options
    )


def _noisy_identity(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
    """Ones on the main diagonal, uniform in [-0.01, 0.01) elsewhere."""
    return jnp.where(
        jnp.eye(*shape, dtype=bool), 1, jax.random.uniform(key, shape, dtype, -0.01, 0.01)
    )


def next_row(x: Shaped[Array, "b ..."], groups: int = 1) -> Shaped[Array, "b ..."]:
    """`x` with row i + 1 in the place of row i, cyclically within each run of b/groups rows."""
    if groups == 1:
        return constrain_rows(jnp.roll(x, -1, axis=0))
    grouped = x.reshape(groups, -1, *x.shape[1:])
    return constrain_rows(jnp.roll(grouped, -1, axis=1).reshape(x.shape))


class GroupedBatchNorm(BatchNorm):
    """BatchNorm with statistics per run of b/groups rows, as on `groups` devices without SyncBN.

    The running statistics are those of the first group, as torch's DDP keeps those of rank 0.
    """

    groups: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "b c"], *, train: bool = False) -> Float[Array, "b c"]:
        if not train or self.groups == 1:
            return super().__call__(x, train=train)
        x = x.reshape(self.groups, -1, x.shape[-1])
        first, rest = super().__call__(x[0], train=True), x[1:]
        scale, bias = (self.get_variable("params", name) for name in ("scale", "bias"))
        mean, var = (f(rest, axis=1, keepdims=True) for f in (jnp.mean, jnp.var))
        rest = (rest - mean) * (jax.lax.rsqrt(var + self.epsilon) * scale) + bias
        rows = jnp.concatenate([first[None], rest.astype(first.dtype)])
        return constrain_rows(rows.reshape(-1, rows.shape[-1]))


class Projection(nn.Module):
    """A side of the dot critic: LayerNorm(W2 relu(BatchNorm(W1 x)) + Ws x), not unit-normalised.

    The shortcut Ws starts as a noisy identity. The momentum of the running statistics is 1 - 0.9²,
    because CLIP-Lite's code calls a critic twice per step on the same rows: once for the right
    pairs and once for the wrong ones.

    Raises `ConfigError` for features that are wider than `width`.
    """

    width: int
    groups: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "b c"], *, train: bool = False) -> Float[Array, "b d"]:
        channels = x.shape[-1]
        if channels > self.width:
            raise ConfigError(
                "config.objective.width",
                f"{self.width}, for features of {channels} channels",
                f"at least {channels}, because the critic starts as a copy of its features",
            )
        norm = GroupedBatchNorm(str(x.dtype), momentum=1 - 0.9**2, groups=self.groups, name="norm")
        y = nn.relu(norm(_dense(self.width, channels, use_bias=False, name="fc")(x), train=train))
        y = _dense(self.width, self.width, name="proj")(y)
        shortcut = _dense(self.width, channels, kernel_init=_noisy_identity, name="shortcut")(x)
        return LayerNorm(name="ln")(y + shortcut)


class DotCritic(nn.Module):
    """CLIP-Lite's critic: exp(logit_scale) times the cosine of two separate projections."""

    width: int
    groups: int = 1

    def setup(self):
        self.left = Projection(self.width, self.groups)
        self.right = Projection(self.width, self.groups)
        self.logit_scale = self.param(
            "logit_scale", initializers.constant(math.log(1 / 0.07)), (), jnp.float32
        )

    def __call__(
        self, a: Float[Array, "b c"], b: Float[Array, "b e"], *, train: bool = False
    ) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
        """The scores of a_i with b_i, and of a_i with the next row of b in its group."""
        a, b = unit(self.left(a, train=train)), unit(self.right(b, train=train))
        scale = jnp.exp(self.logit_scale)
        return scale * jnp.sum(a * b, axis=-1), scale * jnp.sum(a * next_row(b, self.groups), -1)


class _Perceptron(nn.Module):
    """ReLU, dense layer, ReLU, dense layer to one number."""

    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b"]:
        x = _dense(self.width, x.shape[-1], name="fc")(nn.relu(x))
        return _dense(1, self.width, name="out")(nn.relu(x))[..., 0]


class ConcatCritic(nn.Module):
    """A perceptron with two hidden layers over the concatenation [a; b].

    It has neither a norm nor a temperature. The first layer is stored as one layer per side, and
    the two results are added. This is the same function, but each row passes the first layer once,
    however many pairs it is in.
    """

    width: int = 512
    groups: int = 1

    @nn.compact
    def _first_layer(self, a: Array, b: Array) -> tuple[Array, Array, _Perceptron]:
        """(hidden units of a, hidden units of b, the layers above)."""
        channels = a.shape[-1] + b.shape[-1]
        init = torch_bias(channels)  # the fan-in is that of both sides together
        left = nn.Dense(self.width, kernel_init=init, bias_init=init, name="left")(a)
        right = nn.Dense(self.width, kernel_init=init, use_bias=False, name="right")(b)
        return left, right, _Perceptron(self.width, name="top")

    def __call__(
        self, a: Float[Array, "b c"], b: Float[Array, "b e"], *, train: bool = False
    ) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
        """The scores of a_i with b_i, and of a_i with the next row of b in its group."""
        left, right, top = self._first_layer(a, b)
        return top(left + right), top(left + next_row(right, self.groups))

    def pairs(self, a: Float[Array, "i c"], b: Float[Array, "t e"]) -> Float[Array, "i t"]:
        """The score of every row of a with every row of b, some rows of a at a time."""
        left, right, top = self._first_layer(a, b)
        top, variables = top.unbind()
        rows = max(1, _TILE // right.size)
        return jax.lax.map(lambda x: top.apply(variables, x + right), left, batch_size=rows)


class PriorDiscriminator(nn.Module):
    """One logit per row: large for uniform noise, small for a feature (CLIP-Lite)."""

    widths: tuple[int, ...] = (1000, 200)

    @nn.compact
    def __call__(self, x: Float[Array, "b c"]) -> Float[Array, " b"]:
        for i, width in enumerate(self.widths):
            x = nn.relu(_dense(width, x.shape[-1], name=f"fc_{i}")(x))
        return _dense(1, x.shape[-1], name="out")(x)[..., 0]


class BatchNormMLP(nn.Module):
    """Dense layers of `widths`, with BatchNorm and ReLU after each layer but the last.

    The last layer has a BatchNorm if `last_norm`, and never a ReLU. DeCLIP's projector has widths
    (1024, 1024, 1024) and `last_norm`, DeCLIP's predictor (512, 1024), and SLIP's head (4096, 4096,
    256). As in both codes every layer has a bias, also a layer in front of a BatchNorm.
    """

    widths: tuple[int, ...]
    last_norm: bool = False
    groups: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "b c"], *, train: bool = False) -> Float[Array, "b d"]:
        for i, width in enumerate(self.widths):
            last = i == len(self.widths) - 1
            x = _dense(width, x.shape[-1], name=f"fc_{i}")(x)
            if self.last_norm or not last:
                norm = GroupedBatchNorm(str(x.dtype), groups=self.groups, name=f"norm_{i}")
                x = norm(x, train=train)
            x = x if last else nn.relu(x)
        return x


class PrototypeHeads(nn.Module):
    """ProtoCLIP's heads: one `BatchNormMLP` for images, one for texts, and `logit_scale`.

    The two heads start as copies of each other and share no parameters. Parameters and statistics
    have a leading axis of two: images, texts. With one width a head is a single dense layer.
    `logit_scale` is the log of the scale of the logits.
    """

    widths: tuple[int, ...]
    groups: int = 1
    logit_scale_init: float = math.log(1 / 0.07)

    def setup(self):
        init = initializers.constant(self.logit_scale_init)
        self.logit_scale = self.param("logit_scale", init, (), jnp.float32)
        self.mlp = BatchNormMLP(self.widths, groups=self.groups)

    def __call__(
        self, image: Float[Array, "b c"], text: Float[Array, "b c"], *, train: bool = False
    ) -> tuple[Float[Array, "b d"], Float[Array, "b d"]]:
        """The unit-normalised projections of images and of texts."""
        both_heads = nn.vmap(
            lambda mlp, x: mlp(x, train=train),
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": False},
        )
        both = constrain_rows(jnp.stack([image, text]), axis=1)
        image, text = unit(both_heads(self.mlp, both))
        return constrain_rows((image, text))


class TokenProjection(nn.Module):
    """Unit-normalised tokens after one dense layer with a bias."""

    width: int

    @nn.compact
    def __call__(self, tokens: Float[Array, "b n c"]) -> Float[Array, "b n d"]:
        tokens = wide(tokens)
        return unit(_dense(self.width, tokens.shape[-1], name="fc")(tokens))


class VocabularyHead(nn.Module):
    """Kernel [c, words] and bias [words] of the layer that predicts masked words.

    They are not tied to the word embedding. `losses.masked_lm` applies the layer, in tiles.
    """

    words: int

    @nn.compact
    def __call__(self, channels: int) -> tuple[Float[Array, "c v"], Float[Array, " v"]]:
        return (
            self.param("kernel", torch_uniform, (channels, self.words), jnp.float32),
            self.param("bias", torch_bias(channels), (self.words,), jnp.float32),
        )
