"""The PyTorch DataLoader that `python -m clipx.dataset bench --against=torch` compares clipx with.

It prepares pictures as DeCLIP does (two views) or as open_clip does (one view). It is not part of
the package. First it prints a line of JSON with `ready` and its versions. Then it reads lines from
stdin. For each line, `two` or `one`, it runs one pass and prints its duration as JSON: wall seconds
and CPU seconds, including those of the workers.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import random
import resource
import sys
import time

import torch
import torch.utils.data
from PIL import Image, ImageFilter

try:
    import torchvision
except RuntimeError:  # a CUDA wheel beside a CPU torch imports only if its operators are declared
    for module in [name for name in sys.modules if name.startswith("torchvision")]:
        del sys.modules[module]
    operators = torch.library.Library("torchvision", "DEF")
    operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision
from torchvision import transforms

SIZE = 224
IMAGENET = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = transforms.Normalize(
    (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
)


def blur(picture: Image.Image) -> Image.Image:
    """MoCo v2's Gaussian blur, through Pillow."""
    return picture.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


# DeCLIP's MOCOV2, for each of its two views
DECLIP = transforms.Compose(
    [
        transforms.RandomResizedCrop(SIZE, scale=(0.2, 1.0)),
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        transforms.RandomGrayscale(p=0.2),
        transforms.RandomApply([blur], p=0.5),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        IMAGENET,
    ]
)
# open_clip's image_transform(is_train=True)
OPEN_CLIP = transforms.Compose(
    [
        transforms.RandomResizedCrop(
            SIZE, scale=(0.9, 1.0), interpolation=transforms.InterpolationMode.BICUBIC
        ),
        transforms.ToTensor(),
        OPENAI,
    ]
)


class Pictures(torch.utils.data.Dataset):
    """`count` examples: the pictures of a folder, repeated as often as needed."""

    def __init__(self, folder: pathlib.Path, count: int, views: str):
        self.files, self.count, self.views = sorted(folder.glob("*.jpg")), count, views

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        with Image.open(self.files[index % len(self.files)]) as file:
            picture = file.convert("RGB")
        if self.views == "one":
            return OPEN_CLIP(picture)
        return torch.stack([DECLIP(picture), DECLIP(picture)])


def cpu_seconds() -> float:
    """CPU seconds of this process and of the child processes that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--pictures", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--workers", type=int, required=True)
    options = parser.parse_args()
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    print(json.dumps({"ready": True, **versions}), flush=True)
    for line in sys.stdin:
        loader = torch.utils.data.DataLoader(
            Pictures(options.folder, options.pictures, line.strip()),
            batch_size=options.batch,
            shuffle=True,
            num_workers=options.workers,
            multiprocessing_context="fork" if options.workers else None,
        )
        cpu, start = cpu_seconds(), time.perf_counter()
        seen = sum(len(batch) for batch in loader)  # its workers end with it, and count as children
        spent = {"seconds": time.perf_counter() - start, "cpu": cpu_seconds() - cpu}
        print(json.dumps({"pictures": seen, **spent}), flush=True)


if __name__ == "__main__":
    main()
