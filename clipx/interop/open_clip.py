"""open_clip's format: `open_clip_model.safetensors` and `open_clip_config.json` (open_clip 3)."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from clipx.errors import ConfigError, NotExpressible
from clipx.interop import guests, libraries, rules
from clipx.interop import open_clip_layout as native
from clipx.interop.base import Format, Said
from clipx.interop.model import Model, Words, check_widths, checked, make_model
from clipx.interop.open_clip_layout import CONFIG, Layout
from clipx.interop.rules import Arrays, Rule
from clipx.models.bert import BERT
from clipx.models.layers import Tower
from clipx.models.resnet import ResNet
from clipx.models.text import TextTransformer
from clipx.models.vit import ViT
from clipx.ops import photometry

WEIGHTS = "open_clip_model.safetensors"
_GUEST_CONFIG = "config.json"  # for towers that open_clip builds through timm or transformers
# the layout of each class of tower
_IMAGES: dict[type, Callable[[Any], Layout]] = {
    ViT: lambda image: native.VIT if image.pool == "class" else guests.VIT,
    ResNet: lambda image: native.RESNET if image.modified else guests.RESNET,
}
_TEXTS: dict[type, Callable[[Any], Layout]] = {
    TextTransformer: lambda text: native.TEXT,
    BERT: lambda text: guests.BERT_LAYOUT,
}
# Keys of open_clip's sections that change a tower, with the only value that clipx's towers support.
_ONLY = {
    "ls_init_value": None,
    "attentional_pool": False,
    "pos_embed_type": "learnable",
    "final_ln_after_pool": False,
    "block_type": None,
    **dict.fromkeys(("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner"), False),
    **dict.fromkeys(("scale_attn", "scale_fc", "embed_cls"), False),
    "proj_type": "linear",
}


class OpenClip(Format):
    """What `open_clip.create_model_and_transforms("local-dir:FOLDER")` loads."""

    name = "open_clip"
    library = "open_clip"
    judges = ("torch", "open_clip")
    config = CONFIG
    weights = WEIGHTS
    torch_weights = "open_clip_pytorch_model.bin"
    weights_read = (
        *(WEIGHTS, "open_clip_pytorch_model.safetensors", "model.safetensors"),
        *(torch_weights, "open_clip_model.pt", "model.pt"),
    )
    expected = f"{CONFIG} and {WEIGHTS}"
    loading = """import open_clip, torch
from PIL import Image

model, _, transform = open_clip.create_model_and_transforms("local-dir:{folder}")
tokenizer = open_clip.get_tokenizer("local-dir:{folder}")
model.eval()
with torch.no_grad():
    image = model.encode_image(transform(Image.open("a.jpg"))[None], normalize=True)
    text = model.encode_text(tokenizer(["a dog", "a cat"]), normalize=True)
print(image @ text.T)"""

    def arrays(self, model: Model) -> Arrays:
        self.configs(model, "")  # raises `NotExpressible` before any array is copied
        layout = _rules(model.image, model.text, model.width, model.words.dropped)
        arrays = rules.write(layout, model.flat)
        for name in ("logit_scale", "logit_bias"):
            if getattr(model, name) is not None:
                arrays[name] = np.asarray(getattr(model, name), np.float32)
        return arrays

    def configs(self, model: Model, folder: str) -> dict[str, Any]:
        check_widths(model)
        bias = model.logit_bias
        own = {
            "model_cfg": {
                "embed_dim": model.width,
                "vision_cfg": _image_layout(model.image).section(model, folder),
                "text_cfg": _text_layout(model.text).section(model, folder),
                **_activation(model),
                **({} if bias is None else {"init_logit_bias": float(bias)}),
            },
            "preprocess_cfg": {
                "size": [model.image.image_size] * 2,
                "mode": "RGB",
                "mean": list(model.mean),
                "std": list(model.std),
                "interpolation": model.interpolation,
                "resize_mode": model.resize,
            },
        }
        guest = _guest_config(model)
        return {CONFIG: own} | ({_GUEST_CONFIG: guest} if guest else {})

    def has_tokenizer(self, model: Model) -> bool:
        return model.words.plain

    def also_needs(self, model: Model) -> tuple[str, ...]:
        borrowed = _text_layout(model.text).guest or not self.has_tokenizer(model)
        return ("transformers",) if borrowed else ()

    def notes(self, model: Model, folder: str) -> list[str]:
        if not _guest_config(model):
            return []
        return [
            f"`open_clip_config.json` refers to this folder as `{folder}`, because open_clip does "
            "not pass the folder on to timm and transformers. If you move the folder, set "
            "`timm_model_name` to `local-dir:FOLDER` and `hf_model_name` to `FOLDER`. If you "
            "upload it, set them to `hf-hub:USER/NAME` and `USER/NAME`."
        ]

    def describes(self, config: Mapping[str, Any]) -> bool:
        return bool(config)

    def names(self, arrays: Mapping[str, np.ndarray]) -> bool:
        return any(name.startswith("visual.") for name in arrays)

    def read(
        self, arrays: Mapping[str, np.ndarray], config: Callable[[str], Any], file: str = "a file"
    ) -> Model:
        own = config(CONFIG) or native.config_of(arrays, file)
        return _read(arrays, own, config(_GUEST_CONFIG) or {})

    def says(
        self,
        folder: pathlib.Path,
        images: Sequence[UInt8[np.ndarray, "h w 3"]],
        captions: Sequence[str],
    ) -> tuple[Said, Int[np.ndarray, "t n"]]:
        torch, open_clip = libraries.require("torch"), libraries.require("open_clip")
        name = f"local-dir:{folder}"
        with libraries.quiet(), torch.no_grad():
            model, _, transform = open_clip.create_model_and_transforms(name, precision="fp32")
            tokenizer = open_clip.get_tokenizer(name)
            model.eval()
            batch = torch.stack([transform(Image.fromarray(x)) for x in images])
            ids = tokenizer(list(captions))
            image, text = model.encode_image(batch), model.encode_text(ids)
            scores, _ = model.get_logits(batch, ids)
        return Said(*(x.numpy() for x in (image, text, scores))), ids.numpy()


def _image_layout(image: Tower) -> Layout:
    if type(image) not in _IMAGES:
        raise NotExpressible(f"open_clip has no image tower like {type(image).__name__}")
    return _IMAGES[type(image)](image)


def _text_layout(text: Tower) -> Layout:
    if type(text) not in _TEXTS:
        raise NotExpressible(f"open_clip has no text tower like {type(text).__name__}")
    return _TEXTS[type(text)](text)


def _guest_config(model: Model) -> dict[str, Any]:
    """The content of `config.json`, for towers that other libraries build; {} without such a
    tower."""
    layouts = (_image_layout(model.image), _text_layout(model.text))
    return {k: v for layout in layouts if layout.guest for k, v in layout.guest(model).items()}


def _rules(image: Tower, text: Tower, width: int, dropped: int | None) -> list[Rule]:
    return [
        *_image_layout(image).rules(image, width, dropped),
        *_text_layout(text).rules(text, width, dropped),
    ]


def _activation(model: Model) -> dict[str, bool]:
    """open_clip's flag `quick_gelu`, which sets the activation of both its own transformers."""
    layouts = ((_image_layout(model.image), model.image), (_text_layout(model.text), model.text))
    quick = {tower.activation == "quick_gelu" for layout, tower in layouts if layout.quick_gelu}
    if len(quick) > 1:
        raise NotExpressible(
            "open_clip uses QuickGELU in both towers or in neither, but only one of these towers "
            "uses it; --format=huggingface has an activation for each tower"
        )
    return {"quick_gelu": True} if quick == {True} else {}


