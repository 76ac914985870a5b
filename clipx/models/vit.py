"""The vision transformer."""

from __future__ import annotations

import re
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn import initializers
from jaxtyping import Float, Key

from clipx.config.ranges import Count, CountOrZero, Depth, Epsilon, Pixels, Rate, Ratio, Width
from clipx.models import cpu
from clipx.models.base import PositionTable, Tower
from clipx.models.layers import (
    Activation,
    LayerNorm,
    check,
    check_name,
    dropout_keys,
    mean_tokens,
    torch_uniform,
)
from clipx.models.pooling import MapHead, QueryPool
from clipx.models.transformer import Transformer
from clipx.types import Array

# Zhai et al. 2022 (arXiv:2106.04560), table 2: width, depth, heads, MLP width. "bigG" is
# open_clip's name for G.
SIZES = {
    "Ti": (192, 12, 3, 768),
    "S": (384, 12, 6, 1536),
    "M": (512, 12, 8, 2048),
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
    "So400m": (1152, 27, 16, 4304),
    "H": (1280, 32, 16, 5120),
    "g": (1408, 40, 16, 6144),
    "G": (1664, 48, 16, 8192),
    "bigG": (1664, 48, 16, 8192),
}


def _frozen_product(x: Array, kernel: Array, *args: Any, **options: Any) -> Array:
    """`dot_general` of x and a kernel that gets no gradient."""
    return jax.lax.dot_general(x, jax.lax.stop_gradient(kernel), *args, **options)


