"""The towers of transformers' `CLIPModel` and `SiglipModel`: names and layouts of their arrays, and
how their configs are read (transformers 5, `modeling_clip.py`, `modeling_siglip.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from clipx.errors import ConfigError
from clipx.interop import rules
from clipx.interop.model import check_bias, vit_shape
from clipx.interop.rules import Rule
from clipx.interop.settings import Section, keys
from clipx.models.base import Tower
from clipx.models.text import TextTransformer
from clipx.models.vit import ViT

CONFIG = "config.json"
# keys of transformers' configs that change no feature and no logit
HARMLESS = keys(
    "model_type architectures transformers_version torch_dtype dtype _name_or_path _commit_hash "
    "_attn_implementation_autoset _attn_implementation attn_implementation name_or_path "
    "initializer_range initializer_factor logit_scale_init_value projection_dim "
    "attention_dropout dropout hidden_dropout_prob attention_probs_dropout_prob "
    "gradient_checkpointing use_cache return_dict output_hidden_states output_attentions "
    "torchscript use_bfloat16 tf_legacy_loss chunk_size_feed_forward tie_word_embeddings "
    "pad_token_id bos_token_id sep_token_id decoder_start_token_id tokenizer_class prefix "
    "is_encoder_decoder is_decoder add_cross_attention cross_attention_hidden_size "
    "tie_encoder_decoder finetuning_task id2label label2id num_labels problem_type "
    "task_specific_params max_length min_length do_sample early_stopping num_beams "
    "num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty "
    "length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids "
    "num_return_sequences output_scores return_dict_in_generate forced_bos_token_id "
    "forced_eos_token_id remove_invalid_values exponential_decay_length_penalty "
    "suppress_tokens begin_suppress_tokens classifier_dropout"
)
ACTIVATIONS = {
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
}


def tower_rules(
    image: ViT, text: TextTransformer, width: int, dropped: int | None, siglip: bool
) -> list[Rule]:
    """The rules of both towers, for a shared space of `width` channels. dropped: the row that the
    exported token embedding leaves out."""
    return [
        *(siglip_vision(image) if siglip else clip_vision(image, width)),
        *_text_rules(text, width, dropped, siglip),
    ]


def _blocks(ours: str, theirs: str, depth: int, heads: int) -> list[Rule]:
    layout = []
    for i in range(depth):
        a, b = f"{ours}/transformer/block_{i}", f"{theirs}.encoder.layers.{i}"
        names = tuple(f"{b}.self_attn.{n}_proj" for n in "qkv")
        layout += [
            *rules.norm(f"{a}/ln_1", f"{b}.layer_norm1"),
            *rules.heads_in((f"{a}/attn/qkv",), names, heads, (3,)),
            *rules.heads_out(f"{a}/attn/out", f"{b}.self_attn.out_proj", heads),
            *rules.norm(f"{a}/ln_2", f"{b}.layer_norm2"),
            *rules.dense(f"{a}/mlp/fc", f"{b}.mlp.fc1"),
            *rules.dense(f"{a}/mlp/proj", f"{b}.mlp.fc2"),
        ]
    return layout


def clip_vision(image: ViT, width: int) -> list[Rule]:
    """The image tower of `CLIPModel`, and its projection."""
    a, b = "params/image", "vision_model"
    _, depth, heads, *_ = image.shape
    layout = [
        rules.conv(f"{a}/patch_embedding", f"{b}.embeddings.patch_embedding"),
        rules.same(f"{a}/class_embedding", f"{b}.embeddings.class_embedding"),
        rules.same(f"{a}/positional_embedding", f"{b}.embeddings.position_embedding.weight"),
        *rules.norm(f"{a}/ln_pre", f"{b}.pre_layrnorm"),  # transformers' spelling
        *_blocks(a, b, depth, heads),
        *rules.norm(f"{a}/ln_post", f"{b}.post_layernorm"),
    ]
    return layout + projection(image, f"{a}/projection", "visual_projection", width)


def projection(tower: Tower, ours: str, theirs: str, width: int) -> list[Rule]:
    """A projection to `width` channels; a copy for a tower without one."""
    check_bias(tower, ours.split("/")[1])
    if tower.embed_dim:
        return rules.dense(ours, theirs, bias=False)
    copy = rules.identity(width, tower.backbone_width)
    return [rules.constant(f"{theirs}.weight", copy)]


def siglip_vision(image: ViT) -> list[Rule]:
    """The image tower of `SiglipModel`."""
    a, b = "params/image", "vision_model"
    width, depth, heads, *_ = image.shape
    pool, head = f"{a}/pool", f"{b}.head"
    # clipx's patch embedding has no bias: every patch gets the same one, so reading adds it to
    # every position, and writing gives zeros
    positions = Rule(
        (f"{a}/positional_embedding",),
        (f"{b}.embeddings.position_embedding.weight", f"{b}.embeddings.patch_embedding.bias"),
        lambda x: (x, np.zeros(width, np.float32)),
        lambda x, bias: (x + bias,),
    )
    pooled = (f"{pool}/attn/q", f"{pool}/attn/kv")
    return [
        rules.conv(f"{a}/patch_embedding", f"{b}.embeddings.patch_embedding"),
        positions,
        *_blocks(a, b, depth, heads),
        *rules.norm(f"{a}/ln_post", f"{b}.post_layernorm"),
        Rule((f"{pool}/probe",), (f"{head}.probe",), lambda x: (x[None],), lambda x: (x[0],)),
        *rules.heads_in(pooled, (f"{head}.attention.in_proj",), heads, (1, 2), "_"),
        *rules.dense(f"{pool}/out", f"{head}.attention.out_proj"),
        *rules.norm(f"{pool}/ln", f"{head}.layernorm"),
        *rules.dense(f"{pool}/mlp/fc", f"{head}.mlp.fc1"),
        *rules.dense(f"{pool}/mlp/proj", f"{head}.mlp.fc2"),
    ]


def _text_rules(text: TextTransformer, width: int, dropped: int | None, siglip: bool) -> list[Rule]:
    a, b = "params/text", "text_model"
    layout = [
        rules.words(f"{a}/token_embedding", f"{b}.embeddings.token_embedding.weight", dropped),
        rules.same(f"{a}/positional_embedding", f"{b}.embeddings.position_embedding.weight"),
        *_blocks(a, b, text.depth, text.heads),
        *rules.norm(f"{a}/ln_final", f"{b}.final_layer_norm"),
    ]
    if not siglip:
        return layout + projection(text, f"{a}/projection", "text_projection", width)
    if text.embed_dim and text.projection_bias:
        return layout + rules.dense(f"{a}/projection", f"{b}.head")
    no_bias = rules.constant(f"{b}.head.bias", lambda: np.zeros(width, np.float32))
    return [*layout, *projection(text, f"{a}/projection", f"{b}.head", width), no_bias]


def words_size(words: Section, *, siglip: bool) -> tuple[int, int]:
    """(vocabulary size, tokens per text) of a `text_config`. A missing key is the default of
    transformers' class."""
    size, context = (32000, 64) if siglip else (49408, 77)
    return words.size("vocab_size", size), words.size("max_position_embeddings", context)


