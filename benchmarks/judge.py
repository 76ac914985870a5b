"""Evaluates an open_clip export with open_clip alone.

    python benchmarks/judge.py DIR --pairs 'test-*.tar' --classes test.tar

The model, transform, tokenizer and evaluation are open_clip's; no code of clipx runs. Retrieval is
measured in both directions among all captions of the shards, as CLIP_benchmark counts it, and among
the first captions of the pictures, as open_clip's trainer does. Zero-shot classification is of
pictures in class folders, on disk or in a tar. All numbers are shares, under the names that
`clipx.evaluate` prints.
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
except RuntimeError:  # a CUDA wheel beside a CPU torch imports only if its operators are declared
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
    """The open_clip model of a folder, on the CPU in float32."""

    def __init__(self, folder: str | os.PathLike, batch: int = 256):
        name = f"local-dir:{folder}"
        self.model, _, self.transform = open_clip.create_model_and_transforms(name)
        self.tokenizer = open_clip.get_tokenizer(name)
        self.model.eval()
        self.batch = batch

    def pictures(self, files: Sequence[bytes]) -> Iterator[torch.Tensor]:
        """Batches of transformed pictures of the files."""
        for start in range(0, len(files), self.batch):
            batch = files[start : start + self.batch]
            yield torch.stack([self.transform(Image.open(io.BytesIO(file))) for file in batch])

    @torch.inference_mode()
    def retrieval(self, pairs: Sequence[tuple[bytes, Sequence[str]]]) -> dict[str, float]:
        """Recalls among all captions; under `first/` among the first captions of the pictures."""
        texts = [text for _, captions in pairs for text in captions]
        owner = torch.tensor([row for row, (_, captions) in enumerate(pairs) for _ in captions])
        files = [file for file, _ in pairs]
        images = [self.model.encode_image(x, normalize=True) for x in self.pictures(files)]
        batches = [texts[i : i + self.batch] for i in range(0, len(texts), self.batch)]
        captions = [self.model.encode_text(self.tokenizer(x), normalize=True) for x in batches]
        images, captions = torch.cat(images), torch.cat(captions)
        matches = owner[:, None] == torch.arange(len(pairs))
        recalls = {}
        for name, scores, right in (
            ("image_to_text", images @ captions.T, matches.T),
            ("text_to_image", captions @ images.T, matches),
        ):
            best = scores.topk(max(KS), dim=1).indices
            hits = right.gather(1, best)
            recalls |= {f"{name}_R@{k}": float(hits[:, :k].any(1).float().mean()) for k in KS}
        first = torch.cat([torch.tensor([True]), owner[1:] != owner[:-1]])
        theirs = get_clip_metrics(images, captions[first], self.model.logit_scale.exp())
        return recalls | {f"first/{name}": float(x) for name, x in theirs.items() if "_R@" in name}

    @torch.inference_mode()
    def zero_shot(
        self,
        files: Sequence[bytes],
        labels: Sequence[int],
        classes: Sequence[str],
        templates: Sequence[str] = TEMPLATES,
    ) -> dict[str, float]:
        """Accuracies of open_clip's classifier, counted as in its `zero_shot.accuracy`.

        That function itself (open_clip 3.3.0) fails with NumPy 2.4.
        """
        classifier = open_clip.build_zero_shot_classifier(
            self.model, self.tokenizer, classes, templates
        )
        images = [self.model.encode_image(x, normalize=True) for x in self.pictures(files)]
        target = torch.tensor(labels)
        best = (100.0 * torch.cat(images) @ classifier).topk(min(5, len(classes))).indices
        hits = (best == target[:, None]).float()
        per_picture = {"top1": hits[:, 0], "top5": hits.sum(1)}
        per_class = [hits[target == label, 0].mean() for label in target.unique()]
        means = {name: float(x.mean()) for name, x in per_picture.items()}
        return means | {"mean_per_class": float(torch.stack(per_class).mean())}


def read_pairs(pattern: str) -> list[tuple[bytes, list[str]]]:
    """Pictures and captions of tar shards: key.jpg beside key.json with `captions`, or key.txt."""
    pairs = []
    for path in sorted(glob.glob(pattern)):
        examples: dict[str, dict[str, bytes]] = {}
        for name, data in members(path):
            key, _, end = name.partition(".")
            examples.setdefault(key, {})[f".{end}"] = data
        for example in examples.values():
            picture = next(example[end] for end in ENDS if end in example)
            captions = json.loads(example.get(".json", b"{}")).get("captions")
            pairs.append((picture, captions or [example[".txt"].decode()]))
    return pairs


def read_classes(path: str, names: str = "") -> tuple[list[bytes], list[int], list[str]]:
    """(pictures, labels, class names) of class folders.

    Classes are sorted by folder. A class has the name of its folder, or the one that the json file
    `names` {folder: name} gives it.
    """
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
    """Names and contents of the files in a tar or below a folder."""
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
    results = {}
    if args.pairs:
        results["retrieval"] = judge.retrieval(read_pairs(args.pairs))
    for path in args.classes:
        results[path] = judge.zero_shot(*read_classes(path, args.names), args.templates)
    for name, metrics in results.items():
        print(name)
        for metric, value in metrics.items():
            print(f"  {metric:24}  {value:.4f}")


if __name__ == "__main__":
    main()
