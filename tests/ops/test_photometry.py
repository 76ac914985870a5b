"""Photometry equals Pillow, takes one key per row, and gives a row the same bits on any mesh."""

import dataclasses
import functools
import io
import itertools
import math
import os
import pathlib
import re
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from clipx.objectives.base import picture_view
from clipx.ops import photometry
from clipx.ops.photometry import POLICIES, Policy
from clipx.parallel.mesh import MeshConfig, batch_sharding, make_mesh

ROWS, HEIGHT, WIDTH = 12, 56, 72


def synthetic() -> np.ndarray:
    """Pictures with features of photos: slow gradients, hard edges, texture, flat areas."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH][..., None]
    pictures = []
    for _ in range(ROWS):
        waves = [rng.normal(0, 0.04, (2, 3)), rng.uniform(0, 6, 3), rng.uniform(20, 110, 3)]
        picture = 120 + waves[2] * np.sin(x * waves[0][0] + y * waves[0][1] + waves[1])
        for _ in range(6):
            top, left = rng.integers(0, HEIGHT - 8), rng.integers(0, WIDTH - 8)
            high, wide = rng.integers(3, 30, 2)
            picture[top : top + high, left : left + wide] = rng.uniform(-20, 275, 3)
        noise = rng.normal(0, 5, picture.shape) * (x < WIDTH // 2)
        pictures.append(np.clip(picture + noise, 0, 255).astype(np.uint8))
    return np.stack(pictures)


def flickr() -> np.ndarray:
    if "FLICKR8K" not in os.environ:
        pytest.skip("FLICKR8K is not set: no folder of Flickr8k shards")
    shard = sorted(pathlib.Path(os.environ["FLICKR8K"]).glob("*.tar"))[0]
    pictures = []
    with tarfile.open(shard) as tar:
        for member in (m for m in tar if m.name.endswith(".jpg")):
            image = Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB")
            pictures.append(np.asarray(ImageOps.fit(image, (WIDTH, HEIGHT))))
            if len(pictures) == ROWS:
                break
    return np.stack(pictures)


@pytest.fixture(scope="module", params=[synthetic, flickr], ids=["synthetic", "flickr8k"])
def pictures(request):
    return request.param()


@pytest.fixture(scope="module")
def image():
    return synthetic()[:8, :32, :32]


def row_keys(rows, seed=0):
    return jax.random.split(jax.random.key(seed), rows)


def assert_near(got, expected):
    error = np.abs(np.asarray(got, np.int32) - np.asarray(expected, np.int32))
    assert error.mean() <= 1, error.mean()
    assert np.percentile(error, 99.9) <= 8, np.percentile(error, 99.9)


def by_pillow(pictures, operation, *parameters):
    """`operation` on every picture, each with its own parameters."""
    rows = zip(pictures, *parameters)
    return np.stack([np.asarray(operation(Image.fromarray(p), *a)) for p, *a in rows])


def adjust_hue(image, shift):
    """torchvision's adjust_hue of a Pillow image."""
    h, s, v = image.convert("HSV").split()
    h = Image.fromarray(((np.asarray(h, np.int32) + int(shift * 255)) % 256).astype(np.uint8))
    return Image.merge("HSV", (h, s, v)).convert("RGB")


def sampled(keys):
    """What `photometry` samples from each key: (order of the jitter, its strengths, a sigma)."""
    numbers = np.asarray(jax.vmap(lambda key: jax.random.uniform(key, (10,), jnp.float32))(keys))
    return numbers[:, 4], numbers[:, 5:9].T, numbers[:, 9]


def between(u, low, high):
    first, last = math.ceil(low * 2**14), math.floor(high * 2**14)
    return (first + np.floor(u * np.float32(last - first + 1))) / 2**14


@pytest.mark.parametrize(
    "name, pillow",
    [
        ("brightness", ImageEnhance.Brightness),
        ("contrast", ImageEnhance.Contrast),
        ("saturation", ImageEnhance.Color),
    ],
)
def test_enhancements_are_pillows(pictures, name, pillow):
    """To the bit, for factors from 0 to 2."""
    pictures, keys = np.tile(pictures, (4, 1, 1, 1)), row_keys(4 * ROWS)
    place = ("brightness", "contrast", "saturation").index(name)
    factors = between(sampled(keys)[1][place], 0.0, 2.0)
    assert factors.min() < 0.1 and factors.max() > 1.9
    got = np.asarray(photometry.photometry(pictures, keys, Policy(jitter=1.0, **{name: 1.0})))
    assert got.dtype == np.uint8
    enhance = lambda im, f: pillow(im).enhance(float(f))  # noqa: E731
    np.testing.assert_array_equal(got, by_pillow(pictures, enhance, factors))


