"""transformers' format: a folder of `VisionTextDualEncoderModel` if the text tower is BERT or its
kin, of `SiglipModel` if the image tower pools by attention, otherwise of `CLIPModel`
(transformers 5)."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from clipx.errors import ConfigError, NotExpressible
from clipx.interop import (
    dual_encoder,
    foreign_tokenizer,
    huggingface_configs,
    libraries,
    preprocessing,
    rules,
)
from clipx.interop import huggingface_layout as layout
from clipx.interop.base import Format, Said, read_json
from clipx.interop.huggingface_layout import CONFIG
from clipx.interop.model import (
    Model,
    Words,
    array_shapes,
    check_heads,
    check_padding,
    check_tokens,
    checked,
    make_model,
    scalar,
)
from clipx.interop.preprocessing import Preprocessing
from clipx.interop.rules import Arrays
from clipx.interop.settings import Section
from clipx.interop.tokenizer import SETTINGS
from clipx.models.text import TextTransformer
from clipx.models.vit import ViT

WEIGHTS, PREPROCESSOR = "model.safetensors", "preprocessor_config.json"
PROCESSOR = "processor_config.json"  # transformers 5 may save the preprocessor in it
_ELSE = "; use --format=open_clip"

# `model_type`s with CLIP's or SigLIP's towers
_TYPES = ("clip", "siglip", "metaclip_2", "siglip2")


class HuggingFace(Format):
    """What transformers' `AutoModel.from_pretrained("FOLDER")` loads."""

    name = "huggingface"
    library = "transformers"
    judges = ("torch", "transformers")
    config = CONFIG
    weights = WEIGHTS
    torch_weights = "pytorch_model.bin"
    weights_read = (
        *(WEIGHTS, WEIGHTS + ".index.json"),
        *(torch_weights, torch_weights + ".index.json"),
    )
    expected = f"{CONFIG} of CLIP or SigLIP and {WEIGHTS}"
    loading = """import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{folder}").eval()
processor = AutoProcessor.from_pretrained("{folder}")
inputs = processor(
    text=["a dog", "a cat"],
    images=Image.open("a.jpg"),
    return_tensors="pt",
    padding="max_length",
    truncation=True,
)
with torch.no_grad():
    print(model(**inputs).logits_per_image)"""
    metadata = {"format": "pt"}
    exact_cleaning = frozenset({"siglip", "strip", "raw"})

    def arrays(self, model: Model) -> Arrays:
        if dual_encoder.expresses(model.text):
            return dual_encoder.arrays(model)
        image, text = _check(model)
        siglip = _is_siglip(model)
        rules_of_both = layout.tower_rules(image, text, model.width, model.words.dropped, siglip)
        arrays = rules.write(rules_of_both, model.flat)
        scale = np.asarray(model.logit_scale, np.float32)
        if siglip:
            bias = np.zeros(()) if model.logit_bias is None else model.logit_bias
            arrays["logit_scale"] = scale.reshape(1)
            arrays["logit_bias"] = np.asarray(bias, np.float32).reshape(1)
        else:
            arrays["logit_scale"] = scale
        return arrays

    def configs(self, model: Model, folder: str) -> dict[str, Any]:
        if dual_encoder.expresses(model.text):
            return dict(zip((CONFIG, PREPROCESSOR), dual_encoder.configs(model)))
        _check(model)
        kind = "Siglip" if _is_siglip(model) else "CLIP"
        return {
            CONFIG: huggingface_configs.model(model, kind),
            PREPROCESSOR: huggingface_configs.preprocessor(model, kind),
        }

    def attention_mask(self, model: Model) -> bool:
        return dual_encoder.expresses(model.text) or not _is_siglip(model)

    def notes(self, model: Model, folder: str) -> list[str]:
        return ['Tokenize texts with `padding="max_length"`, as in training.']

    def describes(self, config: Mapping[str, Any]) -> bool:
        return "model_type" in config

    def names(self, arrays: Mapping[str, np.ndarray]) -> bool:
        return any(name.startswith("vision_model.") for name in arrays)

    def read(
        self, arrays: Mapping[str, np.ndarray], config: Callable[[str], Any], file: str = "a file"
    ) -> Model:
        given = config(CONFIG)
        if given is None:
            folder = pathlib.Path(file).parent
            found, expected = f"{file}, and no {CONFIG} beside it", f"the model's {CONFIG}"
            raise ConfigError("", found, expected, f"put the model's own {CONFIG} into {folder}")
        preprocessors = {
            PROCESSOR: (config(PROCESSOR) or {}).get("image_processor"),
            PREPROCESSOR: config(PREPROCESSOR),
        }
        pictures = {k: v for k, v in preprocessors.items() if v}
        if dual_encoder.check_type(given):
            found = _pictures(pictures, dual_encoder.image_size(given), False)
            section = Section(given, CONFIG, harmless=layout.HARMLESS)
            read = dual_encoder.read(dict(arrays), section, found, config(SETTINGS) or {})
            return checked(read, "")
        return _read(arrays, given, pictures)

    def tokenizer_fields(self, folder: pathlib.Path, where: str) -> dict[str, Any] | str | None:
        """Fields for the files of a `SiglipTokenizer` or a `CLIPTokenizer`."""
        given = read_json(folder / CONFIG, where) or {}
        if dual_encoder.check_type(given):
            return dual_encoder.tokenizer_fields(folder, given, where)
        siglip = str(given.get("model_type")).startswith("siglip")
        config = Section(given, f"{where}: {CONFIG}")
        _, words = layout.sections(config, siglip)
        size, context = layout.words_size(words, siglip=siglip)
        find = foreign_tokenizer.siglip if siglip else foreign_tokenizer.clip
        return find(folder, size, context, where)

    def says(
        self,
        folder: pathlib.Path,
        images: Sequence[UInt8[np.ndarray, "h w 3"]],
        captions: Sequence[str],
    ) -> tuple[Said, Int[np.ndarray, "t n"]]:
        torch, transformers = libraries.require("torch"), libraries.require("transformers")
        with libraries.quiet(), torch.no_grad():
            transformers.utils.logging.set_verbosity_error()
            transformers.utils.logging.disable_progress_bar()
            model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
            processor = transformers.AutoProcessor.from_pretrained(folder)
            inputs = processor(
                text=list(captions),
                images=[Image.fromarray(x) for x in images],
                return_tensors="pt",
                padding="max_length",
                truncation=True,
            )
            outputs = model(**inputs)  # whose features are normalised: ask for raw ones
            image = model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
            rest = {k: v for k, v in inputs.items() if k != "pixel_values"}
            text = model.get_text_features(**rest).pooler_output
        ids = inputs["input_ids"].numpy()
        return Said(*(x.numpy() for x in (image, text, outputs.logits_per_image))), ids


