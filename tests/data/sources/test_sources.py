"""The same pictures give the same batches from every source, and each odd input has one outcome."""

from __future__ import annotations

import csv
import io
import json
import os
import resource
import struct
import sys
import tarfile
import zlib

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from support.loaders import build_loader
from support.tfds import build

from clipx.data.evaluation import EvaluationSet
from clipx.data.loader import Loader
from clipx.data.sources.table import Table
from clipx.data.sources.tfds import Tfds
from clipx.data.sources.webdataset import WebDataset
from clipx.data.text import tokenizers
from clipx.data.text.tokenizers import TokenizerConfig
from clipx.errors import DataError

SIDE, CONTEXT = 32, 40
EMOJI = "\N{GRINNING FACE}\U0001f469\u200d\U0001f680"  # the second glyph is made of three
CAPTIONS = ("one", 'a "quoted", one', "<eot> & \u00e9", "\u05d0\u05d1\u05d2", EMOJI)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A byte-pair tokenizer with one merge, so that decoding returns the text."""
    merges = tmp_path_factory.mktemp("merges") / "merges.txt"
    merges.write_text("#version: 0.2\nt h\n")
    return tokenizers.build(TokenizerConfig("clip_bpe", 515, CONTEXT, str(merges)))


def encode(picture, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    picture.save(file, kind, **options)
    return file.getvalue()


def photo(seed: int = 0, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    """A smooth picture, as photographs are."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def write(path, members: dict[str, bytes | str]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def loader(source, tokenizer, batch_size: int, **changes) -> Loader:
    values = {"image_size": SIDE, "seed": 3} | changes
    return build_loader(source, tokenizer, batch_size=batch_size, **values)


def drawn() -> list[tuple[str, bytes, list[str]]]:
    """(name, picture, captions) in two formats and several sizes, with one to five captions."""
    samples = []
    for i in range(20):
        kind, name = ("PNG", f"{i:03d}.png") if i % 4 == 3 else ("JPEG", f"{i:03d}.jpg")
        picture = encode(photo(i, 40 + 9 * i, 200 - 7 * i), kind)
        samples.append((name, picture, [f"{i} {text}" for text in CAPTIONS[: 1 + i % 5]]))
    return samples


def flickr() -> list[tuple[str, bytes, list[str]]]:
    """The first pictures of a Flickr8k shard, with their captions from the table beside it."""
    folder = os.environ["FLICKR8K"]
    with tarfile.open(os.path.join(folder, "train-000000.tar")) as tar:
        jpegs = [member for member in tar if member.name.endswith(".jpg")][:64]
        pictures = {member.name: tar.extractfile(member).read() for member in jpegs}
    captions: dict[str, list[str]] = {name: [] for name in pictures}
    with open(os.path.join(folder, "captions.csv"), newline="") as file:
        for line in csv.DictReader(file):
            if line["filepath"] in captions:
                captions[line["filepath"]].append(line["caption"])
    return [(name, pictures[name], captions[name]) for name in pictures]


