"""The stack of transformer blocks that the towers share, and the two layouts of its parameters."""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.nn import initializers
from jaxtyping import Bool, Float, Int, Key

from clipx.models import cpu
from clipx.models.attention import attention, has_kernel, packed_attention
from clipx.models.layers import MLP, Activation, Affine, LayerNorm, Lora, drop, torch_uniform
from clipx.models.tpu import PRODUCTS, STATISTICS
from clipx.types import Array, PyTree, constrain_rows, on_tpu


class SelfAttention(nn.Module):
    """Multi-head self-attention.

    The kernels `qkv` [c, 3, heads, head width] and `out` [heads, head width, c] have a `heads`
    axis, which tensor parallelism splits.
    """

    heads: int
    causal: bool
    dtype: str
    kernel_inits: tuple[Any, Any]
    tokens: int = 0  # per row, if x is flattened to [b n, c] for the TPU kernel; 0: it is not
    lora: Lora | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*r c"],
        lengths: Int[Array, " b"] | None,
        seen: Bool[Array, "b n"] | None = None,
    ) -> Float[Array, "*r c"]:
        width = x.shape[-1]
        shape = (3, self.heads, width // self.heads)
        project = Affine(shape, self.dtype, self.kernel_inits[0], lora=self.lora, name="qkv")
        if self.tokens:
            # heads are outermost, so that a mesh's tensor axis can split the flat axis
            qkv = checkpoint_name(project(x, order=(1, 0, 2)), PRODUCTS)
            qkv = qkv.reshape(-1, self.tokens, 3 * width)
            y = packed_attention(qkv, lengths, heads=self.heads, causal=self.causal)
        else:
            qkv = checkpoint_name(project(x), PRODUCTS)
            q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
            y = attention(q, k, v, causal=self.causal, lengths=lengths, seen=seen)
        y = y.reshape(*x.shape[:-1], *shape[1:])
        init, lora = self.kernel_inits[1], self.lora
        return Affine((width,), self.dtype, init, inputs=2, lora=lora, name="out")(y)


class LayerScale(nn.Module):
    """A learned factor of each channel (Touvron et al. 2021, arXiv:2103.17239, section 2)."""

    start: float
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "*r c"]) -> Float[Array, "*r c"]:
        init = initializers.constant(self.start)
        return x * self.param("scale", init, x.shape[-1:], jnp.float32).astype(self.dtype)


class Block(nn.Module):
    """One pre-LN transformer block (CLIP, clip/model.py, ResidualAttentionBlock)."""

    heads: int
    mlp_width: int
    depth: int  # of the complete transformer, which scales the initialisation
    activation: Activation
    norm_eps: float
    dropout: float
    causal: bool
    block_init: Literal["clip", "torch"]
    dtype: str
    tokens: int = 0  # as in `SelfAttention`
    lora: Lora | None = None
    layer_scale: float | None = None  # initial factor of what a block adds; None: no factor

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*r c"],
        index: int | Int[Array, ""],
        lengths: Int[Array, " b"] | None,
        keys: Key[Array, " b"] | None,
        seen: Bool[Array, "b n"] | None = None,
    ) -> Float[Array, "*r c"]:
        width = x.shape[-1]
        if self.block_init == "clip":
            narrow = initializers.normal(width**-0.5 * (2 * self.depth) ** -0.5)
            attention_inits = (initializers.normal(width**-0.5), narrow)
            mlp_inits = (initializers.normal((2 * width) ** -0.5), narrow)
        else:
            attention_inits = (initializers.glorot_uniform(), torch_uniform)
            mlp_inits = (torch_uniform, torch_uniform)
        norm = functools.partial(LayerNorm, epsilon=self.norm_eps, dtype=self.dtype)
        attend = SelfAttention(
            *(self.heads, self.causal, self.dtype, attention_inits, self.tokens),
            lora=self.lora,
            name="attn",
        )
        mlp = MLP(
            self.mlp_width, self.activation, self.dtype, mlp_inits, lora=self.lora, name="mlp"
        )

        def dropped(y: Array, index: int | Array) -> Array:
            rows = y.reshape(-1, self.tokens, width) if self.tokens else y
            return drop(rows, self.dropout, keys, index).reshape(y.shape)

        def scaled(y: Array, name: str) -> Array:
            if self.layer_scale is None:
                return y
            return LayerScale(self.layer_scale, self.dtype, name=name)(y)

        y = scaled(attend(norm(name="ln_1")(x), lengths, seen), "scale_1")
        x = checkpoint_name(cpu.hold(x + dropped(y, 2 * index)), PRODUCTS)
        y = scaled(mlp(norm(name="ln_2")(x)), "scale_2")
        return cpu.hold(constrain_rows(x + dropped(y, 2 * index + 1)))


