"""ONNX: a graph of each tower, converted by jax2onnx and proven by onnxruntime."""

from __future__ import annotations

import json
import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, UInt8

from clipx.errors import ConfigError, MissingLibrary, NotExpressible
from clipx.interop import libraries, verify
from clipx.interop.base import Format, Said
from clipx.interop.model import Model
from clipx.interop.rules import Arrays

CONFIG, TOKENIZER = "onnx_config.json", "tokenizer.json"
# file, input and output of each tower, under the names that transformers' exports have
IMAGE = ("vision_model.onnx", "pixel_values", "image_embeds")
TEXT = ("text_model.onnx", "input_ids", "text_embeds")


class Onnx(Format):
    """What any runtime of ONNX computes, for batches of any size. It is written, and not read."""

    name = library = config = "onnx"
    judges = ("onnxruntime",)
    extra = "onnx"
    weights, torch_weights, weights_read = IMAGE[0], "", ()
    readable, tokenizer_json = False, True
    expected = f"{IMAGE[0]} and {TEXT[0]}"
    loading = """import json
import pathlib
import numpy as np
import onnxruntime
from PIL import Image, ImageOps
from tokenizers import Tokenizer

about = json.loads(pathlib.Path("{folder}/onnx_config.json").read_text())
side = (about["image"]["size"],) * 2
picture = ImageOps.fit(Image.open("a.jpg").convert("RGB"), side, Image.Resampling.BICUBIC)
pixels = (np.asarray(picture) / 255 - about["image"]["mean"]) / about["image"]["std"]
texts = Tokenizer.from_file("{folder}/tokenizer.json").encode_batch(["a dog", "a cat"])
inputs = {{
    "vision_model": ("pixel_values", pixels.transpose(2, 0, 1)[None].astype(np.float32)),
    "text_model": ("input_ids", np.array([text.ids for text in texts], np.int32)),
}}
unit = []
for name, (key, value) in inputs.items():
    session = onnxruntime.InferenceSession("{folder}/" + name + ".onnx")
    (x,) = session.run(None, {{key: value}})
    unit.append(x / np.linalg.norm(x, axis=1, keepdims=True))
print(np.exp(about["logit_scale"]) * unit[0] @ unit[1].T + about["logit_bias"])"""
    exact_cleaning = frozenset({"siglip", "strip", "raw"})

    def write(self, model: Model, folder: pathlib.Path, at: str) -> Arrays:
        side = model.image.image_size
        _convert(model, "image", ("batch", 3, side, side), "float32", folder)
        _convert(model, "text", ("batch", model.words.context), "int32", folder)
        self.write_configs(model, folder, at)
        return {}

    def configs(self, model: Model, folder: str) -> dict[str, Any]:
        words, given = model.words.without_mask(), zip(("file", "input", "output"), TEXT)
        image = dict(zip(("file", "input", "output"), IMAGE))
        image |= {"size": model.image.image_size, "mean": model.mean, "std": model.std}
        image |= {"resize": model.resize, "interpolation": model.interpolation}
        text = dict(given) | {"context": words.context, "pad_id": words.pad_id}
        scale = {"logit_scale": model.logit_scale, "logit_bias": model.logit_bias}
        scale = {key: 0.0 if x is None else float(x) for key, x in scale.items()}
        return {CONFIG: {"image": image, "text": text} | scale}

    def notes(self, model: Model, folder: str) -> list[str]:
        cut = {
            "shortest": "resizes the shortest side and takes the middle, as the code above does "
            "but for single pixels",
            "squash": "resizes to a square (`picture.resize(side)` in place of `ImageOps.fit`)",
            "longest": "resizes the longest side and fills the rest with black (`ImageOps.pad`)",
        }
        return [
            "Features are float32 and not normalised. Pictures are `[batch, 3, side, side]`, token "
            f"ids `[batch, {model.words.context}]` of int32, which `{TOKENIZER}` pads and cuts.",
            f"Evaluation {cut[model.resize]}, {model.interpolation}.",
            f"Weights lie beside the graphs in `{IMAGE[0]}.data` and `{TEXT[0]}.data`.",
        ]

    def says(
        self,
        folder: pathlib.Path,
        images: Sequence[UInt8[np.ndarray, "h w 3"]],
        captions: Sequence[str],
    ) -> tuple[Said, Int[np.ndarray, "t n"]]:
        from tokenizers import Tokenizer

        runtime = libraries.require("onnxruntime")
        runtime.set_default_logger_severity(3)  # of unused constants; errors are raised

        def run(file: str, key: str, output: str, x: np.ndarray) -> np.ndarray:
            session = runtime.InferenceSession(folder / file, providers=["CPUExecutionProvider"])
            return session.run([output], {key: x})[0]

        about = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        pixels = np.stack(images) / 255 - np.array(about["image"]["mean"])
        pixels = (pixels / about["image"]["std"]).transpose(0, 3, 1, 2).astype(np.float32)
        texts = Tokenizer.from_file(str(folder / TOKENIZER)).encode_batch(list(captions))
        ids = np.array([text.ids for text in texts], np.int32)
        image, text = run(*IMAGE, pixels), run(*TEXT, ids)
        scale = (about["logit_scale"], about["logit_bias"])
        return Said(image, text, verify.logits(image, text, *scale)), ids

    def arrays(self, model: Model) -> NoReturn:
        raise NotExpressible("ONNX keeps its arrays in graphs")

    def describes(self, config: Mapping[str, Any]) -> bool:
        return False

    def names(self, arrays: Mapping[str, np.ndarray]) -> bool:
        return False

    def read(
        self, arrays: Mapping[str, np.ndarray], config: Callable[[str], Any], file: str = "a file"
    ) -> NoReturn:
        raise ConfigError("", file, "weights: ONNX graphs are written, and not read")


def _convert(
    model: Model, name: str, shape: tuple[str | int, ...], dtype: str, folder: pathlib.Path
) -> None:
    """Writes the graph of the tower `name`. Raises `MissingLibrary` without jax2onnx, and
    `NotExpressible` for a tower that it does not convert."""
    tower, gone = getattr(model, name), model.words.dropped
    parts = {"params": model.params, "batch_stats": model.batch_stats}
    variables = {kind: part[name] for kind, part in parts.items() if name in part}
    file, key, output = IMAGE if name == "image" else TEXT

    def features(x: jax.Array) -> jax.Array:
        if name == "image":
            x = x.transpose(0, 2, 3, 1)
        elif gone is not None:  # its row of the table stays, the ids above it move up again
            x = x + (x >= gone)
        raw = tower.apply(variables, x).raw
        more = model.width - raw.shape[1]
        return jnp.pad(raw, ((0, 0), (0, more))) if more else raw

    convert = libraries.require("jax2onnx").to_onnx
    options = {"input_names": [key], "output_names": [output], "return_mode": "file"}
    options |= {"model_name": file.removesuffix(".onnx"), "output_path": str(folder / file)}
    log = logging.getLogger("onnx_ir")  # which warns of shapes that it leaves open
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        convert(features, [jax.ShapeDtypeStruct(shape, dtype)], **options)  # pyright: ignore[reportArgumentType]
    except (MissingLibrary, OSError):
        raise
    except Exception as error:
        raise NotExpressible(
            f"jax2onnx does not convert the {name} tower, a {type(tower).__name__} "
            f"({libraries.one_line(error)})"
        ) from None
    finally:
        log.setLevel(level)