@pytest.fixture(
    scope="module",
    params=[
        drawn,
        pytest.param(
            flickr,
            marks=pytest.mark.skipif(
                "FLICKR8K" not in os.environ, reason="FLICKR8K names no folder of shards"
            ),
        ),
    ],
)
def sources(request, tmp_path_factory):
    """The same samples as shards, as a table of files, and as prepared by TFDS."""
    samples = request.param()
    folder = tmp_path_factory.mktemp("sources")
    cut = len(samples) // 3
    for shard, part in enumerate((samples[:cut], samples[cut:])):
        members = {}
        for name, picture, captions in part:
            members[name] = picture
            members[name[:-4] + ".json"] = json.dumps({"captions": captions})
        write(folder / f"{shard}.tar", members)
    with open(folder / "captions.csv", "w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["filepath", "caption", "split"])
        for name, _, captions in samples:
            lines.writerow([name, f"of another split: {name}", "val"])
            lines.writerows([name, caption, "train"] for caption in captions)
    for name, picture, _ in samples:
        (folder / name).write_bytes(picture)
    kinds = {
        "image": tfds.features.Image(),
        "captions": tfds.features.Sequence({"text": tfds.features.Text()}),
    }

    def row(i):
        _, picture, captions = samples[i]
        return {"image": io.BytesIO(picture), "captions": [{"text": text} for text in captions]}

    build(folder, "Samples", kinds, row, {"train": len(samples)}, shuffle=False)
    return {
        "webdataset": WebDataset(str(folder / "{0,1}.tar")),
        "table": Table(path=str(folder / "captions.csv"), where="split=train"),
        "tfds": Tfds(name="samples", split="train", data_dir=str(folder)),
    }


@pytest.mark.parametrize("other", ["table", "tfds"])
def test_a_set_gives_the_same_batches_from_every_source(sources, other, tokenizer):
    crops, flips = ((0.2, 1.0), (0.5, 1.0)), (True, True)
    a, b = (
        loader(sources[name], tokenizer, 8, crops=crops, flips=flips, texts=("caption", "other"))
        for name in ("webdataset", other)
    )
    assert len(a.source) == len(b.source) in (20, 64)
    for ours, theirs in zip(a.batches(0, 12), b.batches(0, 12), strict=True):
        assert not ours["bad"].any() and not theirs["bad"].any()
        for name in ("image", "text", "row", "position"):
            assert np.array_equal(ours[name], theirs[name]), name
        assert ours["image"].std() > 10 and (ours["text"] > 0).sum() > 8 * 2 * 3


@pytest.mark.parametrize("sources", [drawn], indirect=True)
def test_a_worker_loads_the_same_batches(sources, tokenizer):
    source = sources["tfds"]  # has the most state to pickle
    plain, away = (loader(source, tokenizer, 8, workers=n).batches(0, 2) for n in (0, 1))
    for ours, theirs in zip(plain, away, strict=True):
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_a_set_is_evaluated_the_same_from_every_source(sources):
    sets = [EvaluationSet(source, SIDE) for source in sources.values()]
    for row in range(0, len(sets[0]), 7):
        first = sets[0].picture(row)
        assert all(np.array_equal(other.picture(row), first) for other in sets[1:])
        assert sets[0].texts(row) == sets[1].texts(row) == sets[2].texts(row)


def test_uneven_shards_do_not_constrain_batches(tmp_path, tokenizer):
    at = 0
    for shard, size in enumerate((1, 7, 4)):
        names = [f"{at + i:02d}" for i in range(size)]
        members = {f"{n}.jpg": encode(photo(int(n)), "JPEG") for n in names}
        members |= {f"{n}.txt": n for n in names}
        write(tmp_path / f"{shard}.tar", dict(sorted(members.items())))
        at += size
    data = loader(WebDataset(str(tmp_path / "*.tar")), tokenizer, 4)
    for epoch in range(2):
        rows = [b["row"].tolist() for b in data.batches(3 * epoch, 3 * epoch + 3)]
        assert sorted(sum(rows, [])) == list(range(12))


def test_a_truncated_shard_is_an_error_or_gives_its_complete_samples(tmp_path, tokenizer):
    members = {}
    for i in range(5):
        members |= {f"{i}.jpg": encode(photo(i), "JPEG"), f"{i}.txt": str(i)}
    path = write(tmp_path / "x.tar", members)
    os.truncate(path, os.path.getsize(path) - 10240)
    with pytest.raises(DataError, match=r"x\.tar: truncated or damaged; the last complete member"):
        WebDataset(path)
    source = WebDataset(path, truncated="keep")
    batch = loader(source, tokenizer, len(source)).load(0, np.arange(len(source)))
    assert 0 < len(source) < 5 and not batch["bad"].any()


def load(tmp_path, tokenizer, picture: bytes, words: str | bytes = "words", kind: str = "jpg"):
    """Loads one odd sample beside a good one. Returns (pixels, ids, "") or (None, None, reason)."""
    members = {"a.png": encode(photo(99), "PNG"), "a.txt": "good"}
    path = write(tmp_path / "x.tar", members | {f"odd.{kind}": picture, "odd.txt": words})
    source = WebDataset(path)
    batch = loader(source, tokenizer, 2, crops=((1.0, 1.0),)).load(0, np.arange(2))
    good = batch["row"].tolist().index(0)
    assert np.array_equal(batch["image"][good, 0], photo(99))
    if 1 not in batch["row"]:
        ((bad,),) = (json.loads(text) for text in batch["bad"] if text)
        assert (bad["row"], bad["key"]) == (1, "x.tar/odd") and "\n" not in bad["reason"]
        with pytest.raises(DataError, match="^row 1 of the evaluation set: x.tar/odd: "):
            EvaluationSet(source, SIDE).picture(1)
        return None, None, bad["reason"]
    assert not batch["bad"].any()
    pixels = batch["image"][1 - good, 0]
    evaluated = EvaluationSet(source, SIDE).picture(1)
    assert np.abs(evaluated.astype(int) - pixels).mean() < 3
    return pixels, batch["text"][1 - good, 0].tolist(), ""


GREY = np.asarray(Image.fromarray(photo()).convert("L"))
ALPHA = np.random.default_rng(1).integers(0, 256, (SIDE, SIDE), np.uint8)
PALETTE = Image.fromarray(photo()).quantize(16)
FRAMES = [Image.fromarray(photo(i)) for i in range(3)]
ANIMATED = {"save_all": True, "append_images": FRAMES[1:], "duration": 50}
CMYK = encode(Image.fromarray(photo()).convert("CMYK"), "JPEG", quality=95)
CLEAR = encode(PALETTE, "GIF", transparency=2)
LAB = encode(Image.fromarray(photo()).convert("LAB"), "TIFF")
SIXTEEN = photo()[..., ::-1].astype(np.uint16) * 256 + 77
ROTATED = Image.Exif()
ROTATED[0x0112] = 6


def grey(pixels: np.ndarray) -> np.ndarray:
    return np.stack([pixels] * 3, -1)


@pytest.mark.parametrize(
    ("data", "kind", "wanted", "off"),
    [
        pytest.param(encode(GREY, "PNG"), "png", grey(GREY), 0, id="grey"),
        pytest.param(encode(GREY, "JPEG", quality=98), "jpg", grey(GREY), 2, id="grey jpeg"),
        pytest.param(
            encode(Image.merge("LA", list(map(Image.fromarray, (GREY, ALPHA)))), "PNG"),
            "png",
            grey(GREY),
            0,
            id="grey with alpha",
        ),
        pytest.param(encode(np.dstack([photo(), ALPHA]), "PNG"), "png", photo(), 0, id="alpha"),
        pytest.param(
            encode(PALETTE, "PNG"), "png", np.asarray(PALETTE.convert("RGB")), 0, id="palette"
        ),
        pytest.param(
            encode(PALETTE, "PNG", transparency=3),
            "png",
            np.asarray(PALETTE.convert("RGB")),
            0,
            id="palette with a transparent colour",
        ),
        pytest.param(encode(GREY > 99, "PNG"), "png", grey((GREY > 99) * 255), 0, id="one bit"),
        pytest.param(
            CMYK, "jpg", np.asarray(Image.open(io.BytesIO(CMYK)).convert("RGB")), 2, id="CMYK"
        ),
        pytest.param(
            encode(GREY.astype(np.uint16) * 256 + 77, "PNG"), "png", grey(GREY), 1, id="grey 16 bit"
        ),
        pytest.param(
            cv2.imencode(".png", SIXTEEN)[1].tobytes(), "png", photo(), 1, id="16 bit a channel"
        ),
        pytest.param(encode(FRAMES[0], "PNG", **ANIMATED), "png", photo(), 0, id="animated PNG"),
        pytest.param(
            encode(FRAMES[0], "WEBP", lossless=True, **ANIMATED),
            "webp",
            photo(),
            0,
            id="animated WebP",
        ),
        pytest.param(
            encode(PALETTE, "GIF", **ANIMATED),
            "png",
            np.asarray(PALETTE.convert("RGB")),
            0,
            id="animated GIF called .png",
        ),
        pytest.param(
            encode(photo(), "JPEG", quality=98, exif=ROTATED),
            "jpg",
            photo(),
            4,
            id="rotated, with an EXIF tag",
        ),
        pytest.param(encode(photo(), "PNG"), "jpg", photo(), 0, id="PNG called .jpg"),
        pytest.param(
            CLEAR,
            "png",
            np.asarray(Image.open(io.BytesIO(CLEAR)).convert("RGB")),
            0,
            id="GIF with a transparent colour",
        ),
        pytest.param(
            LAB, "png", np.asarray(Image.open(io.BytesIO(LAB)).convert("RGB")), 0, id="Lab TIFF"
        ),
        pytest.param(
            encode((GREY / 255).astype(np.float32), "TIFF"), "png", grey(GREY), 0, id="floats to 1"
        ),
        pytest.param(
            encode(GREY.astype(np.float32), "TIFF"), "png", grey(GREY), 0, id="floats to 255"
        ),
        pytest.param(encode(GREY.astype(np.int32), "TIFF"), "png", grey(GREY), 0, id="int32"),
        pytest.param(
            encode(GREY.astype(np.int32) * 257, "TIFF"), "png", grey(GREY), 0, id="16 bits in int32"
        ),
    ],
)
def test_odd_pictures_that_are_used(tmp_path, tokenizer, data, kind, wanted, off):
    """`off`: tolerated mean difference of the pixels."""
    pixels, ids, reason = load(tmp_path, tokenizer, data, kind=kind)
    assert not reason and tokenizer.decode(ids) == "words"
    assert np.abs(pixels.astype(int) - wanted).mean() <= off


def chunk(name: bytes, data: bytes) -> bytes:
    body = name + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def bomb(side: int) -> bytes:
    """A valid PNG of side x side pixels that takes a hundred kilobytes."""
    packer, line = zlib.compressobj(1), bytes(1 + (side + 7) // 8)
    data = b"".join(packer.compress(line) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the picture has no bytes"),
        (b"<html>404</html>", "the picture (16 bytes) cannot be decoded: it starts with b'<html>"),
        (encode(photo(0, 200, 200), "JPEG")[:2000], "the picture (2000 bytes) cannot be decoded: "),
        (encode(photo(0, 200, 200), "PNG")[:2000], "the picture (2000 bytes) cannot be decoded: "),
        (encode(photo(), "JPEG")[:10], "the picture (10 bytes) cannot be decoded: "),
        (encode(np.full((8, 8), -1, np.float32), "TIFF"), "the picture ("),
        (encode(np.full((8, 8), 300, np.float32), "TIFF"), "the picture ("),
        (encode(np.full((8, 8), np.nan, np.float32), "TIFF"), "the picture ("),
    ],
    ids=[
        *("nothing", "a web page", "half a JPEG", "half a PNG", "a header"),
        *("negative floats", "floats above 255", "no numbers"),
    ],
)
def test_pictures_that_are_not_used(tmp_path, tokenizer, data, reason):
    assert load(tmp_path, tokenizer, data)[2].startswith(reason)


def peak() -> int:
    """The peak memory of this process in bytes."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_picture_30000_pixels_wide_is_used(tmp_path, tokenizer, kind):
    wide = np.repeat(photo(0, 40, 60), 500, axis=1)
    data = encode(wide, kind, **({"quality": 95} if kind == "JPEG" else {"compress_level": 1}))
    before = peak()
    pixels, _, reason = load(tmp_path, tokenizer, data, kind="png")
    assert not reason
    middle = wide[:, 30_000 // 2 - 20 : 30_000 // 2 + 20]  # the crop is in the centre
    assert np.abs(pixels.mean((0, 1)) - middle.mean((0, 1))).max() < 3
    assert peak() - before < 200 << 20


@pytest.mark.parametrize("side", [8_500, 12_000, 30_000])
def test_a_picture_of_gigabytes_is_not_used(tmp_path, tokenizer, side):
    data = bomb(side)
    assert len(data) < 1 << 20
    before = peak()
    reason = load(tmp_path, tokenizer, data, kind="png")[2]
    assert reason.startswith(f"the picture ({len(data)} bytes) cannot be decoded: ")
    assert f"{side} x {side} pixels, exp" in reason or f"({side**2} pixels) exceeds" in reason
    assert peak() - before < 100 << 20


@pytest.mark.parametrize(
    ("words", "read"),
    [
        ("a\0b\0", "ab"),
        ("\ufeffwords", "words"),
        ("  two\r\n\tlines ", "two lines"),
        ("\u05e9\u05dc\u05d5\u05dd", "\u05e9\u05dc\u05d5\u05dd"),
        ("\u0645\u0631\u062d \u200f\u202eabc", "\u0645\u0631\u062d \u200f\u202e abc"),
        (
            "\N{GRINNING FACE}\U0001f469\u200d\U0001f680",
            "\N{GRINNING FACE}\U0001f469\u200d\U0001f680",
        ),
        ("e\u0301", "é"),
        ("x" * 10_000, "x" * (CONTEXT - 2)),
        ("\N{SNOWMAN}" * 4_000, "\N{SNOWMAN}" * 12 + "\ufffd"),
    ],
    ids=["NULs", "mark", "lines", "Hebrew", "Arabic", "emoji", "accent", "10 kB", "12 kB of emoji"],
)
def test_odd_captions_that_are_used(tmp_path, tokenizer, words, read):
    _, ids, reason = load(tmp_path, tokenizer, encode(photo(), "PNG"), words)
    assert not reason and tokenizer.decode(ids) == read
    assert (ids[0], ids.count(514)) == (513, 1) and len(ids) == CONTEXT


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("", "empty caption"),
        (" \0\n", "empty caption"),
        (b"caf\xe9", "the caption cannot be read ('utf-8' codec can't decode byte 0xe9"),
    ],
)
def test_captions_that_are_not_used(tmp_path, tokenizer, words, reason):
    assert load(tmp_path, tokenizer, encode(photo(), "PNG"), words)[2].startswith(reason)
