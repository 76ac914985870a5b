"""EVA's towers in timm (1.0, `eva.py`): names of architectures, and names and layouts of arrays."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np

from clipx.errors import ConfigError, NotExpressible
from clipx.interop import rules, vit_layout
from clipx.interop.model import ratio
from clipx.interop.rules import Rule
from clipx.interop.settings import Section
from clipx.models.eva import EVA


class Kind(NamedTuple):
    """A family of architectures: the fields that its towers share."""

    architecture: str  # one of them, from whose name timm builds the others
    fields: dict[str, Any]


_KINDS = {
    "eva": Kind(
        "eva_giant_patch14_224",
        {"gated": False, "sub_norms": False, "rotary": False, "pool": "mean"},
    ),
    "eva02_clip": Kind("eva02_base_patch16_clip_224", {}),
    "eva02_post": Kind(
        "eva02_enormous_patch14_clip_224",
        {"gated": False, "sub_norms": False, "rotary": False, "post_norm": True},
    ),
    "pe": Kind(
        "vit_pe_core_base_patch16_224",
        {
            "gated": False,
            "sub_norms": False,
            "key_bias": True,
            "pre_norm": True,
            "rotary_first": 1,
            "rotary_x_first": True,
            "pool": "attention",
            "norm_eps": 1e-5,
        },
    ),
}
# (kind, width, depth, heads, ratio of the MLP, side of the grid for which positions were learned)
_SIZES = {
    "eva_giant_patch14": ("eva", 1408, 40, 16, 6144 / 1408, 16),
    "eva02_base_patch16_clip": ("eva02_clip", 768, 12, 12, 8 / 3, 16),
    "eva02_large_patch14_clip": ("eva02_clip", 1024, 24, 16, 8 / 3, 16),
    "eva02_enormous_patch14_clip": ("eva02_post", 1792, 64, 16, 15360 / 1792, 16),
    "vit_pe_core_tiny_patch16": ("pe", 192, 12, 3, 4.0, 24),
    "vit_pe_core_small_patch16": ("pe", 384, 12, 6, 4.0, 24),
    "vit_pe_core_base_patch16": ("pe", 768, 12, 12, 4.0, 14),
    "vit_pe_core_large_patch14": ("pe", 1024, 24, 16, 4.0, 24),
    "vit_pe_core_gigantic_patch14": ("pe", 1536, 50, 16, 8960 / 1536, 32),
}
_NAME = re.compile(r"(\w+_patch(\d+)(?:_clip)?)_\d+$")
_POOLS = {"token": "class", "avg": "mean", "map": "attention"}


def tower(
    name: str, args: Section, common: dict[str, Any], where: str, pool: str | None
) -> EVA | None:
    """The tower of timm's architecture `name` with the arguments `args`; None for another kind of
    architecture. common, pool: as for `timm_models.build`. Raises `ConfigError`."""
    match = _NAME.match(name)
    if match is None or match[1] not in _SIZES:
        return None
    kind, width, depth, heads, mlp_ratio, side = _SIZES[match[1]]
    fields = dict(_KINDS[kind].fields)
    default = {ours: theirs for theirs, ours in _POOLS.items()}[fields.get("pool", "class")]
    made = args.one_of("global_pool", _POOLS, default)
    if pool not in (None, made) and "avg" in (pool, made):
        # the norm stays where the network was made to have it
        raise ConfigError(where, f"pooling by {pool!r} of a network made for {made!r}", repr(made))
    if "attention" in (_POOLS[made], _POOLS.get(pool or made)) and kind != "pe":
        raise ConfigError(where, f"{name!r} with attention pooling", "'token' or 'avg'")
    first = args.one_of("rope_grid_offset", (0, 1), 0 if "gigantic" in name else 1)
    fields |= {"rotary_first": int(first)} if kind == "pe" else {}
    return EVA(
        **fields
        | {
            "patch": args.size("patch_size", int(match[2])),
            "width": args.size("embed_dim", width),
            "depth": args.depth("depth", depth),
            "heads": args.size("num_heads", heads),
            "mlp_ratio": args.number("mlp_ratio", mlp_ratio),
            "rotary_side": args.size("ref_feat_shape", side),
            "class_token": args.flag("class_token", "gigantic" not in name),
            "pool": _POOLS[pool or made],
            "pool_heads": args.size("attn_pool_num_heads", 8),
            "pool_ratio": args.number("attn_pool_mlp_ratio", 4.0),
        },
        **common,
    )


def arguments(image: Any) -> tuple[str, dict[str, Any]]:
    """(architecture, arguments) from which timm builds the tower. Raises `NotExpressible`."""
    shared = ("gated", "sub_norms", "post_norm", "key_bias", "rotary", "pre_norm", "norm_eps")
    shared += ("rotary_x_first",)

    def same(kind: Kind) -> bool:
        wanted = EVA(**kind.fields)
        return all(getattr(image, name) == getattr(wanted, name) for name in shared)

    found = next((kind for kind in _KINDS.values() if same(kind)), None)
    if found is None:
        raise NotExpressible("timm has no EVA whose blocks have these norms, gates and rotations")
    pools = {ours: theirs for theirs, ours in _POOLS.items()}
    args: dict[str, Any] = {
        "img_size": image.image_size,
        "patch_size": image.patch,
        "embed_dim": image.width,
        "depth": image.depth,
        "num_heads": image.heads,
        "mlp_ratio": ratio(image.mlp_width, image.width),
        "class_token": image.class_token,
        "global_pool": pools[image.pool],
    }
    if image.rotary:
        args["ref_feat_shape"] = image.rotary_side
    if image.key_bias:
        args |= {"rope_grid_offset": image.rotary_first, "attn_pool_num_heads": image.pool_heads}
        args["attn_pool_mlp_ratio"] = image.pool_ratio
    return found.architecture, args


def layout(image: EVA, theirs: str = "") -> list[Rule]:
    """The rules of all arrays below the head. theirs: what stands before the names."""
    ours, first = "params/image", int(image.class_token)
    found = [
        rules.conv(f"{ours}/patch_embedding", f"{theirs}patch_embed.proj"),
        Rule(
            (f"{ours}/positional_embedding",),
            (f"{theirs}pos_embed",),
            lambda x: (x[None],),
            lambda x: (x[0],),
        ),
    ]
    if image.pre_norm:
        found += rules.norm(f"{ours}/ln_pre", f"{theirs}norm_pre")
    else:
        bias = f"{theirs}patch_embed.proj.bias"
        found.append(rules.same(f"{ours}/patch_embedding/bias", bias))
    if first:
        found.append(
            Rule(
                (f"{ours}/class_embedding",),
                (f"{theirs}cls_token",),
                lambda x: (x[None, None],),
                lambda x: (x[0, 0],),
            )
        )
    for i in range(image.depth):
        found += _block(image, f"{ours}/block_{i}", f"{theirs}blocks.{i}")
    norm = "fc_norm" if image.pool == "mean" else "norm"
    found += rules.norm(f"{ours}/ln_post", f"{theirs}{norm}")
    if image.pool == "attention":
        found += vit_layout.map_head(image.pool_heads, f"{theirs}attn_pool")
    return found


def _block(image: EVA, ours: str, theirs: str) -> list[Rule]:
    fused = not image.sub_norms
    names = ("qkv",) if fused else ("q_proj", "k_proj", "v_proj")
    attn = f"{theirs}.attn"
    kernel, bias = rules.heads_in(
        (f"{ours}/attn/qkv",), tuple(f"{attn}.{n}" for n in names), image.heads, (3,)
    )
    found = [
        kernel,
        *rules.norm(f"{ours}/ln_1", f"{theirs}.norm1"),
        *rules.norm(f"{ours}/ln_2", f"{theirs}.norm2"),
        *rules.heads_out(f"{ours}/attn/out", f"{attn}.proj", image.heads),
        *rules.dense(f"{ours}/mlp/proj", f"{theirs}.mlp.fc2"),
    ]
    if image.key_bias:
        found.append(bias._replace(ours=(f"{ours}/attn/bias",)))
    else:
        two = ("q_bias", "v_bias") if fused else ("q_proj.bias", "v_proj.bias")
        found.append(_two_biases(f"{ours}/attn/bias", [f"{attn}.{n}" for n in two], image.heads))
    if image.gated:
        found += rules.dense(f"{ours}/mlp/gate", f"{theirs}.mlp.fc1_g")
        found += rules.dense(f"{ours}/mlp/fc", f"{theirs}.mlp.fc1_x")
    else:
        found += rules.dense(f"{ours}/mlp/fc", f"{theirs}.mlp.fc1")
    if image.sub_norms:
        found += rules.norm(f"{ours}/attn/ln", f"{attn}.norm")
        found += rules.norm(f"{ours}/mlp/ln", f"{theirs}.mlp.norm")
    return found


def _two_biases(ours: str, theirs: list[str], heads: int) -> Rule:
    """The biases of queries and values; keys have none."""
    return Rule(
        (ours,),
        tuple(theirs),
        lambda x: tuple(part.reshape(-1) for part in x),
        lambda *parts: (np.stack([part.reshape(heads, -1) for part in parts]),),
    )
