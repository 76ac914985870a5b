"""open_clip's format: `open_clip_model.safetensors` and `open_clip_config.json` (open_clip 3)."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from clipx.errors import ConfigError, NotExpressible
from clipx.interop import (
    bare,
    bert_layout,
    foreign_tokenizer,
    guest_texts,
    guest_towers,
    guests,
    libraries,
    open_clip_image,
    open_clip_layout,
    open_clip_text,
    preprocessing,
    rules,
    t5_layout,
)
from clipx.interop.base import Format, Said, read_json
from clipx.interop.model import (
    Model,
    Words,
    array_shapes,
    check_heads,
    checked,
    make_model,
    scalar,
)
from clipx.interop.open_clip_layout import CONFIG, Layout
from clipx.interop.rules import Arrays, Rule
from clipx.interop.settings import Section, keys
from clipx.models.base import Tower
from clipx.models.bert import BERT
from clipx.models.convnext import ConvNeXt
from clipx.models.efficientnet import EfficientNet
from clipx.models.eva import EVA
from clipx.models.resnet import ResNet
from clipx.models.t5 import T5
from clipx.models.text import TextTransformer
from clipx.models.vit import ViT
from clipx.models.vitamin import ViTamin

WEIGHTS = "open_clip_model.safetensors"
_DECODER = "text_decoder."  # of CoCa
_GUEST_CONFIG = "config.json"  # for towers that open_clip builds through timm or transformers
# the layout of each class of tower
_IMAGES: dict[type, Callable[[Any], Layout]] = {
    ViT: lambda image: open_clip_image.VIT if open_clip_image.has(image) else guests.VIT,
    ResNet: lambda image: open_clip_image.RESNET if image.modified else guests.RESNET,
    EfficientNet: lambda image: guests.EFFICIENTNET,
    ConvNeXt: lambda image: guests.CONVNEXT,
    EVA: lambda image: guests.EVA_LAYOUT,
    ViTamin: lambda image: guests.VITAMIN,
}
_TEXTS: dict[type, Callable[[Any], Layout]] = {
    TextTransformer: lambda text: (
        guest_texts.M2M_LAYOUT if t5_layout.is_m2m(text) else open_clip_text.TEXT
    ),
    BERT: lambda text: guest_texts.BERT_LAYOUT,
    T5: lambda text: guest_texts.T5_LAYOUT,
}
# keys of a `model_cfg` that only say how to start training
_HARMLESS = keys(
    "custom_text init_logit_bias init_logit_scale nonscalar_logit_scale cast_dtype output_dict"
)


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
    collapses_spaces = True
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
        check_heads(model)
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
        own = config(CONFIG)
        if own is None:
            arrays = _without_text_prefix(arrays)
            own = bare.config_of(arrays, file)
            if not bare.is_openai(arrays):
                try:  # is the config all that is missing?
                    _read(arrays, bare.config_of(arrays, file, heads=1), {})
                except ConfigError as error:
                    found = f"{file} with {error.found}"
                    raise ConfigError("", found, "arrays of open_clip's own towers alone") from None
                raise bare.no_config(own, file)
        return _read(arrays, own, config(_GUEST_CONFIG) or {})

    def tokenizer_fields(self, folder: pathlib.Path, where: str) -> dict[str, Any] | str | None:
        """Fields for a SigLIP folder with a `spiece.model`, and for one with a `tokenizer.json`;
        None for CLIP's own vocabulary."""
        own = read_json(folder / CONFIG, where) or {}
        config = own.get("model_cfg", own)
        words = Section(config, CONFIG).section("text_cfg")
        given: dict[str, Any] = {}
        if words.get("hf_model_name"):
            guest = read_json(folder / _GUEST_CONFIG, where) or {}
            text = guest_texts.text_tower(words, 1, guest)
            given = {"size": text.vocab_size, "pad_id": text.pad_id}
        return foreign_tokenizer.open_clip(folder, config, where, **given)

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