def _is_siglip(model: Model) -> bool:
    return model.image.pool == "attention"


def _check(model: Model) -> tuple[ViT, TextTransformer]:
    """The model's towers. Raises `NotExpressible` for a model that neither class can express."""
    image, text = model.image, model.text
    if type(image) is not ViT:
        raise NotExpressible(f"transformers has no CLIP with a {type(image).__name__}{_ELSE}")
    if type(text) is not TextTransformer:
        raise NotExpressible(f"CLIPModel has no text tower like {type(text).__name__}")
    check_heads(model)
    check_tokens(image, "transformers")
    (_check_siglip if _is_siglip(model) else _check_clip)(model)
    check_padding(model, own=False)
    return image, text


def _refuse(faults: Mapping[str, bool], cls: str) -> None:
    for feature, present in faults.items():
        if present:
            raise NotExpressible(f"{cls} has no {feature}")


def _check_clip(model: Model) -> None:
    image, text = model.image, model.text
    at_end = text.pool == "eot" or (text.pool == "last" and text.mask_padding)
    other = _ELSE * (text.pool != "mean" and not (text.mask_padding and not text.causal))
    biased = bool(text.embed_dim) and text.projection_bias
    _refuse(
        {
            f"image tower that pools by the mean{_ELSE}": image.pool == "mean",
            f"image tower without a LayerNorm before its blocks{_ELSE}": not image.pre_norm,
            f"text tower without a causal mask{other}": not text.causal,
            f"text tower that pools elsewhere than at the end mark{other}": not at_end,
            f"bias in the text's projection{_ELSE}": biased,
            f"logit bias, which SigLIP's loss learns{_ELSE}": model.logit_bias is not None,
        },
        "CLIPModel",
    )


