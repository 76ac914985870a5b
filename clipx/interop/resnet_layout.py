"""Plain ResNets of torchvision, timm and transformers: names and layouts of their arrays."""

from __future__ import annotations

from typing import Literal

from clipx.interop import rules
from clipx.interop.rules import Rule
from clipx.models.resnet import PLAIN, ResNet


def layout(
    image: ResNet, theirs: str = "", names: Literal["torchvision", "transformers"] = "torchvision"
) -> list[Rule]:
    """The rules of all arrays below the head. timm's names are torchvision's. theirs: what stands
    before the names, with its dot."""
    found: list[Rule] = []

    def pair(ours: tuple[str, str], conv: str, norm: str) -> None:
        found.append(rules.conv(f"params/image/{ours[0]}", theirs + conv))
        found.extend(rules.batch_norm("image", ours[1], theirs + norm))

    transformers = names == "transformers"
    if transformers:
        stem = "embedder.embedder."
        pair(("conv1", "bn1"), f"{stem}convolution", f"{stem}normalization")
    elif image.deep_stem:
        for i, (conv, norm) in enumerate((("0", "1"), ("3", "4"))):
            pair((f"conv{i + 1}", f"bn{i + 1}"), f"conv1.{conv}", f"conv1.{norm}")
        pair(("conv3", "bn3"), "conv1.6", "bn1")
    else:
        pair(("conv1", "bn1"), "conv1", "bn1")
    (blocks, channels), bottleneck = image.shape, PLAIN[image.variant][1]
    for stage, count in enumerate(blocks):
        after = image.shape[1] * 2**stage * (4 if bottleneck else 1)
        for block in range(count):
            ours = f"stage_{stage}_{block}"
            at = f"encoder.stages.{stage}.layers.{block}." if transformers else ""
            at = at or f"layer{stage + 1}.{block}."
            for i in range(1, 4 if bottleneck else 3):
                part = f"{at}layer.{i - 1}."
                conv, norm = (
                    (f"{part}convolution", f"{part}normalization")
                    if transformers
                    else (f"{at}conv{i}", f"{at}bn{i}")
                )
                pair((f"{ours}/conv{i}", f"{ours}/bn{i}"), conv, norm)
            if channels != after or (stage and not block):
                shortcut = (f"{ours}/conv_shortcut", f"{ours}/bn_shortcut")
                if transformers:
                    pair(shortcut, f"{at}shortcut.convolution", f"{at}shortcut.normalization")
                else:
                    # timm's average pooling is number 0, where there is one
                    first = int(image.deep_stem)
                    pair(shortcut, f"{at}downsample.{first}", f"{at}downsample.{first + 1}")
            channels = after
    return found
