"""The encoders of mT5 and of M2M100 (NLLB) in transformers (5, `modeling_mt5.py`,
`modeling_m2m_100.py`): names and layouts of their arrays, and how their `config.json` is read and
written. M2M100's is a `TextTransformer`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from clipx.errors import ConfigError, NotExpressible
from clipx.interop import rules
from clipx.interop.rules import Rule
from clipx.interop.settings import Section, keys
from clipx.models.t5 import T5
from clipx.models.text import TextTransformer

HARMLESS = keys(
    "num_decoder_layers dropout_rate dense_act_fn is_gated_act eos_token_id decoder_layers "
    "decoder_attention_heads decoder_ffn_dim decoder_layerdrop encoder_layerdrop init_std "
    "activation_dropout num_hidden_layers layer_norm_epsilon tokenizer_class n_positions "
    "output_past bos_token_id scale_decoder_outputs num_heads d_kv"
)
_EPS = 1e-5  # of M2M100's norms
_FIRST = 2  # rows of M2M100's table of positions before that of a text's first token


def read_t5(config: Section) -> dict[str, Any]:
    """Fields of a `T5`. Raises `ConfigError` for settings that it does not have."""
    config.one_of("feed_forward_proj", ("gated-gelu",), "gated-gelu")
    config.one_of("relative_attention_max_distance", (128,), 128)
    return {
        "vocab_size": config.size("vocab_size", 250112),
        "width": config.size("d_model", 512),
        "depth": config.depth("num_layers", 8),
        "heads": config.size("num_heads", 6),
        "head_width": config.size("d_kv", 64),
        "mlp_width": config.size("d_ff", 1024),
        "relative_buckets": config.size("relative_attention_num_buckets", 32),
        "norm_eps": config.number("layer_norm_epsilon", 1e-6),
        "pad_id": config.whole("pad_token_id", 0),
        "eot_id": config.whole("eos_token_id", 1),
    }


def write_t5(text: T5) -> dict[str, Any]:
    """The content of the `config.json` from which transformers builds the tower."""
    return {
        "model_type": "mt5",
        "is_encoder_decoder": True,
        "vocab_size": text.vocab_size,
        "d_model": text.width,
        "num_layers": text.depth,
        "num_decoder_layers": 1,  # which open_clip builds and drops
        "num_heads": text.heads,
        "d_kv": text.head_width,
        "d_ff": text.mlp_width,
        "feed_forward_proj": "gated-gelu",
        "relative_attention_num_buckets": text.relative_buckets,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": text.norm_eps,
        "pad_token_id": text.pad_id,
        "eos_token_id": text.eot_id,
    }


def t5_rules(text: T5, theirs: str) -> list[Rule]:
    """The rules of a tower's arrays below its dense layer. theirs: prefix, with its dot."""
    ours, first = "params/text", f"{theirs}block.0.layer.0.SelfAttention"
    found = [
        rules.same(f"{ours}/token_embedding", f"{theirs}embed_tokens.weight"),
        rules.same(f"{ours}/relative_bias", f"{first}.relative_attention_bias.weight"),
        rules.same(f"{ours}/ln_final/scale", f"{theirs}final_layer_norm.weight"),
    ]
    for i in range(text.depth):
        a, b = f"{ours}/block_{i}", f"{theirs}block.{i}.layer"
        attn, mlp = f"{b}.0.SelfAttention", f"{b}.1.DenseReluDense"
        names = tuple(f"{attn}.{name}" for name in "qkv")
        found += [
            rules.heads_in((f"{a}/attn/qkv",), names, text.heads, (3,))[0],
            rules.heads_out(f"{a}/attn/out", f"{attn}.o", text.heads)[0],
            rules.same(f"{a}/ln_1/scale", f"{b}.0.layer_norm.weight"),
            rules.same(f"{a}/ln_2/scale", f"{b}.1.layer_norm.weight"),
            rules.transposed(f"{a}/mlp/gate/kernel", f"{mlp}.wi_0.weight"),
            rules.transposed(f"{a}/mlp/fc/kernel", f"{mlp}.wi_1.weight"),
            rules.transposed(f"{a}/mlp/proj/kernel", f"{mlp}.wo.weight"),
        ]
    return found


