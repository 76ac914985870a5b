"""EfficientNets of timm and of the `efficientnet_pytorch` family (lukemelas' package and those made
from it, such as `efficientnet_lite_pytorch`): names and layouts of their arrays."""

from __future__ import annotations

from typing import Literal

from clipx.interop import rules
from clipx.interop.rules import Rule
from clipx.models.efficientnet import EfficientNet

Names = Literal["timm", "flat"]  # "flat": blocks numbered from first to last
# (ours, timm's where the block widens, timm's where it does not, the flat ones)
_LAYERS = (
    ("expand", ("conv_pw", "bn1"), None, ("_expand_conv", "_bn0")),
    ("dw", ("conv_dw", "bn2"), ("conv_dw", "bn1"), ("_depthwise_conv", "_bn1")),
    ("project", ("conv_pwl", "bn3"), ("conv_pw", "bn2"), ("_project_conv", "_bn2")),
)
_SQUEEZE = {
    "timm": {"squeeze": "se.conv_reduce", "excite": "se.conv_expand"},
    "flat": {"squeeze": "_se_reduce", "excite": "_se_expand"},
}
_ENDS = {
    "timm": (("conv_stem", "bn1"), ("conv_head", "bn2")),
    "flat": (("_conv_stem", "_bn0"), ("_conv_head", "_bn1")),
}


def layout(tower: EfficientNet, names: Names, theirs: str = "") -> list[Rule]:
    """The rules of all arrays below the head. theirs: what stands before their names."""
    found, number = [], 0

    def conv_and_norm(ours: tuple[str, str], at: str, pair: tuple[str, str]) -> None:
        found.append(rules.conv(f"params/image/{ours[0]}", f"{at}{pair[0]}"))
        found.extend(rules.batch_norm("image", ours[1], f"{at}{pair[1]}"))

    conv_and_norm(("conv1", "bn1"), theirs, _ENDS[names][0])
    for i, stage in enumerate(tower.shape[1]):
        for j in range(stage.blocks):
            ours = f"stage_{i}_{j}"
            at = f"{theirs}blocks.{i}.{j}." if names == "timm" else f"{theirs}_blocks.{number}."
            number += 1
            for layer, wide, narrow, flat in _LAYERS:
                pair = wide if stage.expansion != 1 else narrow
                if pair is not None:
                    pair = pair if names == "timm" else flat
                    conv_and_norm((f"{ours}/conv_{layer}", f"{ours}/bn_{layer}"), at, pair)
            if not tower.lite:
                for layer, name in _SQUEEZE[names].items():
                    found += rules.pointwise(f"params/image/{ours}/{layer}", at + name)
    conv_and_norm(("conv_last", "bn_last"), theirs, _ENDS[names][1])
    return found
