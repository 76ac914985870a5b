"""CLIP, DeCLIP, CLIP-Lite and ProtoCLIP with ViT-S/16 at 112 pixels, CLIP and DeCLIP with RN50 at
128 (it needs a multiple of 32), on one GPU: 15 epochs of Flickr8k at batch 256 in bfloat16, meant
for 8 minutes in all. $FLICKR8K and $CIFAR10 are the folders of the data.

The text tower has six layers of width 384; everything else is of the method's `:small` recipe.
docs/results.md says what was tried: it has not run on a GPU.
"""

from clipx.configs import common, compare_scratch

_IMAGES = {
    "vit_s16": {"name": "vit", "variant": "ViT-S/16", "image_size": 112},
    "rn50": {"name": "resnet", "variant": "RN50", "image_size": 128},
}
_METHODS = {"vit_s16": ("clip", "declip", "clip_lite", "protoclip"), "rn50": ("clip", "declip")}
VARIANTS = tuple(f"{method}_{image}" for image, of in _METHODS.items() for method in of)

CLAIMS = [
    claim
    for paper, method in (
        (common.DECLIP, "declip"),
        (common.CLIP_LITE, "clip_lite"),
        (common.PROTOCLIP, "protoclip"),
    )
    for image in _IMAGES
    if f"{method}_{image}" in VARIANTS
    for claim in common.claims(
        paper,
        f"{method}_{image}",
        f"clip_{image}",
        common.MORE_DATA,
        retrieval__mean_recall=f"{method} retrieves better than CLIP ({image})",
        cifar10__top1=f"{method}'s features transfer better to CIFAR-10 ({image})",
    )
]


def get_config(variant=VARIANTS[0]):
    image = "rn50" if variant.endswith("rn50") else "vit_s16"
    method = variant.removesuffix(f"_{image}")
    config = compare_scratch.METHODS[method].get_config("small")
    width = 0 if method == "clip_lite" else 384
    config.image = {**_IMAGES[image], "embed_dim": width, "dtype": "bfloat16"}
    config.text.update({"width": 384, "depth": 6, "heads": 6, "embed_dim": width})
    config.text.dtype = "bfloat16"
    common.compared(config)
    for name in ("tiny_imagenet", "tiny_imagenet_zero_shot"):
        del config.evals[name]
    config.data.workers = 8
    config.train.batch_size = 256
    if method == "protoclip":
        config.objective.episode_size = 23 * 256
    return config
