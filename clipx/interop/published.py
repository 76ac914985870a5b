"""The `config.json` of text encoders that open_clip's published models name without shipping one.

Facts of the Hub's files, without what is a default of transformers or changes no feature.
"""

from __future__ import annotations

from typing import Any

_XLM = {
    "model_type": "xlm-roberta",
    "vocab_size": 250002,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "pad_token_id": 1,
}
_MT5 = {
    "model_type": "mt5",
    "vocab_size": 250112,
    "d_kv": 64,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
_NLLB = {
    "model_type": "m2m_100",
    "vocab_size": 256206,
    "d_model": 1024,
    "encoder_attention_heads": 16,
    "decoder_attention_heads": 16,
    "activation_function": "relu",
    "max_position_embeddings": 1024,
    "scale_embedding": True,
    "pad_token_id": 1,
    "eos_token_id": 2,
}


def _sizes(width: int, depth: int, heads: int, mlp: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": mlp,
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "roberta-base": _XLM
    | {"model_type": "roberta", "vocab_size": 50265}
    | _sizes(768, 12, 12, 3072),
    "xlm-roberta-base": _XLM | _sizes(768, 12, 12, 3072),
    "xlm-roberta-large": _XLM | _sizes(1024, 24, 16, 4096),
    "google/mt5-base": _MT5 | {"d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12},
    "google/mt5-xl": _MT5 | {"d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32},
    "facebook/nllb-200-distilled-600M": _NLLB
    | {"encoder_layers": 12, "decoder_layers": 12, "encoder_ffn_dim": 4096},
    "facebook/nllb-200-distilled-1.3B": _NLLB
    | {"encoder_layers": 24, "decoder_layers": 24, "encoder_ffn_dim": 8192},
}
