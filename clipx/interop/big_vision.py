"""SigLIP as big_vision keeps it: a `.npz` whose arrays tell sizes and heads (big_vision,
models/vit.py and models/proj/image_text)."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from clipx.errors import ConfigError
from clipx.interop.model import Model, Words, checked, make_model
from clipx.models.text import TextTransformer
from clipx.models.vit import ViT

SUFFIX = ".npz"
_PREFIX = "params/"
_EPS = 1e-6
_NAMES = {  # of a block, ours and theirs
    "ln_1": "LayerNorm_0",
    "ln_2": "LayerNorm_1",
    "mlp/fc": "MlpBlock_0/Dense_0",
    "mlp/proj": "MlpBlock_0/Dense_1",
}
_ATTENTION = "MultiHeadDotProductAttention_0"
_EXPECTED = (
    "arrays of a SigLIP of big_vision: params/img/ with embedding, pos_embedding, Transformer and "
    "MAPHead_0; params/txt/ with Embed_0, pos_embedding, Encoder_0 and head; params/t; params/b"
)
_FIX = "name a whole file as big_vision publishes it, such as webli_en_b16_224_63724782.npz"


def read(file: pathlib.Path, where: str) -> Model:
    """The model in a file. Raises `ConfigError` at `where` for another one."""
    arrays = _arrays(file, where)
    try:
        image, vision = _image(arrays)
        text, words = _text(arrays)
        scale, bias = (arrays.pop(name).reshape(()) for name in ("t", "b"))
    except KeyError as error:
        found = f"{file}, without {_PREFIX}{error.args[0]}"
        raise ConfigError(where, found, _EXPECTED, _FIX) from None
    except (IndexError, ValueError) as error:
        found = f"{file}, whose arrays are not of one model's shapes ({error})"
        raise ConfigError(where, found, _EXPECTED, _FIX) from None
    if arrays:
        found = f"{file}, with {min(arrays)}" + f" and {len(arrays) - 1} more" * (len(arrays) > 1)
        raise ConfigError(where, found, _EXPECTED)
    half = (0.5, 0.5, 0.5)
    model = make_model(
        image,
        text,
        {"params": {"image": vision, "text": words}},
        logit_scale=np.float32(scale),
        logit_bias=np.float32(bias),
        mean=half,
        std=half,
        resize="squash",
        interpolation="bicubic",
        words=Words("sentencepiece", text.vocab_size, text.context, 1, None, 1, plain=False),
        notes=(
            f"pictures are of {image.image_size} pixels, as the positions tell, and squashed; mean "
            "and std are 0.5, and GELUs by tanh, as big_vision's SigLIP has them",
        ),
    )
    return checked(model, where)


def _arrays(file: pathlib.Path, where: str) -> dict[str, np.ndarray]:
    try:
        with np.load(file, allow_pickle=False) as opened:
            given = {name: opened[name] for name in opened.files}
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(where, f"{file} ({error})", "a complete .npz file") from None
    if not all(name.startswith(_PREFIX) for name in given):
        first = next(name for name in given if not name.startswith(_PREFIX))
        raise ConfigError(where, f"{file}, NumPy arrays with {first}", _EXPECTED)
    given = {name.removeprefix(_PREFIX): x for name, x in given.items()}
    return {name: np.asarray(x, np.float32) for name, x in _unstacked(given).items()}


def _unstacked(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of a file whose blocks are scanned, one entry for each block."""
    found = {}
    for name, x in arrays.items():
        if "/encoderblock/" not in name:
            found[name] = x
            continue
        for i, part in enumerate(x):
            found[name.replace("/encoderblock/", f"/encoderblock_{i}/")] = part
    return found


def _blocks(arrays: dict[str, np.ndarray], at: str) -> tuple[dict[str, Any], tuple[int, int, int]]:
    """(parameters of the blocks, (depth, heads, width of an MLP)); takes them out of `arrays`."""
    pattern = re.compile(rf"{at}/encoderblock_(\d+)/")
    depth = 1 + max((int(m[1]) for name in arrays if (m := pattern.match(name))), default=0)
    params, heads, inner = {}, 0, 0
    for i in range(depth):
        block = f"{at}/encoderblock_{i}"
        made: dict[str, Any] = {"mlp": {}}
        for ours, theirs in _NAMES.items():
            *outer, last = ours.split("/")
            into = made["mlp"] if outer else made
            leaves = ("kernel", "bias") if outer else ("scale", "bias")
            into[last] = {leaf: arrays.pop(f"{block}/{theirs}/{leaf}") for leaf in leaves}
        made["attn"] = _attention(arrays, f"{block}/{_ATTENTION}", ("query", "key", "value"))
        heads, inner = made["attn"]["qkv"]["kernel"].shape[2], len(made["mlp"]["fc"]["bias"])
        params[f"block_{i}"] = made
    return params, (depth, heads, inner)


