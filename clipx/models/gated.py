"""The MLP with a gate."""

from __future__ import annotations

import functools
from typing import Literal

import jax
from flax import linen as nn
from jaxtyping import Float

from clipx.models.layers import Affine, LayerNorm, Lora, activate, torch_bias, torch_uniform
from clipx.types import Array


class GatedMLP(nn.Module):
    """An MLP whose hidden layer is multiplied by a gate, a second layer through `activation`
    (Shazeer 2020, arXiv:2002.05202). With `norm_eps` there is a LayerNorm, of the input or of the
    hidden layer."""

    width: int
    activation: Literal["silu", "gelu", "gelu_tanh"]
    dtype: str
    norm_eps: float | None = None
    norm_input: bool = False
    use_bias: bool = True
    lora: Lora | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        def norm(x: Array, wanted: bool) -> Array:
            if self.norm_eps is None or not wanted:
                return x
            return LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name="ln")(x)

        channels = x.shape[-1]
        dense = functools.partial(
            Affine,
            dtype=self.dtype,
            kernel_init=torch_uniform,
            lora=self.lora,
            use_bias=self.use_bias,
        )
        hidden = functools.partial(dense, (self.width,), bias_init=torch_bias(channels))
        x = norm(x, self.norm_input)
        gate = hidden(name="gate")(x)
        gate = jax.nn.silu(gate) if self.activation == "silu" else activate(gate, self.activation)
        y = norm(gate * hidden(name="fc")(x), not self.norm_input)
        return dense((channels,), bias_init=torch_bias(self.width), name="proj")(y)
