"""The shipped configs, complete: those that start from a user's encoders get small ones."""

import functools
import json
import pathlib
import tempfile

from clipx.config import files
from clipx.training import encoders as resolving
from support import encoders


@functools.cache
def _encoders() -> dict[str, str]:
    """Folders that describe an image and a text encoder; the weights are never read."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="clipx-encoders-"))
    image, text = folder / "image", folder / "text"
    image.mkdir()
    (image / "config.json").write_text(json.dumps({"architecture": "efficientnet_lite0"}))
    (image / "model.safetensors").touch()
    tower = encoders.bert_tower("bert", width=256, depth=1)
    params = encoders.write_bert(text, "bert", tower)
    encoders.write_tokenizer(text, "bert")
    encoders.write_modules(text, tower.clone(pool="mean"), params)
    return {"image": str(image), "text": str(text)}


def load(spec: str, objective: str | None = None) -> dict:
    """The config of `spec`, with its towers named."""
    config = files.load(spec, objective)
    for side in ("image", "text"):
        if config[side]["name"] == resolving.AUTO:
            config[side]["init_from"] = _encoders()[side]
    return resolving.resolve(config)


def shrunk(spec: str, objective: str | None = None) -> dict:
    """The config of `spec` with towers of few layers. All of its values are still bound and traced,
    in a tenth of the time."""
    config = load(spec, objective)
    few = {"resnet": {"blocks": (1, 1, 1, 1), "width": 32}, "efficientnet": {"depth": 0.1}}
    for side in ("image", "text"):
        config[side] |= few.get(config[side]["name"], {"depth": 1})
    return config
