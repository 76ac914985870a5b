"""The PyTorch DataLoader that `python -m clipx.dataset bench --against=torch` compares clipx with.

It prepares pictures as DeCLIP does (two views) or as open_clip does (one view). It is not part of
the package. A turn (clipx/planning/turns.py) is one pass, of `two` or `one` view.
"""

from __future__ import annotations

import argparse
import pathlib
import random
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from PIL import Image, ImageFilter

from clipx.interop import libraries
from clipx.planning import turns

torch = libraries.require("torch")
torchvision = libraries.require("torchvision")
transforms = libraries.require("torchvision.transforms")

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--pictures", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--workers", type=int, required=True)
    options = parser.parse_args()

    def load(views: str) -> dict[str, int]:
        loader = torch.utils.data.DataLoader(
            Pictures(options.folder, options.pictures, views),
            batch_size=options.batch,
            shuffle=True,
            num_workers=options.workers,
            multiprocessing_context="fork" if options.workers else None,
        )
        # its workers end with it: their time is that of children that have ended
        return {"pictures": sum(len(batch) for batch in loader)}

    turns.serve(load, {"torch": torch.__version__, "torchvision": torchvision.__version__})


if __name__ == "__main__":
    main()
