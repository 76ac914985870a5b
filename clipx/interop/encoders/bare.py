"""Image encoders in a weights file without a config: the architecture is read off the arrays."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable
from typing import Any

from clipx.errors import ConfigError
from clipx.interop import efficientnet_layout, resnet_layout
from clipx.interop.encoders.base import Encoder
from clipx.interop.encoders.common import reader
from clipx.interop.encoders.timm import LEFT_OUT
from clipx.interop.rules import Arrays
from clipx.models.efficientnet import VARIANTS, EfficientNet
from clipx.models.resnet import PLAIN, ResNet
from clipx.ops import photometry

# the least that a config of timm holds
CONFIG = '{"architecture": NAME, "pretrained_cfg": {"input_size": .., "mean": .., "std": ..}}'
_LITE = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
_IMAGENET = {"mean": photometry.IMAGENET_MEAN, "std": photometry.IMAGENET_STD}


def describe(arrays: Callable[[], Arrays], file: pathlib.Path, where: str) -> Encoder:
    """The encoder in `file`, whose arrays are `arrays()`. Raises `ConfigError` at `where`."""
    names = arrays()
    if "_conv_stem.weight" in names:
        return _efficientnet(arrays, file, where)
    if "layer1.0.conv1.weight" in names:
        return _resnet(arrays, file, where)
    found = f"{file}, whose arrays do not tell what it is: {', '.join(sorted(names)[:3])}, ..."
    fix = f"write {file.parent / 'config.json'} as timm does: {CONFIG}"
    raise ConfigError(where, found, "a config.json beside the weights", fix)


def _resnet(arrays: Callable[[], Arrays], file: pathlib.Path, where: str) -> Encoder:
    """A ResNet of torchvision or timm, which have the same names."""
    found = arrays()
    blocks = tuple(
        sum(bool(re.fullmatch(rf"layer{i}\.\d+\.conv1\.weight", name)) for name in found)
        for i in range(1, 5)
    )
    shape = (blocks, "layer1.0.conv3.weight" in found)
    variant = next((name for name, known in PLAIN.items() if known == shape), None)
    if variant is None:
        stated = f"{file}, a ResNet with {blocks} blocks"
        raise ConfigError(where, stated, f"one of {', '.join(PLAIN)}")
    deep = "conv1.0.weight" in found
    tower = ResNet(variant=variant, deep_stem=deep, embed_dim=0, dtype="float32")
    return Encoder(
        layout="timm" if deep else "torchvision",
        tower=tower,
        read=reader(tower, resnet_layout.layout(tower), arrays, LEFT_OUT, where),
        preprocessing=_IMAGENET,
        notes=("image_size=224, mean and std of ImageNet are guessed: the file has none",),
    )


def _efficientnet(arrays: Callable[[], Arrays], file: pathlib.Path, where: str) -> Encoder:
    """Weights of the TensorFlow TPU repository, as `efficientnet_pytorch` keeps them: SAME padding,
    and the epsilon and momentum of that repository's batch norm."""
    found = {name: x.shape for name, x in arrays().items()}
    lite = not any("._se_reduce." in name for name in found)
    fields: dict[str, Any] = {"padding": "same", "norm_eps": 1e-3, "norm_momentum": 0.01}

    def fits(variant: str) -> bool:
        tower = EfficientNet(variant=variant)
        stages = tower.shape[1]
        last = sum(stage.blocks for stage in stages) - 1
        return (
            tower.lite == lite
            and f"_blocks.{last + 1}._bn1.weight" not in found
            and found.get(f"_blocks.{last}._bn2.weight") == (stages[-1].width,)
        )

    variant = next((name for name in VARIANTS if fits(name)), None)
    if variant is None:
        raise ConfigError(where, f"an EfficientNet of unknown size in {file}", ", ".join(VARIANTS))
    fields["image_size"] = VARIANTS[variant][2]
    tower = EfficientNet(variant=variant, embed_dim=0, dtype="float32", **fields)
    guess = f"image_size={tower.image_size}, mean and std are those that {variant} was trained with"
    return Encoder(
        layout="efficientnet-lite" if lite else "efficientnet_pytorch",
        tower=tower,
        read=reader(
            tower, efficientnet_layout.layout(tower, "flat"), arrays, re.compile(r"_fc\."), where
        ),
        preprocessing=_LITE if lite else _IMAGENET,
        notes=(guess,),
    )