class Transformer(nn.Module):
    """A stack of pre-LN transformer blocks.

    The parameters are `block_0`, `block_1`, ...; with `scan` they are one `blocks` with a leading
    layer axis, and the block is compiled once.

    `remat` says what the backward pass recomputes. "none": nothing. "dots": all but weight products
    (on TPUs with their biases and residuals). "full": complete blocks. On TPUs every policy saves
    the statistics of norms.

    `block_init` "clip" scales the normal initialisers by depth, as CLIP does for text. "torch"
    keeps torch's defaults, as CLIP's code does for images (clip/model.py, initialize_parameters).
    """

    depth: int
    heads: int
    mlp_width: int
    activation: Activation = "gelu"
    norm_eps: float = 1e-5
    dropout: float = 0.0
    causal: bool = False
    scan: bool = False
    remat: Literal["none", "dots", "full"] = "none"
    block_init: Literal["clip", "torch"] = "clip"
    dtype: str = "float32"
    lora: Lora | None = None
    layer_scale: float | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n c"],
        lengths: Int[Array, " b"] | None = None,
        keys: Key[Array, " b"] | None = None,
        seen: Bool[Array, "b n"] | None = None,
    ) -> Float[Array, "b n c"]:
        """The tokens after the last block. lengths: tokens of each row that take part in attention,
        from its first on. seen: which tokens are attended to; not both."""
        rows, tokens, width = x.shape
        flat = seen is None and on_tpu()
        flat = flat and has_kernel(rows, tokens, self.heads, width // self.heads, self.dtype)
        padded_tokens = 0
        if flat:
            # Padded to a TPU's memory tiles, so that the weight products and the kernel take the
            # same layout. `lengths` keeps the padding out of attention.
            lengths = jnp.full(rows, tokens) if lengths is None else lengths
            x = jnp.pad(x, ((0, 0), (0, -tokens % 8), (0, 0)))
            padded_tokens, x = x.shape[1], constrain_rows(x.reshape(-1, width))
        cls = Block
        if self.remat != "none":
            policies = jax.checkpoint_policies
            policy = policies.save_only_these_names(STATISTICS)
            if self.remat == "dots":
                policy = policies.dots_with_no_batch_dims_saveable
                if on_tpu():  # a bias or a sum is fused into its product, but is a pass of its own
                    policy = policies.save_only_these_names(STATISTICS, PRODUCTS)
            cls = nn.remat(Block, policy=policy, prevent_cse=not self.scan)
        make = functools.partial(
            cls,
            heads=self.heads,
            mlp_width=self.mlp_width,
            depth=self.depth,
            activation=self.activation,
            norm_eps=self.norm_eps,
            dropout=self.dropout,
            causal=self.causal,
            block_init=self.block_init,
            dtype=self.dtype,
            tokens=padded_tokens,
            lora=self.lora,
            layer_scale=self.layer_scale,
        )
        if not self.scan and self.is_initializing():
            for i in range(self.depth):
                x = make(name=f"block_{i}")(x, i, lengths, keys, seen)
        elif not self.scan:
            # All blocks are calls of one function, which Python traces once; XLA inlines them. It
            # is a new function each time: what a block computes depends on the mesh.
            plain, params = make(parent=None, name="block"), self.variables["params"]

            @jax.jit
            def block(params: PyTree, *inputs: Any) -> Array:
                return plain.apply({"params": params}, *inputs)  # pyright: ignore[reportReturnType]

            for i in range(self.depth):
                x = block(params[f"block_{i}"], x, jnp.int32(i), lengths, keys, seen)
        else:
            over_layers = nn.scan(
                lambda block, x, i: (block(x, i, lengths, keys, seen), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=self.depth,
            )
            x, _ = over_layers(make(name="blocks"), x, jnp.arange(self.depth))
        return x.reshape(rows, -1, width)[:, :tokens] if flat else x


def stack_blocks(params: PyTree) -> PyTree:
    """`params` in the layout of `scan=True`: `block_0`, `block_1`, ... stacked to one `blocks`."""
    if not isinstance(params, dict):
        return params
    names = [f"block_{i}" for i in range(sum(k.startswith("block_") for k in params))]
    rest = {k: stack_blocks(v) for k, v in params.items() if k not in names}
    if names:
        rest["blocks"] = jax.tree.map(lambda *x: jnp.stack(x), *(params[n] for n in names))
    return rest


def merge_adapters(params: PyTree, lora: Lora | None) -> PyTree:
    """`params`, of unscanned blocks, with each adapter added to its kernel in float64: those of the
    same tower without adapters."""
    if lora is None or not isinstance(params, dict):
        return params
    rest = {k: merge_adapters(v, lora) for k, v in params.items() if not k.startswith("lora_")}
    if "lora_a" in params:
        a, b = (np.asarray(params[name], np.float64) for name in ("lora_a", "lora_b"))
        kernel = rest["kernel"] + np.tensordot(a, b, 1) * (lora.alpha / lora.rank)
        rest["kernel"] = kernel.astype(np.float32)
    return rest


def unstack_blocks(params: PyTree) -> PyTree:
    """`params` in the layout of `scan=False`; the inverse of `stack_blocks`."""
    if not isinstance(params, dict):
        return params
    rest = {k: unstack_blocks(v) for k, v in params.items() if k != "blocks"}
    if "blocks" in params:
        depth = len(jax.tree.leaves(params["blocks"])[0])
        for i in range(depth):
            rest[f"block_{i}"] = jax.tree.map(lambda x, i=i: x[i], params["blocks"])
    return rest