def test_hue_is_torchvisions_on_pillow(pictures):
    keys = row_keys(ROWS)
    shifts = between(sampled(keys)[1][3], -0.5, 0.5)
    assert shifts.min() < -0.3 and shifts.max() > 0.3
    expected = by_pillow(pictures, adjust_hue, shifts)
    got = np.asarray(photometry.photometry(pictures, keys, Policy(jitter=1.0, hue=0.5)))
    assert_near(got, expected)
    assert np.mean(got != expected) < 0.02


@pytest.mark.parametrize("most", [1e-9, 0.1, 0.5])
def test_hue_of_every_kind_of_colour(most):
    """The first case has a shift of 0, which still rounds to HSV and back."""
    levels = np.array([0, 1, 2, 84, 85, 127, 128, 170, 254, 255], np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, 10, 100, 3)
    cubes, keys = np.tile(cube, (6, 1, 1, 1)), row_keys(6)
    expected = by_pillow(cubes, adjust_hue, between(sampled(keys)[1][3], -most, most))
    assert_near(photometry.photometry(cubes, keys, Policy(jitter=1.0, hue=most)), expected)


def test_greyscale_and_solarise_are_pillows(pictures):
    grey = by_pillow(pictures, lambda im: im.convert("L").convert("RGB"))
    got = photometry.photometry(pictures, row_keys(ROWS), Policy(grey=1.0))
    np.testing.assert_array_equal(got, grey)
    solarised = by_pillow(pictures, ImageOps.solarize)
    got = photometry.photometry(pictures, row_keys(ROWS), Policy(solarise=1.0))
    np.testing.assert_array_equal(got, solarised)


@pytest.mark.parametrize("sigmas", [(0.0, 2.0), (3.0, 4.0)], ids=str)
def test_blur_is_pillows(pictures, sigmas):
    keys = row_keys(ROWS)
    sigma = between(sampled(keys)[2], *sigmas)
    assert np.ptp(sigma) > 0.7 * np.ptp(sigmas)
    blur = lambda im, s: im.filter(ImageFilter.GaussianBlur(float(s)))  # noqa: E731
    got = photometry.photometry(pictures, keys, Policy(blur=1.0, blur_sigma=sigmas))
    assert_near(got, by_pillow(pictures, blur, sigma))


def test_blur_with_a_kernel_is_torchvisions(pictures):
    keys = row_keys(ROWS)
    sigma = between(sampled(keys)[2], 0.1, 2.0)
    offset = np.arange(-10, 11)
    expected = []
    for picture, s in zip(pictures, sigma):
        window = np.exp(-0.5 * (offset / s) ** 2)
        window /= window.sum()
        wide = np.pad(picture.astype(np.float64), ((10, 10), (10, 10), (0, 0)), mode="reflect")
        tall = sum(w * wide[i : i + HEIGHT] for i, w in enumerate(window))
        expected.append(sum(w * tall[:, i : i + WIDTH] for i, w in enumerate(window)))
    policy = Policy(blur=1.0, blur_sigma=(0.1, 2.0), blur_kernel=21)
    got = photometry.photometry(pictures, keys, policy)
    assert_near(got, np.round(expected))
    assert np.max(np.abs(np.asarray(got, np.float64) - expected)) < 2


@pytest.mark.parametrize("kernel", [None, 21])
def test_blur_with_sigma_zero_changes_nothing(image, kernel):
    policy = Policy(blur=1.0, blur_sigma=(0.0, 0.0), blur_kernel=kernel)
    np.testing.assert_array_equal(photometry.photometry(image, row_keys(len(image)), policy), image)


