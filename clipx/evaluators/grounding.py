"""Visual grounding: where in a picture an expression is, by Grad-CAM of their score.

RefCOCO+ comes as REFER's instances.json and the pickle refs(unc).p. Nothing here opens a pickle. If
you trust it, this code writes the annotations that `Grounding` reads:

    boxes = {a["id"]: a["bbox"] for a in json.load(open("instances.json"))["annotations"]}
    entries = [
        {"image": f"COCO_train2014_{ref['image_id']:012}.jpg", "image_id": ref["image_id"],
         "box": boxes[ref["ann_id"]], "expression": sentence["sent"], "split": ref["split"]}
        for ref in pickle.load(open("refs(unc).p", "rb")) for sentence in ref["sentences"]
    ]
    json.dump(entries, open("refcoco+.json", "w"))
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Annotated, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from clipx.config.ranges import Count, CountOrZero, Range
from clipx.errors import ConfigError
from clipx.evaluators.base import Encode, Evaluator, Examples, Pictures, read_entries
from clipx.types import Metric

Box = tuple[float, float, float, float]  # x, y, width, height in pixels
_REFERENCE = {"image": str, "image_id": int, "box": list, "expression": str, "split": str}
_DETECTION = {"image_id": int, "box": list}
_OVERLAP = 0.5  # intersection over union from which a proposal is right


class Reference(NamedTuple):
    """One expression, with its picture, its true box and the proposed boxes."""

    file: pathlib.Path
    expression: str
    box: Box
    proposals: tuple[Box, ...]


@dataclasses.dataclass(frozen=True)
class Grounding(Evaluator):
    """Two shares of each split's expressions, between 0 and 1.

    `<split>/accuracy` is the share whose best proposal has an intersection over union of at least
    0.5 with the true box. An expression without proposals counts as wrong. `<split>/pointing` is
    the share whose hottest pixel is in the true box. Ties are broken at random, and both numbers
    are expectations over the ties.

    Heat is `encode.heat`, upsampled bilinearly to the picture; pixels outside the centre crop have
    none. A proposal's score is the heat in its box, divided by the box's area to the power
    `area_power`. CLIP-Lite's repository has no code for this. It is a reconstruction after ALBEF
    (Li et al. 2021, arXiv:2107.07651), so its numbers compare only with one another.

    path: the folder of the pictures (COCO's train2014 for RefCOCO+).
    annotations: a JSON file, a list of {"image": path in that folder, "image_id": integer, "box":
    [x, y, width, height] in pixels, "expression": string, "split": string}.
    detections: a JSON file, a list of {"image_id": integer, "box": [x, y, width, height]}, such as
    MAttNet's res101_coco_minus_refer_notime_dets.json; "" leaves out the accuracy.
    overlays: how many pictures of each split, from its first, are written with their heat to
    overlay_folder; "" writes none. Each evaluation overwrites those of the last.

    With `data` in place of annotations nothing is measured: the first `overlays` pictures of that
    set are written, each with the heat of its first caption.
    """

    metrics = {
        "*/accuracy": Metric("more", "percent"),
        "*/pointing": Metric("more", "percent"),
        "overlays": Metric(),
    }

    pictures: Pictures
    examples: Examples | None = None
    path: str = ""
    annotations: str = ""
    detections: str = ""
    splits: tuple[str, ...] = ("val", "testA", "testB")
    area_power: Annotated[float, Range(0, 10)] = 0.5
    overlays: CountOrZero = 10
    overlay_folder: str = ""
    batch_size: Count = 64

    def __post_init__(self):
        if not self.splits:
            raise ConfigError("grounding.splits", "none", "at least one, such as 'val'")
        if self.detections and not self.annotations:
            raise ConfigError("grounding.annotations", "detections alone", "annotations too")
        if self.pictures is None:
            return
        if self.examples is None and not self.annotations:
            raise ConfigError(
                "grounding.annotations",
                "none, and no data either",
                "the annotations of RefCOCO+, or data to show with its captions",
            )
        if self.examples is None:
            self._references()
        elif self.annotations:
            raise ConfigError("grounding.data", "data and annotations", "only one of the two")
        elif not self.overlay_folder or not self.overlays:
            raise ConfigError(
                "grounding.overlay_folder",
                f"{self.overlay_folder!r} for {self.overlays} overlays",
                "a folder, and at least one overlay: with data, drawing is all that is done",
            )
        if self.overlay_folder:
            try:
                pathlib.Path(self.overlay_folder).expanduser().mkdir(parents=True, exist_ok=True)
            except OSError as error:
                fault = f"{self.overlay_folder!r} ({error.strerror})"
                raise ConfigError(
                    "grounding.overlay_folder", fault, "a folder to write to"
                ) from None

    def __call__(self, encode: Encode) -> dict[str, float]:
        if self.examples is not None:
            return self._draw_examples(encode)
        metrics = {}
        for split, references in self._references().items():
            accuracy, pointing = np.mean(list(self._scores(encode, split, references)), axis=0)
            if self.detections:
                metrics[f"{split}/accuracy"] = float(accuracy)
            metrics[f"{split}/pointing"] = float(pointing)
        return metrics

    def _scores(
        self, encode: Encode, split: str, references: list[Reference]
    ) -> Iterator[tuple[float, float]]:
        """For each expression the probabilities that its best proposal and its hottest pixel are
        right."""
        files, side = [reference.file for reference in references], self.pictures.image_size
        done = 0
        for pictures in self.pictures(files, self.batch_size):
            batch = references[done : done + len(pictures)]
            texts = [reference.expression for reference in batch]
            heat = _heat(encode, pictures, texts)
            self._draw(pictures, heat, texts, f"{split}_", done)
            sizes = self.pictures.sizes(files[done : done + len(pictures)])
            for values, reference, size in zip(heat, batch, sizes):
                frame = self.pictures.frame(size)
                pixels, true = upsample(values, side), to_crop(reference.box, size, side, frame)
                proposals = [to_crop(box, size, side, frame) for box in reference.proposals]
                yield (
                    best_overlaps(pixels, proposals, true, self.area_power),
                    hottest_inside(pixels, true),
                )
            done += len(pictures)

    def _draw_examples(self, encode: Encode) -> dict[str, float]:
        assert self.examples is not None
        rows = range(min(self.overlays, len(self.examples)))
        captions = [self.examples.texts(row)[:1] for row in rows]
        if not captions or not all(captions):
            fault = (
                f"row {captions.index(())} without a caption" if captions else "an empty data set"
            )
            raise ConfigError("grounding.data", fault, "a caption for every row")
        texts = [text for (text,) in captions]
        pictures = next(self.examples.batches(len(texts)))
        self._draw(pictures, _heat(encode, pictures, texts), texts, "", 0)
        return {"overlays": float(len(texts))}

    def _draw(
        self,
        pictures: UInt8[np.ndarray, "n s s 3"],
        heat: Float[np.ndarray, "n i j"],
        texts: list[str],
        prefix: str,
        start: int,
    ) -> None:
        """Writes overlays of the pictures. Their numbers start at `start`; only numbers below
        `overlays` are written."""
        if not self.overlay_folder or jax.process_index():
            return
        folder = pathlib.Path(self.overlay_folder).expanduser()
        for i in range(min(self.overlays - start, len(pictures))):
            image = Image.fromarray(overlay(pictures[i], heat[i], texts[i]))
            name = re.sub(r"[^\w.-]", "_", prefix)  # splits are named by a file of annotations
            image.save(folder / f"{name}{start + i:03}.png")

    def _references(self) -> dict[str, list[Reference]]:
        """The expressions of each split. Raises `ConfigError` for a missing or wrong file."""
        folder = pathlib.Path(self.path).expanduser()
        if not self.path or not folder.is_dir():
            raise ConfigError(
                "grounding.path", f"no folder {self.path!r}", "the folder of the pictures"
            )
        proposals: dict[int, list[Box]] = defaultdict(list)
        if self.detections:
            where = "grounding.detections"
            for entry in read_entries(self.detections, where, _DETECTION):
                proposals[entry["image_id"]].append(_box(entry, where))
        splits: dict[str, list[Reference]] = {split: [] for split in self.splits}
        where, known = "grounding.annotations", set()
        for entry in read_entries(self.annotations, where, _REFERENCE):
            known.add(entry["split"])
            if entry["split"] in splits:
                boxes = tuple(proposals[entry["image_id"]])
                file = folder / entry["image"]
                reference = Reference(file, entry["expression"], _box(entry, where), boxes)
                splits[entry["split"]].append(reference)
        for split, references in splits.items():
            if not references:
                raise ConfigError(
                    "grounding.splits", repr(split), "one of " + ", ".join(sorted(known))
                )
        return splits


def _box(entry: dict, where: str) -> Box:
    box = entry["box"]
    if len(box) != 4 or not all(isinstance(v, (int, float)) for v in box) or min(box[2:]) <= 0:
        raise ConfigError(
            where, f"box {box}", "[x, y, width, height] in pixels, with an area above 0"
        )
    return tuple(box)


def _heat(
    encode: Encode, pictures: UInt8[np.ndarray, "n s s 3"], texts: Sequence[str]
) -> Float[np.ndarray, "n i j"]:
    """`encode.heat` with 0 for NaN and infinity, so that a diverged model is cold everywhere."""
    return np.nan_to_num(encode.heat(pictures, texts), posinf=0)


def upsample(heat: Float[np.ndarray, "i j"], side: int) -> Float[np.ndarray, "s s"]:
    """The heat of every pixel of a square picture of s = `side` pixels."""
    grid = Image.fromarray(heat.astype(np.float32))
    return np.asarray(grid.resize((side, side), Image.Resampling.BILINEAR))


def to_crop(
    box: Box, size: tuple[int, int], side: int, frame: tuple[int, int, int, int] | None = None
) -> Box:
    """The box in pixels of the evaluation's crop, for a picture of `size` (width, height). frame:
    as of `Pictures.frame`; None: the picture is resized so that its shorter side is `side`, then
    centre-cropped. The box may reach out of the crop."""
    if frame is None:
        resized = [int(side * length / min(size)) for length in size]
        left, top = (round((length - side) / 2) for length in resized)
    else:
        *resized, left, top = frame
    across, down = (new / old for new, old in zip(resized, size))
    x, y, width, height = box
    return x * across - left, y * down - top, width * across, height * down


def inside(heat: Float[np.ndarray, "s s"], box: Box) -> Float[np.ndarray, "h w"]:
    """The pixels whose centres are in the box."""
    x, y, width, height = box
    ends = (y, y + height), (x, x + width)
    return heat[tuple(slice(*(max(math.ceil(v - 0.5), 0) for v in pair)) for pair in ends)]


def overlap(a: Box, b: Box) -> float:
    """Intersection over union."""
    sides = [min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i]) for i in (0, 1)]
    shared = max(sides[0], 0) * max(sides[1], 0)
    return shared / (a[2] * a[3] + b[2] * b[3] - shared)


def best_overlaps(
    heat: Float[np.ndarray, "s s"], proposals: Sequence[Box], true: Box, area_power: float
) -> float:
    """The probability that the best of `proposals` is right, with ties broken at random."""
    if not proposals:
        return 0.0
    scores = np.array([inside(heat, b).sum() / (b[2] * b[3]) ** area_power for b in proposals])
    right = np.array([overlap(b, true) >= _OVERLAP for b in proposals])
    return float(right[scores == scores.max()].mean())


def hottest_inside(heat: Float[np.ndarray, "s s"], true: Box) -> float:
    """The probability that the hottest pixel is in the true box, with ties broken at random."""
    hottest = heat == heat.max()
    return float(inside(hottest, true).sum() / hottest.sum())


def overlay(
    picture: UInt8[np.ndarray, "s s 3"], heat: Float[np.ndarray, "i j"], caption: str
) -> UInt8[np.ndarray, "h w 3"]:
    """The picture, beside it the picture under its heat, and the caption below."""
    import matplotlib

    side = len(picture) * max(round(256 / len(picture)), 1)  # large enough to look at
    plain = Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC)
    share = upsample(heat / max(heat.max(), np.finfo(np.float32).tiny), side)[..., None]
    colours = 255 * matplotlib.colormaps["jet"](share[..., 0])[..., :3]
    heated = (1 - 0.6 * share) * np.asarray(plain) + 0.6 * share * colours
    font = ImageFont.load_default(size=16)
    letters = int(2 * side / font.getlength("n"))
    lines = textwrap.wrap(caption, letters) or [""]
    canvas = Image.new("RGB", (2 * side, side + 22 * len(lines) + 8), "white")
    canvas.paste(plain, (0, 0))
    canvas.paste(Image.fromarray(heated.round().astype(np.uint8)), (side, 0))
    ImageDraw.Draw(canvas).text((4, side + 4), "\n".join(lines), "black", font, spacing=4)
    return np.asarray(canvas)
