"""BERT and its kin in transformers: names and layouts of their arrays, and how their `config.json`
is read and written (transformers 5, `modeling_bert.py`, `modeling_roberta.py`,
`modeling_distilbert.py`, `modeling_mpnet.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from clipx.errors import ConfigError, NotExpressible
from clipx.interop import rules
from clipx.interop.rules import Rule
from clipx.interop.settings import Section, keys
from clipx.models.bert import BERT

# names of activations in transformers, the one to write first
ACTIVATIONS = {
    "gelu": ("gelu", "gelu_python"),
    "gelu_tanh": ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_python_tanh"),
    "quick_gelu": ("quick_gelu",),
    "relu": ("relu",),
}
# keys of their configs that change no output, beside those of huggingface_layout: of heads, of a
# pooler that nobody uses, ids of marks
HARMLESS = keys(
    "directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers "
    "pooler_size_per_head pooler_type qa_dropout seq_classif_dropout tie_weights_ output_past "
    "eos_token_id cls_token_id mask_token_id"
)


class Family(NamedTuple):
    """What one `model_type` calls its arrays and its settings, and its defaults."""

    layer: str  # of a block's arrays, followed by its number
    qkv: tuple[str, str, str]
    out: str
    norm_attn: str
    fc: str
    proj: str
    norm_mlp: str
    keys: Mapping[str, str]  # our names of settings: theirs
    defaults: Mapping[str, Any]  # of their settings
    # rows of the position table in front of the first token's: 0, or 1 + that of padding
    padded: bool = False


_SIZES = {
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp": "intermediate_size",
    "activation": "hidden_act",
    "dropout": "hidden_dropout_prob",
}
_BERT = Family(
    layer="encoder.layer",
    qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
    out="attention.output.dense",
    norm_attn="attention.output.LayerNorm",
    fc="intermediate.dense",
    proj="output.dense",
    norm_mlp="output.LayerNorm",
    keys=_SIZES,
    defaults={"vocab_size": 30522, "pad_token_id": 0},
)
_ROBERTA = _BERT._replace(defaults={"vocab_size": 50265, "pad_token_id": 1}, padded=True)
FAMILIES = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "mpnet": _BERT._replace(
        qkv=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
        out="attention.attn.o",
        norm_attn="attention.LayerNorm",
        defaults={"vocab_size": 30527, "pad_token_id": 1},
        padded=True,
    ),
    "distilbert": Family(
        layer="transformer.layer",
        qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        out="attention.out_lin",
        norm_attn="sa_layer_norm",
        fc="ffn.lin1",
        proj="ffn.lin2",
        norm_mlp="output_layer_norm",
        keys={
            "width": "dim",
            "depth": "n_layers",
            "heads": "n_heads",
            "mlp": "hidden_dim",
            "activation": "activation",
            "dropout": "dropout",
        },
        defaults={"vocab_size": 30522, "pad_token_id": 0, "n_layers": 6},
    ),
}
_EPS = 1e-12  # the default of all, and what DistilBERT always has


def layout(tower: BERT, kind: str, ours: str, theirs: str = "", pad_id: int = 0) -> list[Rule]:
    """The rules of a tower's arrays below its dense layer. kind: the `model_type`. ours: the path
    of the tower's params. theirs: prefix of the names, with its dot. pad_id: of the file."""
    family = FAMILIES[kind]
    tables = {"token": "word"} | ({"type": "token_type"} if tower.segments else {})
    embeddings = f"{theirs}embeddings"
    found = [
        *(
            rules.same(f"{ours}/{a}_embedding", f"{embeddings}.{b}_embeddings.weight")
            for a, b in tables.items()
        ),
        _positions(
            f"{ours}/positional_embedding",
            f"{embeddings}.position_embeddings.weight",
            pad_id + 1 if family.padded else 0,
        ),
        *rules.norm(f"{ours}/ln_embedding", f"{embeddings}.LayerNorm"),
    ]
    if tower.pool == "pooler":
        found += rules.dense(f"{ours}/pooler", f"{theirs}pooler.dense")
    if tower.relative_buckets:
        bias = f"{theirs}encoder.relative_attention_bias.weight"
        found.append(rules.same(f"{ours}/relative_bias", bias))
    for i in range(tower.depth):
        a, b = f"{ours}/block_{i}", f"{theirs}{family.layer}.{i}"
        names = tuple(f"{b}.{name}" for name in family.qkv)
        found += [
            *rules.heads_in((f"{a}/attn/qkv",), names, tower.heads, (3,)),
            *rules.heads_out(f"{a}/attn/out", f"{b}.{family.out}", tower.heads),
            *rules.norm(f"{a}/ln_attn", f"{b}.{family.norm_attn}"),
            *rules.dense(f"{a}/mlp/fc", f"{b}.{family.fc}"),
            *rules.dense(f"{a}/mlp/proj", f"{b}.{family.proj}"),
            *rules.norm(f"{a}/ln_mlp", f"{b}.{family.norm_mlp}"),
        ]
    return found


