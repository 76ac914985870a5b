"""Text towers that open_clip builds through transformers: BERT, RoBERTa, and the encoders of mT5
and of M2M100 (NLLB).

An export has a `config.json` for them, and open_clip's config the full path of its folder, because
open_clip does not pass its own folder on to transformers. The models that open_clip has published
have none: `published.py` knows theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from clipx.errors import ConfigError, NotExpressible
from clipx.interop import bert_layout, published, rules, t5_layout
from clipx.interop.guests import head
from clipx.interop.huggingface_layout import HARMLESS
from clipx.interop.model import Model, check_bias
from clipx.interop.open_clip_layout import Layout
from clipx.interop.rules import Rule
from clipx.interop.settings import Section, keys
from clipx.models.base import Tower
from clipx.models.bert import BERT
from clipx.models.t5 import T5
from clipx.models.text import TextTransformer

# our pooling and open_clip's. Its max_pooler leaves out words in place of padding.
POOLERS = {
    "pooler": "cls_pooler",
    "cls": "cls_last_hidden_state_pooler",
    "mean": "mean_pooler",
}
# what else a `config.json` may hold: timm's part
_HARMLESS = HARMLESS | keys(
    "architecture model_args num_classes num_features global_pool pretrained_cfg"
)
_TRANSFORMER = "text.transformer."


def _section(model: Model, folder: str, pooler: str, hidden: int) -> dict[str, Any]:
    """A tower's section. hidden: channels of the layer between pooling and projection."""
    text = model.text
    middle = (text.width + model.width) // 2
    if hidden not in (0, middle):
        raise NotExpressible(
            f"open_clip's layer between pooling and projection has {middle} channels, and this one "
            f"{hidden}"
        )
    return {
        "context_length": text.context,
        "vocab_size": text.vocab_size,
        "hf_model_name": folder,
        "hf_model_pretrained": False,
        "hf_tokenizer_name": ".",
        "hf_proj_type": _way(text, model.width, hidden),
        "hf_pooler_type": pooler,
    }


def _way(text: Any, width: int, hidden: int) -> str | None:
    """open_clip's name of what follows the pooling; None for nothing."""
    if not text.embed_dim and text.backbone_width == width:
        return None
    return "mlp" if hidden else "linear"


def _bert_section(model: Model, folder: str) -> dict[str, Any]:
    text = model.text
    kind = bert_layout.kind_of(text)
    if kind not in ("bert", "roberta"):
        raise NotExpressible(f"open_clip does not build a {kind} of transformers")
    if text.pool not in POOLERS:
        raise NotExpressible(f"open_clip cannot pool a text by {text.pool!r}")
    layer = (text.dense_bias, text.dense_activation, bool(text.embed_dim))
    if text.dense_width and layer != (False, "gelu", True):
        raise NotExpressible(
            "open_clip has no dense layer between pooling and projection but one without a bias, "
            "with GELU"
        )
    # `normalize` is left out: a projection without bias keeps every cosine
    return _section(model, folder, POOLERS[text.pool], text.dense_width)


def _t5_section(model: Model, folder: str) -> dict[str, Any]:
    pooler = "mean_pooler" if model.text.pool == "mean" else "cls_pooler"
    return _section(model, folder, pooler, model.text.dense_width)


def _m2m_section(model: Model, folder: str) -> dict[str, Any]:
    return _section(model, folder, "cls_pooler", 0)


def _projected(
    own: Callable[[Any], list[Rule]],
) -> Callable[[Any, int, int | None], list[Rule]]:
    """The rules of a tower: `own` of it, and those of what follows the pooling."""

    def found(text: Any, width: int, dropped: int | None) -> list[Rule]:
        check_bias(text, "text")
        layout, name = own(text), "text.proj"
        if getattr(text, "dense_width", 0):
            layout += rules.dense("params/text/dense", "text.proj.0", bias=False)
            name = "text.proj.2"
        return layout + head(text, width, "params/text/projection", name)

    return found


def _bert_rules(text: BERT) -> list[Rule]:
    kind = bert_layout.kind_of(text)
    return bert_layout.layout(text, kind, "params/text", _TRANSFORMER, text.pad_id)


