"""Does clipx say what open_clip says, for each of open_clip's model configs?

Weights are random. Both libraries cut the depth to one block a stage and the vocabulary to 1000
words; widths, heads, MLPs, norms, pools and patches stay. Nothing is downloaded.

    python tests/support/survey.py [NAME ...]    # a line of JSON for each config, then a summary
    python tests/support/survey.py --table       # the table of docs/released.md
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import logging
import pathlib
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
from safetensors.numpy import save_file

from clipx.errors import ConfigError
from clipx.interop import libraries, published, timm_models, verify
from clipx.interop.open_clip import OpenClip
from clipx.interop.settings import Section

WORDS = 1000
LOGITS, FEATURES = 1e-4, 3e-5  # largest differences: of the largest logit, and of unit features
# what makes a network of one block a stage of timm, by the beginning of its name
_CUT = {"convnext": {"depths": (1, 1, 1, 1)}, "resnet": {}, "swin": {"depths": (1, 1, 1, 1)}}
_CUT |= {"fastvit": {"layers": (1, 1, 1, 1)}}
# families of the documentation, by a pattern of the config's name: the first that matches
FAMILIES = {
    "SigLIP 2": r"ViT-.*SigLIP2",
    "SigLIP": r"ViT-.*SigLIP",
    "CLIPA": r"ViT-.*CLIPA",
    "MetaCLIP 2 (worldwide)": r"ViT-.*worldwide",
    "CLIP: OpenAI, LAION, DataComp, DFN, MetaCLIP (ViT)": r"ViT-",
    "CLIP: OpenAI (ResNet)": r"RN",
    "CoCa": r"coca_",
    "ConvNeXt": r"convnext_",
    "EVA-CLIP": r"EVA0",
    "PE-Core": r"PE-Core",
    "RoBERTa and XLM-R text towers": r"(xlm-)?roberta",
    "mT5 text towers": r"mt5",
    "NLLB-CLIP": r"nllb",
    "ViTamin": r"ViTamin",
    "MobileCLIP": r"MobileCLIP",
    "other image towers of timm": r"",
}


def _perturb(model: Any, seed: int = 5) -> Any:
    """The model with random weights, none of them zero or one."""
    torch = libraries.require("torch")
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "logit_" in name:
                continue
            if p.ndim >= 2:
                fan = p.numel() / p.shape[0]
                std = 0.5 if p.shape[0] >= WORDS else 0.3 if "pos" in name else 1.2 / fan**0.5
                p.copy_(torch.randn(p.shape, generator=g) * std)
            else:
                p.add_(torch.randn(p.shape, generator=g) * 0.1)
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(torch.randn(b.shape, generator=g) * 0.1)
            if name.endswith("running_var"):
                b.copy_(1 + 0.2 * torch.rand(b.shape, generator=g))
    return model.eval()


def _cut(name: str) -> dict[str, Any]:
    start = next((key for key in _CUT if name.startswith(key)), None)
    return {"depth": 1} if start is None else dict(_CUT[start])


def _small(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the config with one block and few words, the `config.json` of its text tower)."""
    small, guest = copy.deepcopy(config), {}
    vision, text = small["vision_cfg"], small["text_cfg"]
    text["layers"], text["vocab_size"] = 1, WORDS
    if not vision.get("timm_model_name"):
        vision["layers"] = 1 if isinstance(vision["layers"], int) else [1, 1, 1, 1]
    if "multimodal_cfg" in small:
        small["multimodal_cfg"]["layers"] = 1
    if name := text.get("hf_model_name"):
        text["hf_model_pretrained"] = False
        guest = dict(published.CONFIGS[name])
        depths = ("num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers")
        guest |= {key: 1 for key in depths if key in guest} | {"vocab_size": WORDS}
    return small, guest


@contextlib.contextmanager
def shallow(guest: dict[str, Any]) -> Iterator[None]:
    """Both libraries build networks of one block, and text towers from `guest`."""
    timm, transformers = libraries.require("timm"), libraries.require("transformers")
    create, build = timm.create_model, timm_models.build

    def theirs(name: str, *args: Any, **kwargs: Any) -> Any:
        return create(name, *args, **kwargs | _cut(name))

    def ours(name: str, args: Section, *rest: Any) -> Any:
        args._values.update(_cut(name))
        return build(name, args, *rest)

    def config_of(name: str, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        made = transformers.AutoConfig.for_model(**guest)
        return (made, kwargs) if return_unused_kwargs else made

    with (
        mock.patch.object(timm, "create_model", theirs),
        mock.patch.object(timm_models, "build", ours),
        mock.patch.object(transformers.AutoConfig, "from_pretrained", config_of),
    ):
        yield


def _built(small: dict[str, Any]) -> Any:
    """open_clip's model of a config, with random weights."""
    open_clip = libraries.require("open_clip")
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "small.json").write_text(json.dumps(small))
        open_clip.add_model_config(folder)
    return _perturb(open_clip.create_model("small", precision="fp32", pretrained_hf=False))