def sections(config: Section, siglip: bool) -> tuple[Section, Section]:
    """(`vision_config`, `text_config`) as transformers reads them. In CLIP's configs the old
    `vision_config_dict` and `text_config_dict` replace them whole, defaults included."""

    def section(key: str) -> Section:
        old = config.get(f"{key}_dict") if not siglip else None
        return config.section(f"{key}_dict" if old is not None else key, HARMLESS)

    found = section("vision_config"), section("text_config")
    for key in ("vision_config", "text_config"):
        config.get(key)  # which the old form has replaced
    return found


def towers(
    vision: Section, words: Section, config: Section, siglip: bool, *, eos: bool = False
) -> tuple[ViT, TextTransformer]:
    """The towers of a `vision_config` and a `text_config` (`words`), inside of `config`. A missing
    key is the default of transformers' class. eos: whether texts end at `eos_token_id` whatever it
    is, as in MetaCLIP 2. Raises `ConfigError` for a setting that no clipx tower has."""
    embed_dim = 0 if siglip else config.size("projection_dim", 512)
    image = vision_tower(vision, embed_dim, siglip=siglip)
    text_width = words.size("hidden_size", 768 if siglip else 512)
    vocabulary, context = words_size(words, siglip=siglip)
    text = TextTransformer(
        vocab_size=vocabulary,
        context=context,
        width=text_width,
        depth=words.depth("num_hidden_layers", 12),
        heads=_heads(words, text_width, 12 if siglip else 8),
        mlp_ratio=words.size("intermediate_size", 3072 if siglip else 2048) / text_width,
        causal=not siglip,
        pool="last" if siglip else "eot",
        eot_id=_end(words, vocabulary, siglip, eos),
        pad_id=_pad(words) if siglip else 0,
        projection_bias=siglip,
        embed_dim=words.size("projection_size", text_width) if siglip else embed_dim,
        **_common(words, siglip),
    )
    return image, text


def vision_tower(vision: Section, embed_dim: int, *, siglip: bool) -> ViT:
    """The tower of a `vision_config`. Raises `ConfigError` as `towers` does."""
    vision.one_of("vision_use_head", (True,), True)
    fields = {"pool": "attention" if siglip else "class", "pre_norm": not siglip}
    patch, mlp_width = 16 if siglip else 32, vision.size("intermediate_size", 3072)
    fields |= _common(vision, siglip)
    return _vit(vision, mlp_width, patch, embed_dim=embed_dim, **fields)


