"""Pictures become squares as open_clip's and transformers' own preprocessing makes them."""

import io

import numpy as np
import pytest
from PIL import Image
from support.libraries import with_open_clip, with_transformers

from clipx.data import pictures
from clipx.data.base import Example
from clipx.data.framing import Framing
from clipx.interop import libraries

SIDE = 24


def files():
    """(name, bytes) of pictures of several shapes and kinds."""
    rng = np.random.default_rng(4)

    def picture(mode, size, **options):
        small = Image.fromarray(rng.integers(0, 256, (6, 7, 4), np.uint8), "RGBA")
        large, data = small.resize(size, Image.Resampling.BICUBIC), io.BytesIO()
        made = large if mode == "RGBA" else large.convert("RGB").convert(mode)
        made.save(data, options.pop("format", "PNG"), **options)
        return data.getvalue()

    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter turn
    yield "wide", picture("RGB", (70, 40))
    yield "high", picture("RGB", (33, 90))
    yield "square", picture("RGB", (SIDE, SIDE))
    yield "odd", picture("RGB", (51, 50))
    yield "tiny", picture("RGB", (5, 9))
    yield "grey", picture("L", (60, 40))
    yield "transparent", picture("RGBA", (40, 61))
    yield "palette", picture("P", (44, 60))
    yield "JPEG", picture("RGB", (90, 60), format="JPEG")
    yield "turned by EXIF", picture("RGB", (80, 50), format="JPEG", exif=turned)


FILES = dict(files())


def ours(data, **framing):
    return pictures.evaluation(Example(data, (), 0, "x"), SIDE, framing=Framing(**framing))


@with_open_clip
@pytest.mark.parametrize("resize", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pixels_are_open_clips(resize, interpolation):
    given = {"resize": resize, "interpolation": interpolation}
    transform = libraries.require("open_clip").image_transform(
        SIDE, is_train=False, mean=(0,) * 3, std=(1,) * 3, resize_mode=resize,
        interpolation=interpolation,
    )  # fmt: skip
    for name, data in FILES.items():
        if name in ("transparent", "palette"):
            continue  # which open_clip makes RGB behind the resizing, transformers before it
        expected = transform(Image.open(io.BytesIO(data))).permute(1, 2, 0).numpy() * 255
        np.testing.assert_array_equal(ours(data, **given), np.rint(expected), err_msg=name)


@with_transformers
@pytest.mark.parametrize("squash", [False, True])
def test_pixels_are_transformers(squash):
    transformers = libraries.require("transformers")
    square = {"height": SIDE, "width": SIDE}
    plain = {"do_normalize": False, "do_rescale": False}
    if squash:
        processor = transformers.SiglipImageProcessorPil(size=square, **plain)
    else:
        edge = {"shortest_edge": SIDE}
        processor = transformers.CLIPImageProcessorPil(size=edge, crop_size=square, **plain)
    for name, data in FILES.items():
        image = Image.open(io.BytesIO(data)).convert("RGB")
        width, height, _, _ = Framing("squash" if squash else "shortest").box(*image.size, SIDE)
        if (width + height) % 2:
            continue  # transformers rounds half a pixel of margin down, torchvision to even
        (expected,) = processor(image, return_tensors="np")["pixel_values"]
        got = ours(data, resize="squash" if squash else "shortest").transpose(2, 0, 1)
        np.testing.assert_array_equal(got, np.rint(expected), err_msg=name)


def test_a_square_of_sixteen_bits():
    """16-bit grey keeps its upper bits, where open_clip's transform clips at 255."""
    data = io.BytesIO()
    Image.fromarray(np.full((30, 40), 300 * 256 // 2, np.uint16)).save(data, "PNG")
    assert np.unique(ours(data.getvalue())).tolist() == [150]


def test_boxes():
    """The geometry, for evaluators that place boxes."""
    assert Framing("squash").box(70, 40, 24) == (24, 24, 0, 0)
    assert Framing("longest").box(80, 40, 24) == (24, 12, 0, -6)
    assert Framing().box(80, 40, 24) == (48, 24, 12, 0)
