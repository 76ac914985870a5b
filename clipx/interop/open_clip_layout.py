"""What the image and the text towers that open_clip itself implements have in common: their config
sections, and the names and layouts of their arrays (open_clip 3, `model.py`, `transformer.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from clipx.errors import ConfigError
from clipx.interop import rules
from clipx.interop.model import Model
from clipx.interop.rules import Rule
from clipx.interop.settings import Section, keys
from clipx.models.base import Tower

CONFIG = "open_clip_config.json"


class Layout(NamedTuple):
    """How open_clip describes and stores one kind of tower."""

    # (model, folder from which the export will be loaded) -> the tower's section of the config.
    # Raises `NotExpressible` for a tower that the section cannot describe.
    section: Callable[[Model, str], dict[str, Any]]
    # (tower, width of the shared space, row that the token embedding leaves out) -> rules
    rules: Callable[[Any, int, int | None], list[Rule]]
    # model -> entries of `config.json`, for a tower that open_clip builds through another library
    guest: Callable[[Model], dict[str, Any]] | None = None
    quick_gelu: bool = False  # whether the config's `quick_gelu` flag applies to this tower


def norm_and_activation(tower: Tower) -> dict[str, Any]:
    """A section's entries for a norm epsilon or activation other than open_clip's default, for a
    `ViT` or `TextTransformer`."""
    entries: dict[str, Any] = {}
    if tower.norm_eps != 1e-5:
        entries["norm_kwargs"] = {"eps": tower.norm_eps}
    if tower.activation == "gelu_tanh":
        entries["act_kwargs"] = {"approximate": "tanh"}
    return entries


def block_rules(ours: str, theirs: str, depth: int, heads: int) -> list[Rule]:
    layout = []
    for i in range(depth):
        a, b = f"{ours}/block_{i}", f"{theirs}.{i}"
        layout += [
            *rules.norm(f"{a}/ln_1", f"{b}.ln_1"),
            *rules.heads_in((f"{a}/attn/qkv",), (f"{b}.attn.in_proj",), heads, (3,), "_"),
            *rules.heads_out(f"{a}/attn/out", f"{b}.attn.out_proj", heads),
            *rules.norm(f"{a}/ln_2", f"{b}.ln_2"),
            *rules.dense(f"{a}/mlp/fc", f"{b}.mlp.c_fc"),
            *rules.dense(f"{a}/mlp/proj", f"{b}.mlp.c_proj"),
        ]
    return layout


# keys of a `vision_cfg` or `text_cfg` that change no feature: of training, of the tokenizer (read
# with it), and of shapes that an array tells
HARMLESS = keys(
    "patch_dropout output_tokens timm_model_pretrained timm_drop timm_drop_path "
    "hf_model_pretrained hf_tokenizer_name tokenizer_mode tokenizer_kwargs"
)
# keys of both sections that change a tower, with the only value that clipx's towers support
_ONLY = {
    "ls_init_value": None,
    "pos_embed_type": "learnable",
    "block_type": "default",
    **dict.fromkeys(("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner"), False),
    **dict.fromkeys(("scale_attn", "scale_fc"), False),
}


def check_only(section: Section) -> None:
    """Raises `ConfigError` for an open_clip option that clipx's towers do not have."""
    for key, value in _ONLY.items():
        section.one_of(key, (value,), value)


def common(model: Section, section: Section) -> dict[str, Any]:
    """Fields that `ViT` and `TextTransformer` share. model: a `model_cfg`; section: the tower's."""
    activation = "quick_gelu" if model.flag("quick_gelu", False) else "gelu"
    if kwargs := section.get("act_kwargs"):
        if kwargs != {"approximate": "tanh"} or activation == "quick_gelu":
            raise ConfigError(section.at("act_kwargs"), repr(kwargs), "{'approximate': 'tanh'}")
        activation = "gelu_tanh"
    norm = section.section("norm_kwargs")
    eps = norm.number("eps", 1e-5)
    if unknown := norm.unread():
        raise ConfigError(section.at("norm_kwargs"), unknown[0].split(" in the")[0], "eps alone")
    return {"embed_dim": model.size("embed_dim"), "activation": activation, "norm_eps": eps}