def _check_siglip(model: Model) -> None:
    image, text = model.image, model.text
    _refuse(
        {
            "projection after the image's attention pooling (train with "
            f"config.image.embed_dim=0 to have none){_ELSE}": bool(image.embed_dim),
            "LayerNorm before the image tower's blocks (train with "
            f"config.image.pre_norm=false to have none){_ELSE}": image.pre_norm,
            "text tower that masks padding": text.mask_padding,
            f"causal text tower (train with config.text.causal=false){_ELSE}": text.causal,
            "text tower that pools elsewhere than at the last token": text.pool != "last",
        },
        "SiglipModel",
    )


def _read(
    arrays: Mapping[str, np.ndarray], given: Mapping[str, Any], preprocessors: Mapping[str, Any]
) -> Model:
    """The model of a CLIP or SigLIP folder, from its arrays and the contents of its configs.

    preprocessors: by file, the one that transformers takes first.

    Raises `ConfigError` for another architecture, for a setting that no clipx tower has, and for
    arrays that do not fit the config.
    """
    if given.get("model_type") == "siglip2":
        arrays, given = layout.fixed_grid(arrays, given)
    config = Section(given, CONFIG, harmless=layout.HARMLESS)
    kind = config.one_of("model_type", _TYPES, None)
    siglip = kind.startswith("siglip")
    vision, words = layout.sections(config, siglip)
    image, text = layout.towers(vision, words, config, siglip, eos=kind == "metaclip_2")
    pictures = _pictures(preprocessors, image.image_size, siglip)
    arrays = {
        # some files repeat the prefix
        name.replace("text_model.text_model.", "text_model."): x
        for name, x in arrays.items()
    }
    layout.check_grid(image, arrays, vision)
    logit_scale = scalar(arrays, "logit_scale", "")
    logit_bias = scalar(arrays, "logit_bias", "") if siglip else None
    width = max(image.output_width, text.output_width)
    variables = rules.read(
        layout.tower_rules(image, text, width, None, siglip),
        arrays,
        lambda: array_shapes(image, text),
        "",
    )
    unknown = (line for section in (config, vision, words) for line in section.unread())
    read = make_model(
        image,
        text,
        variables,
        logit_scale=logit_scale,
        logit_bias=logit_bias,
        **pictures.fields,
        differences=(*pictures.differences, *unknown),
        words=Words(
            kind="sentencepiece" if siglip else "clip_bpe",
            vocab_size=text.vocab_size,
            context=text.context,
            pad_id=text.pad_id,
            sot_id=words.get("bos_token_id", None if siglip else text.vocab_size - 2),
            eot_id=text.eot_id,
            plain=not siglip and text.vocab_size == 49408,
        ),
    )
    return checked(read, "")


def _pictures(given: Mapping[str, Any], image_size: int, siglip: bool) -> Preprocessing:
    """What the folder's preprocessors describe; its class's defaults without one."""
    read = [
        preprocessing.huggingface(values or {}, image_size, siglip, file)
        for file, values in (given or {PREPROCESSOR: {}}).items()
    ]
    if len(read) > 1 and read[0] != read[1]:
        line = "preprocessing.files: " + " and ".join(given) + " of the model are not the same"
        return dataclasses.replace(read[0], differences=(*read[0].differences, line))
    return read[0]
