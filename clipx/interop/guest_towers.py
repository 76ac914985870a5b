"""Reads the image towers that open_clip builds through timm, from its config's section and the
folder's `config.json`. `guests.py` has their arrays."""

from __future__ import annotations

from typing import Any

from clipx.errors import ConfigError
from clipx.interop import timm_models
from clipx.interop.settings import Section
from clipx.models.base import Tower


def image_tower(section: Section, embed_dim: int, size: int, given: Any) -> Tower:
    """The tower that timm builds from open_clip's `vision_cfg`.

    size: pixels of an image's side. given: the content of the folder's `config.json`, which the
    section may point at. Raises `ConfigError` for a timm model that clipx does not have.
    """
    name = str(section.get("timm_model_name"))
    biased = section.flag("timm_proj_bias", False)
    projection = section.one_of("timm_proj", ("linear", "mlp", "none", ""), "linear")
    # the network's own classifier is the projection where the config sets none
    own = projection == "" or "timm_proj" in section and section.get("timm_proj") is None
    pool = section.get("timm_pool", "avg") or None
    for key in ("layers", "width", "head_width", "mlp_ratio", "patch_size"):
        section.get(key)  # which the model's name overrides
    where = section.at("timm_model_name")
    given_args: dict[str, Any] = {}
    if name.startswith("local-dir:"):
        config = Section(given, "config.json")
        name = str(config.get("architecture"))
        given_args = dict(config.get("model_args", {}))
    if (own or projection == "none") and pool:
        given_args["global_pool"] = pool  # which the network is made with
    args = Section(given_args, where, harmless=timm_models.HARMLESS)
    found = timm_models.build(name, args, size, where, pool)
    if unknown := args.unread():
        raise ConfigError("config.json: model_args", unknown[0], "arguments that clipx knows")
    if not found.common:
        stated = f"{name!r} with positions or biases of another layout than in clipx's exports"
        raise ConfigError(where, stated, timm_models.KNOWN)
    fields: dict[str, Any] = {"embed_dim": 0 if projection == "none" and not own else embed_dim}
    fields["projection_bias"] = (own or biased) and bool(fields["embed_dim"])
    way = "own" if own else projection
    if way not in found.projections:
        known = ", ".join("null" if x == "own" else repr(x) for x in found.projections)
        raise ConfigError(section.at("timm_proj"), repr(projection), f"{known} for {name!r}")
    if way == "mlp":
        fields["hidden"] = 2 * embed_dim
    return found.tower.clone(**fields)
