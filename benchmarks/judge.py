"""`python benchmarks/judge.py DIR --pairs 'test-*.tar' --classes test.tar`: what open_clip says of
an export, by its own model, transform, tokenizer and evaluation; nothing of clipx is asked.

Retrieval in both directions among all captions of the shards, as CLIP_benchmark counts it, and
among each picture's first, as open_clip's trainer does; zero-shot classification of pictures in
class folders, on a disk or in a tar. Numbers are shares, by the names that `clipx.evaluate` prints.
"""

from __future__ import annotations

import argparse
import glob
import io
import json
import os
import pathlib
import tarfile
from collections.abc import Iterator, Sequence

import torch
from PIL import Image

try:
    import torchvision  # noqa: F401
except RuntimeError:  # a wheel for CUDA beside a torch without: its operators must be known
    import sys

    for module in [name for name in sys.modules if name.startswith("torchvision")]:
        del sys.modules[module]
    operators = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        operators.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import open_clip
from open_clip_train.train import get_clip_metrics

ENDS = (".jpg", ".jpeg", ".png", ".webp")
TEMPLATES = ("a photo of a {}.",)
KS = (1, 5, 10)


class Judge:
    """open_clip's model of a folder, on the CPU in float32."""

    def __init__(self, folder: str | os.PathLike, batch: int = 256):
        name = f"local-dir:{folder}"
        self.model, _, self.transform = open_clip.create_model_and_transforms(name)
        self.tokenizer = open_clip.get_tokenizer(name)
        self.model.eval()
        self.batch = batch

    def pictures(self, files: Sequence[bytes]) -> Iterator[torch.Tensor]:
        """The files as the model takes them, a batch at a time."""
        for start in range(0, len(files), self.batch):
            part = files[start : start + self.batch]
            yield torch.stack([self.transform(Image.open(io.BytesIO(file))) for file in part])

    @torch.inference_mode()
    def retrieval(self, pairs: Sequence[tuple[bytes, Sequence[str]]]) -> dict[str, float]:
        """Recalls among all captions, and after `first/` among those that are a picture's first."""
        texts = [text for _, own in pairs for text in own]
        owner = torch.tensor([row for row, (_, own) in enumerate(pairs) for _ in own])
        files = [file for file, _ in pairs]
        images = [self.model.encode_image(x, normalize=True) for x in self.pictures(files)]
        parts = [texts[i : i + self.batch] for i in range(0, len(texts), self.batch)]
        captions = [self.model.encode_text(self.tokenizer(x), normalize=True) for x in parts]
        images, captions = torch.cat(images), torch.cat(captions)
        own = owner[:, None] == torch.arange(len(pairs))
        found = {}
        for name, scores, right in (
            ("image_to_text", images @ captions.T, own.T),
            ("text_to_image", captions @ images.T, own),
        ):
            best = scores.topk(max(KS), dim=1).indices
            hits = right.gather(1, best)
            found |= {f"{name}_R@{k}": float(hits[:, :k].any(1).float().mean()) for k in KS}
        first = torch.cat([torch.tensor([True]), owner[1:] != owner[:-1]])
        theirs = get_clip_metrics(images, captions[first], self.model.logit_scale.exp())
        return found | {f"first/{name}": float(x) for name, x in theirs.items() if "_R@" in name}

    @torch.inference_mode()
    def zero_shot(
        self,
        files: Sequence[bytes],
        labels: Sequence[int],
        classes: Sequence[str],
        templates: Sequence[str] = TEMPLATES,
    ) -> dict[str, float]:
        """Accuracies by open_clip's classifier, counted as its `zero_shot.accuracy` does, which
        itself (3.3.0) stops at NumPy 2.4."""
        classifier = open_clip.build_zero_shot_classifier(
            self.model, self.tokenizer, classes, templates
        )
        images = [self.model.encode_image(x, normalize=True) for x in self.pictures(files)]
        target = torch.tensor(labels)
        best = (100.0 * torch.cat(images) @ classifier).topk(min(5, len(classes))).indices
        hits = (best == target[:, None]).float()
        found = {"top1": hits[:, 0], "top5": hits.sum(1)}
        right = [hits[target == label, 0].mean() for label in target.unique()]
        means = {name: float(x.mean()) for name, x in found.items()}
        return means | {"mean_per_class": float(torch.stack(right).mean())}


def read_pairs(pattern: str) -> list[tuple[bytes, list[str]]]:
    """Pictures and captions of tar shards: key.jpg beside key.json with `captions`, or key.txt."""
    found = []
    for path in sorted(glob.glob(pattern)):
        parts: dict[str, dict[str, bytes]] = {}
        for name, data in members(path):
            key, _, end = name.partition(".")
            parts.setdefault(key, {})[f".{end}"] = data
        for part in parts.values():
            picture = next(part[end] for end in ENDS if end in part)
            captions = json.loads(part.get(".json", b"{}")).get("captions")
            found.append((picture, captions or [part[".txt"].decode()]))
    return found


def read_classes(path: str, names: str = "") -> tuple[list[bytes], list[int], list[str]]:
    """Pictures, labels and class names of class folders: sorted, named by the folder, or by a json
    file of {folder: name}."""
    folders: dict[str, list[bytes]] = {}
    for name, data in members(path):
        if name.lower().endswith(ENDS):
            folders.setdefault(pathlib.PurePath(name).parts[-2], []).append(data)
    order = sorted(folders)
    readable = json.loads(pathlib.Path(names).read_text()) if names else {}
    classes = [readable.get(folder, folder).replace("_", " ") for folder in order]
    files = [file for folder in order for file in folders[folder]]
    return files, [label for label, f in enumerate(order) for _ in folders[f]], classes


def members(path: str) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files of a tar or below a folder."""
    if os.path.isdir(path):
        for file in sorted(pathlib.Path(path).rglob("*")):
            if file.is_file():
                yield str(file.relative_to(path)), file.read_bytes()
        return
    with tarfile.open(path) as tar:
        for member in tar:
            if member.isfile():
                yield member.name, tar.extractfile(member).read()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", help="an export of --format=open_clip")
    parser.add_argument("--pairs", help="tar shards of pictures and captions")
    parser.add_argument("--classes", nargs="+", default=[], help="class folders, or tars of them")
    parser.add_argument("--names", default="", help="a json file {folder: name of the class}")
    parser.add_argument("--templates", nargs="+", default=TEMPLATES)
    args = parser.parse_args()
    judge = Judge(args.folder)
    found = {}
    if args.pairs:
        found["retrieval"] = judge.retrieval(read_pairs(args.pairs))
    for path in args.classes:
        found[path] = judge.zero_shot(*read_classes(path, args.names), args.templates)
    for name, metrics in found.items():
        print(name)
        for metric, value in metrics.items():
            print(f"  {metric:24}  {value:.4f}")


if __name__ == "__main__":
    main()