def _attention(
    arrays: dict[str, np.ndarray], at: str, parts: tuple[str, ...], name: str = "qkv"
) -> dict[str, Any]:
    kernels = [arrays.pop(f"{at}/{part}/kernel") for part in parts]
    biases = [arrays.pop(f"{at}/{part}/bias") for part in parts]
    made = {name: {"kernel": np.stack(kernels, 1), "bias": np.stack(biases)}}
    if name == "qkv":
        made["out"] = {leaf: arrays.pop(f"{at}/out/{leaf}") for leaf in ("kernel", "bias")}
    return made


def _norm(arrays: dict[str, np.ndarray], at: str) -> dict[str, np.ndarray]:
    return {leaf: arrays.pop(f"{at}/{leaf}") for leaf in ("scale", "bias")}


def _image(arrays: dict[str, np.ndarray]) -> tuple[ViT, dict[str, Any]]:
    kernel, bias = (arrays.pop(f"img/embedding/{leaf}") for leaf in ("kernel", "bias"))
    patch, width = kernel.shape[0], kernel.shape[-1]
    positions = arrays.pop("img/pos_embedding").reshape(-1, width)
    blocks, (depth, heads, inner) = _blocks(arrays, "img/Transformer")
    params: dict[str, Any] = {
        "patch_embedding": {"kernel": kernel},
        "positional_embedding": positions + bias,
        "transformer": blocks,
        "ln_post": _norm(arrays, "img/Transformer/encoder_norm"),
    }
    head, attn = "img/MAPHead_0", f"img/MAPHead_0/{_ATTENTION}"
    out = {"kernel": arrays.pop(f"{attn}/out/kernel"), "bias": arrays.pop(f"{attn}/out/bias")}
    query = {leaf: arrays.pop(f"{attn}/query/{leaf}") for leaf in ("kernel", "bias")}
    params["pool"] = {
        "probe": arrays.pop(f"{head}/probe").reshape(1, width),
        "attn": {"q": query, **_attention(arrays, attn, ("key", "value"), "kv")},
        "out": {"kernel": out["kernel"].reshape(width, width), "bias": out["bias"]},
        "ln": _norm(arrays, f"{head}/LayerNorm_0"),
        "mlp": {
            ours: {leaf: arrays.pop(f"{head}/MlpBlock_0/{theirs}/{leaf}") for leaf in out}
            for ours, theirs in (("fc", "Dense_0"), ("proj", "Dense_1"))
        },
    }
    projected = "img/head/kernel" in arrays
    if projected:
        params["projection"] = {leaf: arrays.pop(f"img/head/{leaf}") for leaf in out}
    tower = ViT(
        variant=f"ViT-B/{patch}",
        image_size=patch * round(len(positions) ** 0.5),
        width=width,
        depth=depth,
        heads=heads,
        mlp_ratio=inner / width,
        pool="attention",
        pre_norm=False,
        activation="gelu_tanh",
        norm_eps=_EPS,
        embed_dim=params["projection"]["kernel"].shape[1] if projected else 0,
        projection_bias=projected,
    )
    return tower, params


def _text(arrays: dict[str, np.ndarray]) -> tuple[TextTransformer, dict[str, Any]]:
    table = arrays.pop("txt/Embed_0/embedding")
    positions = arrays.pop("txt/pos_embedding").reshape(-1, table.shape[1])
    blocks, (depth, heads, inner) = _blocks(arrays, "txt/Encoder_0")
    params = {
        "token_embedding": table,
        "positional_embedding": positions,
        "transformer": blocks,
        "ln_final": _norm(arrays, "txt/Encoder_0/encoder_norm"),
        "projection": {leaf: arrays.pop(f"txt/head/{leaf}") for leaf in ("kernel", "bias")},
    }
    tower = TextTransformer(
        vocab_size=len(table),
        context=len(positions),
        width=table.shape[1],
        depth=depth,
        heads=heads,
        mlp_ratio=inner / table.shape[1],
        causal=False,
        pool="last",
        eot_id=1,
        pad_id=1,
        activation="gelu_tanh",
        norm_eps=_EPS,
        embed_dim=params["projection"]["kernel"].shape[1],
        projection_bias=True,
    )
    return tower, params