def _read(arrays: Mapping[str, np.ndarray], own: Mapping[str, Any], guest: Any) -> Model:
    """The model of an open_clip folder.

    own: content of `open_clip_config.json`, a `model_cfg` or a dict that has one.
    guest: content of the folder's `config.json`, for towers that other libraries build.

    Raises `ConfigError` for a setting that no clipx tower has, and for arrays that do not fit the
    config.
    """
    config = Section(own.get("model_cfg", own), CONFIG, harmless=_HARMLESS)
    sections = [
        config.section(key, open_clip_layout.HARMLESS) for key in ("vision_cfg", "text_cfg")
    ]
    for section in sections:
        open_clip_layout.check_only(section)
    vision, words = sections
    image, text = _image_tower(config, vision, guest), _text_tower(config, words, guest)
    borrowed = bool(words.get("hf_model_name"))
    arrays = dict(arrays) if borrowed else _without_text_prefix(arrays)
    layout, notes = _rules(image, text, config.size("embed_dim"), None), ()
    arrays = _one_head(arrays, layout)
    if config.get("multimodal_cfg"):
        arrays = {k: x for k, x in arrays.items() if not k.startswith(_DECODER)}
        notes = ("CoCa's decoder of captions is left out: the two towers are all that is read",)
    logit_scale, logit_bias = (scalar(arrays, f"logit_{n}", "") for n in ("scale", "bias"))
    variables = rules.read(layout, arrays, lambda: array_shapes(image, text), "")
    pictures = preprocessing.open_clip(own.get("preprocess_cfg") or {}, f"{CONFIG}: preprocess_cfg")
    unknown = (line for section in (config, *sections) for line in section.unread())
    plain = not words.get("hf_tokenizer_name")
    read = make_model(
        image,
        text,
        variables,
        logit_scale=logit_scale,
        logit_bias=logit_bias,
        words=Words(
            kind=_kind(text, borrowed, plain),
            vocab_size=text.vocab_size,
            context=text.context,
            pad_id=text.pad_id,
            sot_id=text.eot_id - 1 if plain and not borrowed or text.needs_start_mark else None,
            eot_id=text.eot_id,
            plain=plain,
        ),
        **pictures.fields,
        differences=(*pictures.differences, *unknown),
        notes=notes,
    )
    return checked(read, "")


def _one_head(arrays: Mapping[str, np.ndarray], layout: Sequence[Rule]) -> Arrays:
    """The arrays, with a projection that has a bias under the name that `layout` has for it: the
    network's own classifier, or open_clip's layer above it."""
    names = {name for rule in layout for name in rule.theirs}
    if f"{guests.OWN_HEAD}.bias" not in names:
        return dict(arrays)
    return {name.replace(guests.HEAD + ".", guests.OWN_HEAD + "."): x for name, x in arrays.items()}


def _kind(text: Tower, borrowed: bool, plain: bool) -> Any:
    """The name of the tokenizer that gives the model's ids."""
    if _text_layout(text) is guest_texts.BERT_LAYOUT and bert_layout.kind_of(text) == "bert":
        return "wordpiece"
    return "huggingface" if borrowed else "clip_bpe" if plain else "sentencepiece"


def _without_text_prefix(arrays: Mapping[str, np.ndarray]) -> Arrays:
    """The same arrays, those of the text tower under the names of open_clip's `CLIP`. Its
    `CustomTextCLIP` prefixes them, as DeCLIP's code does."""
    return {
        name.removeprefix("text.").removeprefix("encode_text."): x for name, x in arrays.items()
    }


def _image_tower(config: Section, section: Section, guest: Any) -> Tower:
    size = section.get("image_size", 224)
    if isinstance(size, list) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    else:
        size = section.size("image_size", 224)
    if section.get("timm_model_name"):
        return guest_towers.image_tower(section, config.size("embed_dim"), size, guest)
    return open_clip_image.image_tower(config, section, size)


def _text_tower(config: Section, section: Section, guest: Any) -> Any:
    if section.get("hf_model_name"):
        return guest_texts.text_tower(section, config.size("embed_dim"), guest)
    return open_clip_text.text_tower(config, section)