def test_policies_are_the_papers():
    jitter = dict(jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
    strong = dict(**jitter, flip=True, grey=0.2, blur=0.5, blur_sigma=(0.1, 2.0))
    expected = {
        "none": Policy(scale=(0.9, 1.0)),
        "flip": Policy(scale=(0.9, 1.0), flip=True),
        "center": Policy(scale=None),
        "mocov2": Policy(scale=(0.2, 1.0), **strong),
        "slip": Policy(scale=(0.08, 1.0), **strong),
        "standard_slip": Policy(scale=(0.5, 1.0)),
        "protoclip_light": Policy(
            (0.5, 1.0), True, False, 0.2, 0.8, 0.8, 0.8, 0.2, 0.2, 0.2, (0.1, 2.0), 21
        ),
        "clip_lite": Policy(scale=(0.2, 1.0), **jitter),
        "clip_lite_flip": Policy(scale=(0.2, 1.0), flip=True, mirror_words=True, **jitter),
    }
    assert expected == POLICIES
    assert all(policy.solarise == 0 for policy in POLICIES.values())
    views = {name: picture_view(name, None) for name in POLICIES}
    assert [name for name, view in views.items() if not view.random] == ["center"]


def test_a_policy_that_does_nothing_is_the_identity(image):
    for name in ("none", "flip", "standard_slip"):
        assert photometry.photometry(image, row_keys(len(image)), POLICIES[name]) is image


@pytest.fixture(scope="module")
def one_picture():
    """1500 copies of a picture that every operation changes."""
    picture = np.array([[[200, 60, 20], [10, 90, 240]], [[120, 130, 30], [250, 5, 90]]], np.uint8)
    return np.broadcast_to(picture, (1500, *picture.shape))


@pytest.mark.parametrize("kernel", [None, 3])
def test_coins(one_picture, kernel):
    """Each operation has its own coin per row, with the policy's probability."""
    rows, keys = len(one_picture), row_keys(1500)
    alone = {
        "jitter": Policy(jitter=0.8, brightness=1.0),
        "grey": Policy(grey=0.2),
        "blur": Policy(blur=0.5, blur_sigma=(1.0, 2.0), blur_kernel=kernel),
        "solarise": Policy(solarise=0.3),
    }
    changed = {}
    for name, policy in alone.items():
        out = np.asarray(photometry.photometry(one_picture, keys, policy))
        changed[name] = np.any(out != one_picture, axis=(1, 2, 3))
        p = getattr(policy, name)
        assert abs(changed[name].mean() - p) < 4 * np.sqrt(p * (1 - p) / rows), name
    for a, b in itertools.combinations(changed, 2):
        assert abs(np.corrcoef(changed[a], changed[b])[0, 1]) < 0.1, (a, b)


def test_order_of_the_operations(one_picture):
    """With all probabilities 1 a row goes through grey, then blur, then solarise."""
    policy = Policy(grey=1.0, blur=1.0, blur_sigma=(1.0, 1.0), solarise=1.0)
    rows, keys = one_picture[:2], row_keys(2)

    def after(*names):
        x = rows
        for name in names:
            x = photometry.photometry(x, keys, Policy(**{name: 1.0}, blur_sigma=(1.0, 1.0)))
        return np.asarray(x)

    got = photometry.photometry(rows, keys, policy)
    np.testing.assert_array_equal(got, after("grey", "blur", "solarise"))
    assert np.any(after("solarise", "grey", "blur") != got)


@pytest.mark.parametrize(
    "policy, low, high",
    [
        (Policy(jitter=1.0, brightness=0.4), 60, 140),
        (Policy(jitter=1.0, brightness=0.8), 20, 180),
        (Policy(jitter=1.0, brightness=1.4), 0, 240),
    ],
    ids=str,
)
def test_factors_are_uniform(policy, low, high):
    grey = np.full((1500, 1, 1, 3), 100, np.uint8)
    levels = np.asarray(photometry.photometry(grey, row_keys(1500), policy))[:, 0, 0, 0]
    assert low <= levels.min() < low + 4 and high - 4 < levels.max() <= high
    quarters = np.histogram(levels, 4, (low, high))[0]
    assert np.all(np.abs(quarters - 375) < 80), quarters


def test_hue_shifts_both_ways():
    red = np.tile(np.array([255, 0, 0], np.uint8), (600, 1, 1, 1))
    out = np.asarray(photometry.photometry(red, row_keys(600), Policy(jitter=1.0, hue=0.1)))[
        :, 0, 0
    ]
    toward_yellow, toward_magenta = out[:, 1] > 0, out[:, 2] > 0
    assert 240 < toward_yellow.sum() < 360 and 240 < toward_magenta.sum() < 360
    assert 140 <= out[:, 1:].max() <= 153  # 25 of 255 steps; a third of the circle is 85


@pytest.mark.slow  # 600 pictures; `test_rows_are_alone` and the tests of each operation stay
def test_all_24_orders(image):
    """Each 24th of the sampled range gives one order of the four operations; all orders differ."""
    count = 600
    small = image[:1, ::3, ::3]
    pictures, keys = np.broadcast_to(small, (count, *small[0].shape)), row_keys(count)
    strengths = dict(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.4)
    got = np.asarray(photometry.photometry(pictures, keys, Policy(jitter=1.0, **strengths)))
    slices = np.floor(sampled(keys)[0] * 24).astype(int)
    orders = {}

    @functools.cache
    def after(names):  # the same keys, so the same factors
        if not names:
            return pictures
        policy = Policy(jitter=1.0, **{names[-1]: strengths[names[-1]]})
        return np.asarray(photometry.photometry(after(names[:-1]), keys, policy))

    for permutation in itertools.permutations(strengths):
        same = (after(permutation) == got).all((1, 2, 3))
        for i in range(24):
            if same[slices == i].all():
                orders.setdefault(i, []).append(permutation)
    assert sorted(orders) == list(range(24)) and np.bincount(slices).min() > 8
    assert all(len(found) == 1 for found in orders.values())
    assert len({found[0] for found in orders.values()}) == 24


ALL = dataclasses.replace(POLICIES["mocov2"], solarise=0.2)


@pytest.mark.parametrize("policy", [ALL, Policy(blur=0.9, blur_kernel=21)], ids=["all", "kernel"])
def test_rows_are_alone(image, policy):
    """Row i has the same bits in any slice, among any other rows, and on any mesh."""
    keys = row_keys(8)
    whole = np.asarray(photometry.photometry(image, keys, policy))
    assert whole.dtype == np.uint8 and np.mean(whole != image) > 0.3
    part = photometry.photometry(image[2:5], keys[2:5], policy)
    np.testing.assert_array_equal(part, whole[2:5])
    other = image.copy()
    other[5:] = 255 - other[5:]
    np.testing.assert_array_equal(photometry.photometry(other, keys, policy)[:5], whole[:5])
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        spread = jax.device_put((image, keys), batch_sharding(mesh))
        out = photometry.photometry(*spread, policy)
    assert len(out.sharding.device_set) == 8 and not out.sharding.is_fully_replicated
    np.testing.assert_array_equal(out, whole)


def test_same_key_same_bits(image):
    keys = row_keys(len(image))
    first = np.asarray(photometry.photometry(image, keys, ALL))
    np.testing.assert_array_equal(photometry.photometry(image, keys, ALL), first)
    assert np.any(np.asarray(photometry.photometry(image, row_keys(len(image), 1), ALL)) != first)
    same = np.broadcast_to(image[:1], image.shape)
    assert len({row.tobytes() for row in np.asarray(photometry.photometry(same, keys, ALL))}) > 5


def test_double_precision_changes_nothing(image):
    expected = np.asarray(photometry.photometry(image, row_keys(len(image)), ALL))
    with jax.enable_x64(True):
        out = photometry.photometry(image, row_keys(len(image)), ALL)
        trace = jax.make_jaxpr(lambda x, k: photometry.photometry(x, k, ALL))(
            image, row_keys(len(image))
        )
    np.testing.assert_array_equal(out, expected)
    assert not re.search(r"f64\[\d", str(trace))


def test_compiled_once(image, caplog):
    keys = [row_keys(len(image), seed) for seed in range(3)]
    with jax.log_compiles():
        for key in keys:
            photometry.photometry(image, key, Policy(solarise=0.123))
    compiled = [line for line in caplog.messages if line.startswith("Compiling")]
    assert len(compiled) == 1 and "photometry" in compiled[0]


def test_normalize():
    levels = np.array([0, 255, 51], np.uint8).reshape(1, 1, 1, 3)
    out = photometry.normalize(levels, photometry.IMAGENET_MEAN, photometry.IMAGENET_STD)
    expected = [-0.485 / 0.229, 0.544 / 0.224, (0.2 - 0.406) / 0.225]
    np.testing.assert_allclose(out[0, 0, 0], expected, rtol=1e-6)