def _read(
    arrays: Mapping[str, np.ndarray], config: Mapping[str, Any], guest: Mapping[str, Any]
) -> Model:
    """The model of an open_clip folder.

    config: content of `open_clip_config.json`.
    guest: content of the folder's `config.json`, for towers that other libraries build.

    Raises `ConfigError` for a setting that no clipx tower has, and for arrays that do not fit the
    config.
    """
    model, preprocess = config.get("model_cfg", config), config.get("preprocess_cfg", {})
    _check_keys(model)
    try:
        image, text = _image_tower(model, guest), _text_tower(model, guest)
        width = model["embed_dim"]
    except KeyError as error:
        raise ConfigError(CONFIG, f"no {error}", "a config as open_clip writes it") from None
    arrays = dict(arrays)
    borrowed = bool(model["text_cfg"].get("hf_model_name"))
    if not borrowed:  # open_clip's CustomTextCLIP prefixes the names of its text tower
        arrays = {name.removeprefix("text."): x for name, x in arrays.items()}
    layout = _rules(image, text, width, None)
    if model["vision_cfg"].get("timm_proj") == "none":
        layout = [rule for rule in layout if rule.theirs != ("visual.head.proj.weight",)]
    scalars = {k: arrays.pop(k) for k in ("logit_scale", "logit_bias") if k in arrays}
    variables = rules.read(layout, arrays, WEIGHTS)
    plain = not model["text_cfg"].get("hf_tokenizer_name")
    words = Words(
        kind="wordpiece" if borrowed else "clip_bpe" if plain else "sentencepiece",
        vocab_size=text.vocab_size,
        context=text.context,
        pad_id=text.pad_id,
        sot_id=text.eot_id - 1,
        eot_id=text.eot_id,
        plain=plain,
    )
    bias = scalars.get("logit_bias")
    read = make_model(
        image,
        text,
        variables,
        logit_scale=np.float32(scalars["logit_scale"]).reshape(()),
        logit_bias=None if bias is None else np.float32(bias).reshape(()),
        mean=tuple(preprocess.get("mean", photometry.OPENAI_MEAN)),
        std=tuple(preprocess.get("std", photometry.OPENAI_STD)),
        words=words,
        resize=preprocess.get("resize_mode", "shortest"),
        interpolation=preprocess.get("interpolation", "bicubic"),
    )
    return checked(read, WEIGHTS)


def _check_keys(model: Mapping[str, Any]) -> None:
    """Raises `ConfigError` for an open_clip option that clipx's towers do not have."""
    for section in ("vision_cfg", "text_cfg"):
        for key, value in _ONLY.items():
            given = model.get(section, {}).get(key, value)
            if given not in (value, None, "default"):
                raise ConfigError(
                    f"{CONFIG}: {section}.{key}", repr(given), f"{value!r}: clipx has no other"
                )
    if "multimodal_cfg" in model:
        raise ConfigError(f"{CONFIG}: multimodal_cfg", "a CoCa model", "a model of two towers")


def _image_tower(model: Mapping[str, Any], guest: Mapping[str, Any]) -> ViT | ResNet:
    section = model["vision_cfg"]
    size = section.get("image_size", 224)
    size = size if isinstance(size, int) else size[0]
    if section.get("timm_model_name"):
        return guests.image_tower(section, model["embed_dim"], size, guest, CONFIG)
    return native.image_tower(model, size)


def _text_tower(model: Mapping[str, Any], guest: Mapping[str, Any]) -> TextTransformer | BERT:
    section = model["text_cfg"]
    if section.get("hf_model_name"):
        return guests.text_tower(section, model["embed_dim"], guest, CONFIG)
    return native.text_tower(model)