class ViT(Tower):
    """CLIP's vision transformer (clip/model.py, VisionTransformer), of any size.

    `variant` names size and patch, such as "ViT-B/32"; `width`, `depth`, `heads`, `patch` and
    `mlp_ratio` override it. `pool` picks `backbone`: "class" is the class token after `ln_post`.
    "mean" and "attention" apply `ln_post` to all tokens, and take the patches' mean or a `MapHead`
    of them; with `norm_pooled`, `ln_post` comes after the mean (timm's `fc_norm`). "query" is
    CoCa's: a `QueryPool` of all tokens, then `ln_post`. These have no class token unless
    `class_token` says so. `registers` more tokens (Darcet et al. 2023,
    arXiv:2309.16588), and a class token that is not pooled, only take part in attention. `tokens`
    of the result are the patch tokens before `ln_post`. Images must be normalised.

    A patch must divide the image, unless `uneven`: then the pixels at the right and at the bottom
    that fill no patch are left out, as a convolution does.

    With `freeze_patches` the patch embedding gets no gradient, as in MoCo v3 (arXiv:2104.02057,
    section 4) and in DeCLIP's code. A rule of the optimizer must exempt it from weight decay.
    """

    adaptable: ClassVar[bool] = True

    variant: str = "ViT-B/32"
    image_size: Pixels = 224  # pixels
    width: Width | None = None
    depth: Depth | None = None
    heads: Width | None = None
    patch: Pixels | None = None  # pixels
    mlp_ratio: Ratio | None = None
    uneven: bool = False  # the patches may leave out the last pixels of each side
    pool: Literal["class", "mean", "attention", "query"] = "class"
    pool_width: Width | None = None  # of pool="query"; None: as wide as a block
    pool_heads: Width = 8  # of pool="query"
    pool_queries: Count = 256  # of pool="query": all but the first are a captioner's
    class_token: bool | None = None  # None: only where it is pooled
    norm_pooled: bool = False
    registers: CountOrZero = 0
    pre_norm: bool = True  # CLIP's LayerNorm before the first block
    layer_scale: Epsilon | None = None  # initial factor of what a block adds (DINOv2); None: none
    block_init: Literal["torch", "clip"] = "torch"  # "clip": scaled by depth, as in the text tower
    freeze_patches: bool = False  # the patch embedding keeps its initial values
    activation: Activation = "gelu"
    norm_eps: Epsilon = 1e-5
    dropout: Rate = 0.0
    scan: bool = False
    remat: Literal["none", "dots", "full"] = "none"

    @nn.nowrap
    def check(self) -> None:
        super().check()
        width, _, heads, mlp_width, patch = self.shape
        check(mlp_width > 0, self.at("mlp_ratio"), self.mlp_ratio, "an MLP of at least one channel")
        check(
            self.image_size % patch == 0 or self.uneven and self.image_size > patch,
            self.at("image_size"),
            f"{self.image_size} pixels with a patch of {patch}",
            "a multiple of the patch",
            f"set image_size={max(round(self.image_size / patch), 1) * patch}",
        )
        check(
            self.pool != "query" or self.backbone_width % self.pool_heads == 0,
            self.at("pool_heads"),
            f"{self.pool_heads} heads for a width of {self.backbone_width}",
            "a number that divides the width",
        )
        check(
            self.has_class or self.pool != "class",
            self.at("class_token"),
            self.class_token,
            "a class token for pool='class'",
        )
        check(
            not self.norm_pooled or self.pool == "mean",
            self.at("norm_pooled"),
            f"{self.norm_pooled} with pool={self.pool!r}",
            "pool='mean', whose norm can be on either side",
        )
        check(
            width % heads == 0,
            self.at("heads"),
            f"{heads} heads for a width of {width}",
            "a number that divides the width",
        )

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Width, depth, heads, MLP width and patch: the variant's, unless a field overrides it."""
        digits = re.findall(r"[0-9]*$", self.variant)[0]
        known = [f"ViT-{size}/{digits or 32}" for size in SIZES]
        check_name(self.at("variant"), self.variant, known)
        width, depth, heads, mlp_width = SIZES[self.variant[4 : -len(digits) - 1]]
        ratio = mlp_width / width if self.mlp_ratio is None else self.mlp_ratio
        width = width if self.width is None else self.width
        return (
            width,
            depth if self.depth is None else self.depth,
            heads if self.heads is None else self.heads,
            round(width * ratio),
            int(digits) if self.patch is None else self.patch,
        )

    @property
    def has_class(self) -> bool:
        """Whether there is a class token."""
        return self.pool == "class" if self.class_token is None else self.class_token

    @property
    def backbone_width(self) -> int:
        """The width of a block, or of what `pool="query"` makes of the tokens."""
        if self.pool == "query" and self.pool_width is not None:
            return self.pool_width
        return self.shape[0]

    @property
    def position_table(self) -> PositionTable:
        """One row for the class token, if there is one, then one per patch."""
        side = self.image_size // self.shape[-1]
        return PositionTable(("positional_embedding",), int(self.has_class), (side, side))

    @property
    def unseen_settings(self) -> dict[str, Any]:
        """Fields of the tower, and the number of heads, which may come from the variant."""
        return {
            "activation": self.activation,
            "norm_eps": self.norm_eps,
            "heads": self.shape[2],
            "pool": self.pool,
            "pre_norm": self.pre_norm,
            "norm_pooled": self.norm_pooled,
            **({"pool_heads": self.pool_heads} if self.pool == "query" else {}),
        }

    @nn.compact
    def features(
        self,
        x: Float[Array, "b h w 3"],
        *,
        train: bool = False,
        keys: Key[Array, " b"] | None = None,
    ) -> tuple[Float[Array, "b c"], Float[Array, "b n c"]]:
        width, depth, heads, mlp_width, patch = self.shape
        self.check_images(x, self.image_size)
        side, rows = self.image_size // patch, x.shape[0]
        x = x[:, : side * patch, : side * patch]
        x = x.reshape(rows, side, patch, side, patch, 3).swapaxes(2, 3)
        x = nn.DenseGeneral(
            width,
            axis=(-3, -2, -1),
            use_bias=False,
            dtype=self.dtype,
            kernel_init=torch_uniform,
            dot_general=_frozen_product if self.freeze_patches else cpu.dot_general,
            name="patch_embedding",
        )(x).reshape(rows, side * side, width)
        normal = initializers.normal(width**-0.5)
        if self.has_class:
            token = self.param("class_embedding", normal, (width,), jnp.float32)
            token = jnp.broadcast_to(token.astype(x.dtype), (rows, 1, width))
            x = jnp.concatenate([token, x], axis=1)
        position = self.param("positional_embedding", normal, x.shape[1:], jnp.float32)
        x = x + position.astype(x.dtype)
        first = int(self.has_class) + self.registers  # patch tokens start here
        if self.registers:
            table = self.param("register_embedding", normal, (self.registers, width), jnp.float32)
            table = jnp.broadcast_to(table.astype(x.dtype), (rows, *table.shape))
            x = jnp.concatenate([x[:, : -side * side], table, x[:, -side * side :]], axis=1)
        if self.pre_norm:
            x = LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name="ln_pre")(x)
        x = Transformer(
            depth=depth,
            heads=heads,
            mlp_width=mlp_width,
            activation=self.activation,
            norm_eps=self.norm_eps,
            dropout=self.dropout,
            scan=self.scan,
            remat=self.remat,
            block_init=self.block_init,
            dtype=self.dtype,
            lora=self.lora,
            layer_scale=self.layer_scale,
            name="transformer",
        )(x, keys=dropout_keys(self.dropout, train, keys))
        tokens = x[:, first:]
        ln_post = LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name="ln_post")
        if self.pool == "class":
            pooled = ln_post(x[:, 0])
        elif self.norm_pooled:
            pooled = ln_post(mean_tokens(tokens))
        elif self.pool == "mean":
            pooled = mean_tokens(ln_post(tokens))
        elif self.pool == "query":
            pool = QueryPool(
                self.backbone_width,
                self.pool_queries,
                self.pool_heads,
                self.norm_eps,
                self.dtype,
                name="pool",
            )
            pooled = ln_post(pool(x))
        else:
            pooled = MapHead(
                heads, mlp_width, self.activation, self.norm_eps, self.dtype, name="pool"
            )(ln_post(tokens))
        return pooled, tokens