def is_m2m(text: TextTransformer) -> bool:
    """Whether the tower is built like M2M100's encoder."""
    settings = (text.activation, text.pool, text.causal, text.mask_padding)
    return settings == ("relu", "first", False, True)


def read_m2m(config: Section) -> dict[str, Any]:
    """Fields of a `TextTransformer`. Raises `ConfigError` for settings that it does not have."""
    config.one_of("activation_function", ("relu",), "relu")
    config.one_of("scale_embedding", (True,), True)
    width = config.size("d_model", 1024)
    return {
        "vocab_size": config.size("vocab_size", 128112),
        "width": width,
        "depth": config.depth("encoder_layers", 12),
        "heads": config.size("encoder_attention_heads", 16),
        "mlp_ratio": config.size("encoder_ffn_dim", 4096) / width,
        "pad_id": config.one_of("pad_token_id", (1,), 1),
        "eot_id": config.whole("eos_token_id", 2),
        "causal": False,
        "mask_padding": True,
        "pool": "first",
        "activation": "relu",
        "norm_eps": _EPS,
    }


def write_m2m(text: TextTransformer) -> dict[str, Any]:
    """The content of the `config.json` from which transformers builds the tower."""
    if text.norm_eps != _EPS or text.pad_id != 1:
        raise NotExpressible(f"transformers' M2M100 has norm_eps={_EPS} and pads with 1")
    return {
        "model_type": "m2m_100",
        "is_encoder_decoder": True,
        "vocab_size": text.vocab_size,
        "d_model": text.width,
        "encoder_layers": text.depth,
        "decoder_layers": 1,  # which open_clip builds and drops
        "encoder_attention_heads": text.heads,
        "decoder_attention_heads": text.heads,
        "encoder_ffn_dim": round(text.width * text.mlp_ratio),
        "activation_function": "relu",
        "scale_embedding": True,
        "max_position_embeddings": max(text.context, 1024),
        "pad_token_id": 1,
        "eos_token_id": text.eot_id,
    }


def m2m_rules(text: TextTransformer, theirs: str) -> list[Rule]:
    """The rules of a tower's arrays. theirs: prefix, with its dot. transformers multiplies each
    token's embedding by the root of the width, and computes the positions."""
    ours, scale = "params/text", math.sqrt(text.width)
    embedding = rules.same(f"{ours}/token_embedding", f"{theirs}embed_tokens.weight")
    found = [
        *rules.scaled([embedding], 1 / scale),
        Rule((f"{ours}/positional_embedding",), (), _known(text), lambda: (positions(text),)),
        *rules.norm(f"{ours}/ln_final", f"{theirs}layer_norm"),
    ]
    for i in range(text.depth):
        a, b = f"{ours}/transformer/block_{i}", f"{theirs}layers.{i}"
        names = tuple(f"{b}.self_attn.{name}_proj" for name in "qkv")
        found += [
            *rules.heads_in((f"{a}/attn/qkv",), names, text.heads, (3,)),
            *rules.heads_out(f"{a}/attn/out", f"{b}.self_attn.out_proj", text.heads),
            *rules.norm(f"{a}/ln_1", f"{b}.self_attn_layer_norm"),
            *rules.norm(f"{a}/ln_2", f"{b}.final_layer_norm"),
            *rules.dense(f"{a}/mlp/fc", f"{b}.fc1"),
            *rules.dense(f"{a}/mlp/proj", f"{b}.fc2"),
        ]
    return found


def positions(text: TextTransformer) -> np.ndarray:
    """[context, width] M2M100's sines and cosines, from a text's first token on."""
    half = text.width // 2
    if text.width % 2 or half < 2:
        raise ConfigError("config.json: d_model", str(text.width), "an even number above 2")
    scale = np.float32(math.log(10_000) / (half - 1))
    bands = np.exp(np.arange(half, dtype=np.float32) * -scale)
    angles = np.arange(_FIRST, text.context + _FIRST, dtype=np.float32)[:, None] * bands
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def _known(text: TextTransformer) -> Any:
    def out(table: np.ndarray) -> tuple[()]:
        if not np.allclose(table, positions(text), atol=1e-5):
            raise NotExpressible(
                "transformers' M2M100 has fixed positions, and this tower's have been trained "
                "(keep them with config.optimizer.freeze)"
            )
        return ()

    return out
