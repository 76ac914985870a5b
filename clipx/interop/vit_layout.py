"""Vision transformers of timm and transformers: names and layouts of their arrays."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

from clipx.interop import rules
from clipx.interop.rules import Rule
from clipx.models.vit import ViT

Positioned = Literal["all", "with_class", "patches"]


class Names(NamedTuple):
    """What a library calls the arrays of a ViT. Those of a block follow its own name."""

    patches: str
    positions: str
    class_token: str
    registers: str
    block: str
    norm_1: str
    qkv: tuple[str, ...]  # one weight for all three, or one each
    out: str
    scale_1: str
    norm_2: str
    fc: str
    proj: str
    scale_2: str
    norm_pre: str
    norm: str
    norm_pooled: str


TIMM = Names(
    patches="patch_embed.proj",
    positions="pos_embed",
    class_token="cls_token",
    registers="reg_token",
    block="blocks",
    norm_1="norm1",
    qkv=("attn.qkv",),
    out="attn.proj",
    scale_1="ls1.gamma",
    norm_2="norm2",
    fc="mlp.fc1",
    proj="mlp.fc2",
    scale_2="ls2.gamma",
    norm_pre="norm_pre",
    norm="norm",
    norm_pooled="fc_norm",
)
# modeling_dinov2.py and modeling_dinov2_with_registers.py
DINO = TIMM._replace(
    patches="embeddings.patch_embeddings.projection",
    positions="embeddings.position_embeddings",
    class_token="embeddings.cls_token",
    registers="embeddings.register_tokens",
    block="encoder.layer",
    qkv=tuple(f"attention.attention.{name}" for name in ("query", "key", "value")),
    out="attention.output.dense",
    scale_1="layer_scale1.lambda1",
    scale_2="layer_scale2.lambda1",
    norm="layernorm",
)
# modeling_vit.py, modeling_deit.py and modeling_vit_mae.py
PLAIN = DINO._replace(
    norm_1="layernorm_before",
    norm_2="layernorm_after",
    fc="intermediate.dense",
    proj="output.dense",
)


def layout(
    image: ViT,
    names: Names,
    theirs: str = "",
    *,
    positioned: Positioned = "all",
    qkv_bias: bool = True,
    scale: float = 1.0,
) -> list[Rule]:
    """The rules of all arrays below the head, except a `MapHead`'s.

    theirs: what stands before the names, with its dot. positioned: which tokens the table of
    positions has rows for, beside the patches. qkv_bias: False if the file has none; then they
    are read as zeros, and cannot be written. scale: of what is added to the tokens between blocks.
    """
    width, depth, heads, *_ = image.shape
    a = "params/image"
    found = [
        rules.conv(f"{a}/patch_embedding", f"{theirs}{names.patches}"),
        _tokens(image, names, a, theirs, positioned),
        *(rules.norm(f"{a}/ln_pre", f"{theirs}{names.norm_pre}") if image.pre_norm else ()),
    ]
    for ours, block in _blocks(depth, theirs + names.block):
        found += rules.heads_out(f"{ours}/attn/out", f"{block}.{names.out}", heads)
        found += rules.dense(f"{ours}/mlp/proj", f"{block}.{names.proj}")
    found = rules.scaled(found, scale)
    for ours, block in _blocks(depth, theirs + names.block):
        qkv = rules.heads_in(
            (f"{ours}/attn/qkv",), tuple(f"{block}.{n}" for n in names.qkv), heads, (3,)
        )
        if not qkv_bias:
            zeros = functools.partial(np.zeros, (3, heads, width // heads), np.float32)
            qkv[1] = Rule((f"{ours}/attn/qkv/bias",), (), lambda _: (), lambda z=zeros: (z(),))
        found += [
            *rules.norm(f"{ours}/ln_1", f"{block}.{names.norm_1}"),
            *qkv,
            *rules.norm(f"{ours}/ln_2", f"{block}.{names.norm_2}"),
            *rules.dense(f"{ours}/mlp/fc", f"{block}.{names.fc}"),
        ]
        if image.layer_scale is not None:
            found.append(rules.same(f"{ours}/scale_1/scale", f"{block}.{names.scale_1}"))
            found.append(rules.same(f"{ours}/scale_2/scale", f"{block}.{names.scale_2}"))
    norm = names.norm_pooled if image.norm_pooled else names.norm
    return found + rules.norm(f"{a}/ln_post", f"{theirs}{norm}")


def default_positions(image: ViT) -> Positioned:
    """Which tokens have positions in what clipx writes for timm."""
    return "patches" if image.registers else "all"


def _blocks(depth: int, theirs: str) -> Iterator[tuple[str, str]]:
    """The names of each block, ours and theirs."""
    for i in range(depth):
        yield f"params/image/transformer/block_{i}", f"{theirs}.{i}"


def _tokens(image: ViT, names: Names, ours: str, theirs: str, positioned: Positioned) -> Rule:
    """The rule of the positions, the class token, the registers, and the bias of the patches.

    clipx has positions of the class token and of the patches. Those of other tokens are added to
    the tokens themselves. Every patch gets the same bias, so reading adds it to every patch's
    position. timm's patches have no bias where a norm follows.
    """
    first, registers = int(image.has_class), image.registers
    width = image.shape[0]
    biased = not image.pre_norm
    extra = [("class_embedding", names.class_token)] * first
    extra += [("register_embedding", names.registers)] * bool(registers)
    rows_first = first if positioned != "patches" else 0  # of their table
    rows_registers = registers if positioned == "all" else 0

    def out(table: np.ndarray, *tokens: np.ndarray) -> tuple[np.ndarray, ...]:
        made = [x.reshape(1, -1, width) for x in tokens]
        if first > rows_first:
            made[0] = made[0] + table[0]
        none = np.zeros((rows_registers, width), table.dtype)
        table = np.concatenate([table[:rows_first], none, table[first:]])
        return (table[None], *([np.zeros(width, np.float32)] * biased), *made)

    def back(table: np.ndarray, *rest: np.ndarray) -> tuple[np.ndarray, ...]:
        bias = rest[0] if biased else np.float32(0)
        made = [x.reshape(-1, width) for x in rest[biased:]]
        table = table.reshape(-1, width)
        if rows_registers:
            made[-1] = made[-1] + table[rows_first : rows_first + rows_registers]
        if first:
            made[0] = made[0][0]
        patches = table[rows_first + rows_registers :] + bias
        before = table[:rows_first] if rows_first else np.zeros((first, width), table.dtype)
        return (np.concatenate([before, patches]), *made)

    biases = [f"{theirs}{names.patches}.bias"] * biased
    return Rule(
        (f"{ours}/positional_embedding", *(f"{ours}/{name}" for name, _ in extra)),
        (f"{theirs}{names.positions}", *biases, *(theirs + name for _, name in extra)),
        out,
        back,
    )


def map_head(heads: int, theirs: str, scale: float = 1.0) -> list[Rule]:
    """The rules of timm's attention pooling with so many heads. theirs: its name. scale: as of
    `layout`."""
    ours = "params/image/pool"
    out = rules.dense(f"{ours}/out", f"{theirs}.proj")
    return [
        Rule((f"{ours}/probe",), (f"{theirs}.latent",), lambda x: (x[None],), lambda x: (x[0],)),
        *rules.heads_in((f"{ours}/attn/q",), (f"{theirs}.q",), heads, (1,)),
        *rules.heads_in((f"{ours}/attn/kv",), (f"{theirs}.kv",), heads, (2,)),
        *rules.scaled(out + rules.dense(f"{ours}/mlp/proj", f"{theirs}.mlp.fc2"), scale),
        *rules.norm(f"{ours}/ln", f"{theirs}.norm"),
        *rules.dense(f"{ours}/mlp/fc", f"{theirs}.mlp.fc1"),
    ]