def _positions(ours: str, theirs: str, first: int) -> Rule:
    """The table of positions, which in the file has `first` rows more in front."""

    def out(x: np.ndarray) -> tuple[np.ndarray]:
        return (np.concatenate([np.zeros((first, x.shape[1]), x.dtype), x]),)

    return Rule((ours,), (theirs,), out, lambda x: (x[first:],))


def read_config(config: Section, where: str) -> tuple[str, int, dict[str, Any]]:
    """(`model_type`, id of padding, fields of a `BERT`) of a `config.json`. The fields are those
    that the file tells: neither `context` nor `pool`.

    Raises `ConfigError` at `where` for another model, and for settings that no BERT of clipx has.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        expected = f"model_type {', '.join(FAMILIES)}"
        raise ConfigError(where, f"{config.where} with model_type {kind!r}", expected)
    family = FAMILIES[kind]
    names, defaults = family.keys, family.defaults
    for key in ("is_decoder", "add_cross_attention"):
        config.one_of(key, (False,), False)
    config.one_of("position_embedding_type", ("absolute",), "absolute")
    width = config.size(names["width"], 768)
    known = {theirs: ours for ours, all_ in ACTIVATIONS.items() for theirs in all_}
    pad_id = config.whole("pad_token_id", defaults["pad_token_id"])
    fields: dict[str, Any] = {
        "vocab_size": config.size("vocab_size", defaults["vocab_size"]),
        "positions": config.size("max_position_embeddings", 512),
        "width": width,
        "depth": config.depth(names["depth"], defaults.get("n_layers", 12)),
        "heads": config.size(names["heads"], 12),
        "mlp_ratio": config.size(names["mlp"], 3072) / width,
        "activation": known[config.one_of(names["activation"], known, "gelu")],
        "dropout": config.rate(names["dropout"], 0.1),
        "segments": 0,
    }
    if family.padded:
        if kind == "mpnet" and pad_id != 1:
            raise ConfigError(config.at("pad_token_id"), str(pad_id), "1, as MPNet always pads")
        fields["positions"] -= pad_id + 1
    if kind == "distilbert":
        config.flag("sinusoidal_pos_embds", False)  # how the table was made, which the file has
        fields["norm_eps"] = _EPS
        return kind, pad_id, fields
    fields["norm_eps"] = config.number("layer_norm_eps", _EPS)
    if kind == "mpnet":
        # transformers uses 32 whatever the config says
        fields["relative_buckets"] = config.one_of("relative_attention_num_buckets", (32,), 32)
    else:
        fields["segments"] = config.size("type_vocab_size", 2)
    return kind, pad_id, fields


def kind_of(tower: Any) -> str:
    """The `model_type` that expresses a tower: "bert" wherever it can. Raises `NotExpressible`."""
    if tower.relative_buckets:
        if tower.segments or tower.relative_buckets != 32 or tower.pad_id != 1:
            raise NotExpressible("transformers' MPNet has 32 buckets, no segments, and pads with 1")
        return "mpnet"
    if tower.segments:
        # RoBERTa counts positions from the id of padding
        return "roberta" if (tower.segments, tower.pad_id) == (1, 1) else "bert"
    if tower.norm_eps != _EPS or tower.pool == "pooler":
        raise NotExpressible(
            "a BERT of transformers has segments; its DistilBERT has none, and then no pooler and "
            f"norm_eps={_EPS}"
        )
    return "distilbert"


def write_config(tower: Any, kind: str) -> dict[str, Any]:
    """The content of the `config.json` from which transformers builds the tower."""
    family = FAMILIES[kind]
    first = tower.pad_id + 1 if family.padded else 0
    values = {
        "width": tower.width,
        "depth": tower.depth,
        "heads": tower.heads,
        "mlp": round(tower.width * tower.mlp_ratio),
        "activation": ACTIVATIONS[tower.activation][0],
        "dropout": tower.dropout,
    }
    eps = {} if kind == "distilbert" else {"layer_norm_eps": tower.norm_eps}
    return {
        "model_type": kind,
        "vocab_size": tower.vocab_size,
        **{family.keys[name]: value for name, value in values.items()},
        "max_position_embeddings": tower.positions + first,
        **({"type_vocab_size": tower.segments} if tower.segments else {}),
        **eps,
        "pad_token_id": tower.pad_id,
        "sep_token_id": tower.eot_id,
    }
