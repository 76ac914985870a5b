"""Reads the towers that open_clip builds through timm or transformers, from its config's sections
and the folder's `config.json`. `guests.py` has their arrays."""

from __future__ import annotations

from typing import Any

from clipx.errors import ConfigError
from clipx.interop import bert_layout, timm_models
from clipx.interop.guests import POOLERS
from clipx.interop.huggingface_layout import HARMLESS
from clipx.interop.settings import Section, keys
from clipx.models.base import Tower
from clipx.models.bert import BERT

# what else a `config.json` with a BERT may hold: timm's part
_BERT_HARMLESS = bert_layout.HARMLESS | keys(
    "architecture model_args num_classes num_features global_pool pretrained_cfg"
)


def image_tower(section: Section, embed_dim: int, size: int, given: Any) -> Tower:
    """The tower that timm builds from open_clip's `vision_cfg`.

    size: pixels of an image's side. given: the content of the folder's `config.json`, which the
    section may point at. Raises `ConfigError` for a timm model that clipx does not have.
    """
    name = str(section.get("timm_model_name"))
    biased = section.flag("timm_proj_bias", False)
    projection = section.one_of("timm_proj", ("linear", "none"), "linear")
    for key in ("layers", "width", "head_width", "mlp_ratio", "patch_size"):
        section.get(key)  # which the model's name overrides
    where = section.at("timm_model_name")
    args = Section({}, where)
    if name.startswith("local-dir:"):
        config = Section(given, "config.json")
        name, args = (
            str(config.get("architecture")),
            config.section("model_args", timm_models.HARMLESS),
        )
    found = timm_models.build(name, args, size, where, section.get("timm_pool", "avg"))
    if unknown := args.unread():
        raise ConfigError("config.json: model_args", unknown[0], "arguments that clipx knows")
    if not found.common:
        stated = f"{name!r} with positions or biases of another layout than in clipx's exports"
        raise ConfigError(where, stated, timm_models.KNOWN)
    width = embed_dim if projection == "linear" else 0
    return found.tower.clone(embed_dim=width, projection_bias=biased and bool(width))


def text_tower(section: Section, embed_dim: int, given: Any) -> BERT:
    """The BERT that transformers builds from open_clip's `text_cfg` and `given`, the content of the
    folder's `config.json`. Raises `ConfigError` for another model."""
    guest = Section(given, "config.json", harmless=HARMLESS | _BERT_HARMLESS)
    if guest.get("model_type") != "bert":
        name = section.get("hf_model_name")
        found = f"{name!r}, but no config.json of a BERT in the folder"
        raise ConfigError(section.at("hf_model_name"), found, "a BERT with its config.json there")
    pools = {theirs: ours for ours, theirs in POOLERS.items()}
    pool: Any = pools[section.one_of("hf_pooler_type", pools, "mean_pooler")]
    section.one_of("hf_proj_type", ("linear",), "mlp")
    for key in ("vocab_size", "width", "heads", "layers"):
        section.get(key)  # which config.json overrides
    _, pad_id, fields = bert_layout.read_config(guest, "config.json")
    tower = BERT(
        **fields,
        pool=pool,
        context=section.size("context_length", 77),
        pad_id=pad_id,
        eot_id=guest.whole("sep_token_id", BERT.eot_id),
        embed_dim=embed_dim,
    )
    if unknown := guest.unread():
        raise ConfigError("config.json", unknown[0], "settings that clipx knows")
    return tower