def write(name: str, folder: pathlib.Path, **text: Any) -> dict[str, Any]:
    """A folder of open_clip with random weights, of a config cut as in the survey. text: what else
    its `text_cfg` has. Returns what `shallow` needs, in which clipx reads the folder."""
    small, guest = _small(json.loads((_folder() / f"{name}.json").read_text()))
    small["text_cfg"] |= text
    if guest:
        guest["vocab_size"] = small["text_cfg"]["vocab_size"]
        (folder / "config.json").write_text(json.dumps(guest))
    with shallow(guest), libraries.quiet():
        model = _built(small)
    arrays = {key: x.numpy() for key, x in model.state_dict().items()}
    save_file(arrays, folder / "open_clip_model.safetensors")
    config = {"model_cfg": small, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return guest


def _texts(text: dict[str, Any], guest: dict[str, Any], rng: np.random.Generator) -> np.ndarray:
    """Ids of four texts, with the marks and the padding that the model's tokenizer gives."""
    start, end, pad = 998, 999, 0
    if guest:
        end = {"mt5": 1}.get(guest["model_type"], 2)
        start, pad = (3, 0) if guest["model_type"] == "mt5" else (0, 1)
        start = 5 if guest["model_type"] == "m2m_100" else start
    elif text.get("pool_type", "argmax") != "argmax":
        end = text.get("eos_id", 2)
        pad = 1 if text["pool_type"] == "last" else 0
    length = text.get("context_length", 77)
    ids = np.full((4, length), pad, np.int64)
    for row in range(4):
        last = min(length, 6 + 5 * row) - 1
        ids[row, : last + 1] = rng.integers(10, 990, last + 1)
        ids[row, 0], ids[row, last] = start, end
    return ids


def compare(name: str) -> dict[str, Any]:
    """What came of one config: its `verdict` is "right", "wrong" or "refused"."""
    torch = libraries.require("torch")
    begun = time.monotonic()
    config = json.loads((_folder() / f"{name}.json").read_text())
    row: dict[str, Any] = {"config": name}
    try:
        OpenClip().read({}, {"open_clip_config.json": config}.get)
    except ConfigError as error:
        if error.where:  # and not the weights, of which there are none
            return row | {"verdict": "refused", "reason": f"{error.where}: {error.found}"}
    small, guest = _small(config)
    rng = np.random.default_rng(1)
    ids = _texts(small["text_cfg"], guest, rng)
    with shallow(guest), libraries.quiet():
        model = _built(small)
        arrays = {key: x.numpy() for key, x in model.state_dict().items()}
        given = {"open_clip_config.json": {"model_cfg": small}, "config.json": guest or None}
        read = OpenClip().read(arrays, given.get)
        side = read.image.image_size
        images = [rng.integers(0, 256, (side, side, 3), np.uint8) for _ in range(3)]
        said = verify.ours(read, images, ids)
        pixels = (np.stack(images) / 255 - np.array(read.mean)) / np.array(read.std)
        with torch.no_grad():
            batch = torch.from_numpy(pixels.astype("f")).permute(0, 3, 1, 2)
            image = model.encode_image(batch, normalize=True).numpy()
            text = model.encode_text(torch.from_numpy(ids), normalize=True).numpy()
        back = OpenClip().arrays(read)
    bias = None if model.logit_bias is None else model.logit_bias.detach().numpy()
    expected = verify.logits(image, text, model.logit_scale.detach().numpy(), bias)
    row["logits"] = float(np.abs(said.logits - expected).max())
    row["image"] = float(np.abs(_unit(said.image) - image).max())
    row["text"] = float(np.abs(_unit(said.text) - text).max())
    row["spread"] = float(np.ptp(expected))
    row["back"] = _returned(arrays, back)
    close = row["logits"] < LOGITS * max(1, float(np.abs(expected).max()))
    close = close and max(row["image"], row["text"]) < FEATURES and row["spread"] > 0.05
    row["verdict"] = "right" if close else "wrong"
    return row | {"seconds": round(time.monotonic() - begun, 1)}


def _returned(arrays: dict[str, np.ndarray], back: dict[str, np.ndarray]) -> str:
    """Which array an export of what was read has otherwise; "" if it has all to the bit."""
    kept, back = (
        {k.removeprefix("text."): x for k, x in each.items() if not k.startswith("text_decoder.")}
        for each in (arrays, back)
    )
    for name in kept.keys() | back.keys():
        if name.endswith("num_batches_tracked"):
            continue
        if name not in kept or name not in back:
            return f"{name} is {'new' if name in back else 'missing'}"
        if not np.array_equal(kept[name], back[name]):
            return f"{name} differs"
    return ""


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@functools.cache
def _folder() -> pathlib.Path:
    return pathlib.Path(libraries.require("open_clip").__file__).parent / "model_configs"


def names() -> list[str]:
    """All of open_clip's model configs."""
    return sorted(file.stem for file in _folder().glob("*.json"))


def family(name: str) -> str:
    """The family of the documentation that a config is of."""
    return next(key for key, pattern in FAMILIES.items() if re.match(pattern, name))


def table(rows: list[dict[str, Any]]) -> str:
    """The documentation's table: a line for each family."""
    lines = ["| Family | Configs that open | Refused |", "|---|---|---|"]
    for key in FAMILIES:
        mine = [row for row in rows if family(row["config"]) == key]
        right = [row["config"] for row in mine if row["verdict"] == "right"]
        other = [row["config"] for row in mine if row["verdict"] != "right"]
        shown = ", ".join(f"`{n}`" for n in right) or "none"
        lines.append(f"| {key} | {shown} | {', '.join(f'`{n}`' for n in other)} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Prints the survey of the named configs, or of all."""
    logging.disable(logging.WARNING)
    libraries.require("torch").set_num_threads(1)
    chosen = [name for name in arguments if not name.startswith("-")]
    rows = []
    for name in names():
        if chosen and not any(re.fullmatch(pattern, name) for pattern in chosen):
            continue
        try:
            row = compare(name)
        except Exception as error:
            row = {
                "config": name,
                "verdict": "failed",
                "reason": f"{type(error).__name__}: {error}",
            }
        rows.append(row)
        if "--table" not in arguments:
            print(json.dumps(row), flush=True)
    if "--table" in arguments:
        print(table(rows))
    else:
        print(dict(Counter(row["verdict"] for row in rows)))


if __name__ == "__main__":
    main(sys.argv[1:])