BERT_LAYOUT = Layout(
    _bert_section,
    _projected(_bert_rules),
    lambda model: bert_layout.write_config(model.text, bert_layout.kind_of(model.text)),
)
T5_LAYOUT = Layout(
    _t5_section,
    _projected(lambda text: t5_layout.t5_rules(text, _TRANSFORMER)),
    lambda model: t5_layout.write_t5(model.text),
)
M2M_LAYOUT = Layout(
    _m2m_section,
    _projected(lambda text: t5_layout.m2m_rules(text, _TRANSFORMER)),
    lambda model: t5_layout.write_m2m(model.text),
)


def text_tower(section: Section, embed_dim: int, given: Any) -> Tower:
    """The tower that transformers builds from open_clip's `text_cfg` and `given`, the content of
    the folder's `config.json`; without one, from what `published.py` knows. Raises `ConfigError`
    for another model."""
    name = section.get("hf_model_name")
    values = given if isinstance(given, Mapping) and "model_type" in given else None
    where = "config.json" if values else section.at("hf_model_name")
    values = values or published.CONFIGS.get(str(name))
    kinds: dict[str, Callable[..., Tower]] = {"mt5": _t5, "m2m_100": _m2m}
    kinds |= dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert"), _bert)
    kind = (values or {}).get("model_type")
    if values is None or kind not in kinds:
        stated = "no config.json of transformers in the folder" if values is None else repr(kind)
        expected = f"a {' or '.join(kinds)} with its config.json there, or one of "
        raise ConfigError(
            section.at("hf_model_name"),
            f"{name!r}, but {stated}",
            expected + ", ".join(published.CONFIGS),
        )
    for key in ("vocab_size", "width", "heads", "layers"):
        section.get(key)  # which config.json overrides
    more = bert_layout.HARMLESS if kinds[kind] is _bert else t5_layout.HARMLESS
    guest = Section(values, where, harmless=_HARMLESS | more)
    tower = kinds[kind](guest, section, embed_dim)
    if unknown := guest.unread():
        raise ConfigError(where, unknown[0], "settings that clipx knows")
    return tower


def _common(section: Section, width: int, embed_dim: int) -> tuple[dict[str, Any], int]:
    """(fields that all towers have, channels of the layer between pooling and projection)."""
    given: dict[str, Any] = {"context": section.size("context_length", 77), "embed_dim": embed_dim}
    none = "hf_proj_type" in section and section.get("hf_proj_type") is None
    if none and width == embed_dim:
        return given | {"embed_dim": 0}, 0
    way = section.one_of("hf_proj_type", ("linear", "mlp"), "linear" if none else "mlp")
    return given, (width + embed_dim) // 2 if way == "mlp" else 0


def _bert(guest: Section, section: Section, embed_dim: int) -> BERT:
    kind, pad_id, fields = bert_layout.read_config(guest, guest.where)
    pools = {theirs: ours for ours, theirs in POOLERS.items()}
    pool: Any = pools[section.one_of("hf_pooler_type", pools, "mean_pooler")]
    common, hidden = _common(section, fields["width"], embed_dim)
    layer = {"dense_width": hidden, "dense_bias": False, "dense_activation": "gelu"}
    tower = BERT(
        **fields,
        **common,
        **(layer if hidden else {}),
        pool=pool,
        pad_id=pad_id,
        eot_id=guest.whole("sep_token_id", BERT.eot_id if kind == "bert" else 2),
    )
    if (kind == "bert") != (bert_layout.kind_of(tower) == "bert"):
        found = f"{kind!r} with {fields['segments']} segments and padding by {pad_id}"
        raise ConfigError(guest.at("model_type"), found, "the published model's settings")
    return tower


def _t5(guest: Section, section: Section, embed_dim: int) -> T5:
    pools = {"mean_pooler": "mean", "cls_pooler": "first", "cls_last_hidden_state_pooler": "first"}
    pool: Any = pools[section.one_of("hf_pooler_type", pools, "mean_pooler")]
    fields = t5_layout.read_t5(guest)
    common, hidden = _common(section, fields["width"], embed_dim)
    return T5(**fields, **common, pool=pool, dense_width=hidden)


def _m2m(guest: Section, section: Section, embed_dim: int) -> TextTransformer:
    known = ("cls_pooler", "cls_last_hidden_state_pooler")
    section.one_of("hf_pooler_type", known, "mean_pooler")
    fields = t5_layout.read_m2m(guest)
    common, hidden = _common(section, fields["width"], embed_dim)
    if hidden:
        raise ConfigError(section.at("hf_proj_type"), "'mlp'", "'linear'")
    guest.get("max_position_embeddings")  # positions have a formula
    return TextTransformer(**fields, **common)