def fixed_grid(
    arrays: Mapping[str, np.ndarray], given: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the `config.json` of a NaFlex SigLIP 2 as those of a SigLIP, for pictures with
    the square grid of patches that its positions are learned for."""
    vision = Section(given.get("vision_config") or {}, "config.json", "vision_config")
    patch, side = vision.size("patch_size", 16), round(vision.size("num_patches", 256) ** 0.5)
    name, found = "vision_model.embeddings.patch_embedding.weight", dict(arrays)
    if name in found:  # a dense layer over the pixels of a patch, channels last
        kernel = np.asarray(found[name]).reshape(-1, patch, patch, 3)
        found[name] = kernel.transpose(0, 3, 1, 2)
    rest = {k: x for k, x in given.get("vision_config", {}).items() if k != "num_patches"}
    return found, {**given, "vision_config": rest | {"image_size": side * patch}}


def check_grid(image: ViT, arrays: Mapping[str, np.ndarray], vision: Section) -> None:
    """Raises `ConfigError` for a patch that does not divide the image, unless the file's positions
    are those of the patches that fit."""
    table = arrays.get("vision_model.embeddings.position_embedding.weight")
    side, patch = image.image_size, image.shape[-1]
    if image.uneven and table is not None:
        rows = (side // patch) ** 2 + image.has_class
        if len(table) != rows:
            found = f"{side} pixels with a patch of {patch}, and {len(table)} positions"
            raise ConfigError(vision.at("image_size"), found, f"{rows} positions")


def dino_tower(vision: Section, embed_dim: int) -> ViT:
    """The tower of a DINOv2's config. Raises `ConfigError` as `towers` does."""
    for key, value in (("use_swiglu_ffn", False), ("qkv_bias", True)):
        vision.one_of(key, (value,), value)
    known = {theirs: ours for ours, theirs in ACTIVATIONS.items()}
    fields: dict[str, Any] = {"pool": "class", "pre_norm": False, "embed_dim": embed_dim}
    fields["activation"] = known[vision.one_of("hidden_act", known, "gelu")]
    fields["norm_eps"] = vision.number("layer_norm_eps", 1e-6)
    mlp_width = vision.size("hidden_size", 768) * vision.size("mlp_ratio", 4)
    return _vit(vision, mlp_width, 14, **fields)


def _vit(vision: Section, mlp_width: int, patch: int, **fields: Any) -> ViT:
    """patch: the default."""
    width = vision.size("hidden_size", 768)
    patch = vision.size("patch_size", patch)
    image_size = vision.size("image_size", 224)
    if image_size < patch:
        found = f"{image_size} pixels with a patch of {patch}"
        raise ConfigError(vision.at("image_size"), found, "at least one patch")
    vision.one_of("num_channels", (3,), 3)
    heads = _heads(vision, width, 12)
    shape = (width, vision.depth("num_hidden_layers", 12), heads, mlp_width)
    uneven = image_size % patch != 0  # which a convolution leaves out
    return ViT(**vit_shape(shape, patch), image_size=image_size, uneven=uneven, **fields)


def _common(section: Section, siglip: bool) -> dict[str, Any]:
    """The fields that both towers have."""
    known = {theirs: ours for ours, theirs in ACTIVATIONS.items()}
    default = "gelu_pytorch_tanh" if siglip else "quick_gelu"
    return {
        "activation": known[section.one_of("hidden_act", known, default)],
        "norm_eps": section.number("layer_norm_eps", 1e-6 if siglip else 1e-5),
    }


def _pad(words: Section) -> int:
    """The id of padding, which SigLIP's tower reads like any other."""
    return 1 if words.get("pad_token_id") is None else words.whole("pad_token_id")


def _heads(section: Section, width: int, default: int) -> int:
    heads = section.size("num_attention_heads", default)
    if width % heads:
        found = f"{heads} heads for a width of {width}"
        raise ConfigError(section.at("num_attention_heads"), found, "a divisor of the width")
    return heads


def _end(words: Section, vocabulary: int, siglip: bool, eos: bool) -> int:
    """The id of the token at which a text is pooled. SigLIP's tower pools at the last token,
    whatever its config says, and its tokenizer's end mark is 1."""
    if siglip:
        end = words.get("eos_token_id", 1)
        known = isinstance(end, int) and 0 <= end < vocabulary and end not in (2, 49407)
        return end if known else 1
    end = words.whole("eos_token_id", 49407)
    if (
        end == 2 and not eos
    ):  # of CLIP's first configs, with which transformers pools at the highest id
        return vocabulary - 1
    if end >= vocabulary:
        found = f"{end} with a vocabulary of {vocabulary}"
        fix = f"the id of the tokenizer's end mark, such as {vocabulary - 1}"
        raise ConfigError(words.at("eos_token_id"), found, "an id of the vocabulary", fix)
    return end
