from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from clipx.config.binding import bind
from clipx.data.pictures import Pictures
from clipx.errors import ConfigError, DataError
from clipx.evaluators.grounding import (
    Grounding,
    best_overlaps,
    hottest_inside,
    inside,
    overlap,
    overlay,
    to_crop,
    upsample,
)
from clipx.models.resnet import AttentionPool, ResNet
from clipx.models.text import TextTransformer
from clipx.models.vit import ViT
from clipx.objectives.clip import CLIP
from clipx.parallel.mesh import MeshConfig, make_mesh
from clipx.training.encode import Encode

TEXT = dict(width=8, depth=1, heads=2, embed_dim=4, vocab_size=16, context=4, eot_id=3)
RED, GREEN = (250, 0, 0), (0, 250, 0)
# In a picture of 64 x 32: a red square on the left, a green one on the right. At 32 pixels the crop
# is its middle half, columns 16 to 48.
BOXES = {"red": [16, 8, 8, 8], "green": [36, 20, 8, 8]}


class Warm:
    """Heat is high where the picture has the colour that the text names. "none" has no heat, "lost"
    has NaN."""

    def __init__(self):
        self.texts = []

    def heat(self, pictures, texts):
        self.texts += texts
        channel = [{"red": 0, "green": 1, "none": 2, "lost": 2}[text] for text in texts]
        heat = np.stack([p[..., c] for p, c in zip(pictures, channel)]).astype(np.float32)
        heat[np.array(texts) == "lost"] = np.nan
        return heat.reshape(-1, 16, 2, 16, 2).mean((2, 4))


@pytest.fixture
def section(tmp_path):
    picture = Image.new("RGB", (64, 32))
    for colour, (x, y, w, h) in zip((RED, GREEN), BOXES.values()):
        picture.paste(colour, (x, y, x + w, y + h))
    (tmp_path / "train2014").mkdir()
    picture.save(tmp_path / "train2014/7.png")

    def reference(expression, box, split):
        entry = {"image": "7.png", "image_id": 7, "expression": expression}
        return entry | {"box": box, "split": split}

    references = [
        reference("red", BOXES["red"], "val"),
        reference("green", [35, 19, 8, 8], "val"),
        reference("red", BOXES["green"], "val"),  # the heat is elsewhere
        reference("none", [16, 0, 16, 32], "testA"),  # half of the crop
        reference("lost", [16, 0, 8, 32], "testA"),  # a quarter
        reference("green", BOXES["green"], "train"),
    ]
    detections = [{"image_id": 7, "box": box, "score": 0.9} for box in BOXES.values()]
    detections.append({"image_id": 7, "box": [0, 0, 64, 32], "score": 0.8})
    (tmp_path / "references.json").write_text(json.dumps(references))
    (tmp_path / "detections.json").write_text(json.dumps(detections))
    return {
        "path": str(tmp_path / "train2014"),
        "annotations": str(tmp_path / "references.json"),
        "detections": str(tmp_path / "detections.json"),
        "splits": ["val", "testA"],
        "batch_size": 2,
    }


def test_equals_the_shares_by_hand(section, tmp_path):
    section |= {"overlays": 2, "overlay_folder": str(tmp_path / "new/drawn")}
    found = bind(Grounding, section, pictures=Pictures(32))(Warm())
    expected = {
        "val/accuracy": 2 / 3,
        "val/pointing": 2 / 3,
        "testA/accuracy": 0,  # of three equal proposals none is right
        "testA/pointing": (1 / 2 + 1 / 4) / 2,
    }
    assert found == pytest.approx(expected)
    drawn = sorted(path.name for path in (tmp_path / "new/drawn").iterdir())
    assert drawn == ["testA_000.png", "testA_001.png", "val_000.png", "val_001.png"]


def test_without_detections_only_the_point_counts(section):
    encode = Warm()
    found = bind(Grounding, section | {"detections": ""}, pictures=Pictures(32))(encode)
    assert set(found) == {"val/pointing", "testA/pointing"}
    assert encode.texts == ["red", "green", "red", "none", "lost"]


@pytest.mark.parametrize("size", [(64, 32), (40, 90), (33, 47), (32, 32), (30, 20)])
def test_boxes_follow_the_evaluation_transform(tmp_path, size):
    x, y, w, h = size[0] // 2 - 6, size[1] // 2 - 4, 9, 7
    picture = Image.new("RGB", size)
    picture.paste((255, 255, 255), (x, y, x + w, y + h))
    picture.save(tmp_path / "a.png")
    pictures = Pictures(32)
    white = next(pictures([tmp_path / "a.png"], 1))[0, ..., 0] > 127
    ((size_found),) = pictures.sizes([tmp_path / "a.png"])
    assert size_found == size
    box = to_crop((x, y, w, h), size, 32)
    there = np.zeros((32, 32), bool)
    inside(there, box)[...] = True
    assert there.sum() > 30 and (there != white).sum() <= 2 * (box[2] + box[3])
    rows, columns = np.nonzero(white)
    centre = columns.mean() + 0.5, rows.mean() + 0.5
    np.testing.assert_allclose(centre, (box[0] + box[2] / 2, box[1] + box[3] / 2), atol=0.6)


def test_boxes_and_scores_on_small_numbers():
    heat = np.zeros((8, 8), np.float32)
    heat[2:4, 2:4], heat[5, 5] = 3, 3
    assert inside(heat, (2, 2, 2, 2)).sum() == 12
    assert inside(heat, (1.5, 1.6, 1.0, 20.0)).shape == (6, 1)  # centres from 1.5 to before 2.5
    assert inside(heat, (-5, -5, 3, 3)).size == 0
    assert overlap((0, 0, 2, 2), (1, 0, 2, 2)) == pytest.approx(1 / 3)
    assert overlap((0, 0, 2, 2), (2, 0, 2, 2)) == overlap((0, 0, 2, 2), (5, 5, 2, 2)) == 0
    assert hottest_inside(heat, (0, 0, 5, 5)) == pytest.approx(4 / 5)
    small, large = (2, 2, 2, 2), (0, 0, 8, 8)
    # heat 12 and 15; divided by the square root of the area 6 and 15/8; undivided 12 and 15
    assert best_overlaps(heat, [large, small], small, 0.5) == 1
    assert best_overlaps(heat, [large, small], small, 0.0) == 0
    assert best_overlaps(heat, [small, (2, 2, 2, 2)], small, 0.5) == 1
    assert best_overlaps(0 * heat, [large, small], small, 0.5) == 0.5
    assert best_overlaps(heat, [], small, 0.5) == 0


def test_heat_is_spread_bilinearly():
    found = upsample(np.array([[0.0, 1.0]]), 4)
    np.testing.assert_allclose(found, [[0, 0.25, 0.75, 1]] * 4, atol=1e-6)


def test_an_overlay_shows_the_picture_its_heat_and_its_caption():
    picture = np.full((64, 64, 3), 90, np.uint8)
    heat = np.zeros((4, 4), np.float32)
    heat[0, 0] = 5
    drawn = overlay(picture, heat, "a red ball " * 12)
    assert drawn.shape[1] == 512 and drawn.dtype == np.uint8
    assert (drawn[:256, :256] == 90).all()
    heated = drawn[:256, 256:].astype(int)
    assert (heated[150:] == 90).all()  # cold
    assert heated[5, 5, 0] > heated[5, 5, 1] + 50
    assert (drawn[256:] == 0).any()  # letters
    assert len(overlay(picture, heat, "short")) < len(drawn)
    assert (overlay(picture, 0 * heat, "")[:256] == 90).all()


class Examples:
    def __init__(self, captions):
        self.captions = captions

    def __len__(self):
        return len(self.captions)

    def texts(self, row):
        return self.captions[row]

    def batches(self, size):
        yield np.full((size, 32, 32, 3), 200, np.uint8)


def test_captions_of_a_set_are_drawn(tmp_path):
    section, encode = {"overlays": 2, "overlay_folder": str(tmp_path / "drawn")}, Warm()
    examples = Examples([("red", "green"), ("green",), ("none",)])
    found = bind(Grounding, section, pictures=Pictures(32), examples=examples)(encode)
    assert found == {"overlays": 2} and encode.texts == ["red", "green"]
    pictures = [np.asarray(Image.open(tmp_path / f"drawn/00{i}.png")) for i in (0, 1)]
    assert all((p[:256, :256] == 200).all() and (p[:256, 256:] != 200).any() for p in pictures)
    for captions, said in (([("red",), ()], "row 1 without a caption"), ([], "an empty data set")):
        with pytest.raises(ConfigError, match=said):
            bind(Grounding, section, pictures=Pictures(32), examples=Examples(captions))(encode)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"path": "no/such"}, "no folder 'no/such'"),
        ({"annotations": "no/such.json"}, '"image_id": int'),
        ({"detections": "no/such.json"}, "no/such.json"),
        ({"splits": ["testC"]}, "one of testA, train, val"),
        ({"annotations": "", "detections": ""}, "none, and no data either"),
        ({"overlay_folder": "FILE/drawn"}, "a folder to write to"),
    ],
)
def test_what_is_missing_is_said_when_the_data_opens(section, tmp_path, change, said):
    (tmp_path / "file").touch()
    change = json.loads(json.dumps(change).replace("FILE", str(tmp_path / "file")))
    with pytest.raises(ConfigError) as error:
        bind(Grounding, section | change, pictures=Pictures(32))
    assert said in str(error.value)


def test_a_missing_picture_is_named(section, tmp_path):
    (tmp_path / "train2014/7.png").unlink()
    with pytest.raises(DataError, match="7.png"):
        bind(Grounding, section, pictures=Pictures(32))(Warm())


@pytest.mark.parametrize("box", [[1, 2, 3], [1, 2, 3, "4"], [1, 2, 0, 4]])
def test_an_impossible_box_is_shown(section, tmp_path, box):
    (tmp_path / "detections.json").write_text(json.dumps([{"image_id": 7, "box": box}]))
    with pytest.raises(ConfigError, match="width, height"):
        bind(Grounding, section, pictures=Pictures(32))


def test_data_and_annotations_exclude_each_other(section):
    examples = Examples([("red",)])
    with pytest.raises(ConfigError, match="one of the two"):
        bind(Grounding, section, pictures=Pictures(32), examples=examples)
    with pytest.raises(ConfigError, match="drawing is all"):
        bind(Grounding, {}, pictures=Pictures(32), examples=examples)


@pytest.mark.parametrize("key, value", [("batch_size", 0), ("overlays", -1), ("splits", [])])
def test_config_errors_come_before_any_file_is_read(key, value):
    with pytest.raises(ConfigError, match=f"grounding.{key}"):
        bind(Grounding, {key: value}, where="grounding", pictures=None)
    with pytest.raises(ConfigError, match="detections alone"):
        bind(Grounding, {"detections": "a"}, pictures=None)


def encode_of(image, devices):
    """An `Encode` of a random CLIP with a tokenizer that reads digits as ids; and its parts."""
    objective = CLIP(image=image, text=TextTransformer(dtype="float32", **TEXT))

    def init(key):
        pictures, tokens = jnp.zeros((1, 32, 32, 3), jnp.uint8), jnp.zeros((1, 4), jnp.int32)
        shapes = objective.init(key, pictures, method="encode_image")
        texts = objective.init(key, tokens, method="encode_text")
        return {**shapes, "params": {**shapes["params"], **texts["params"]}}

    shapes = jax.eval_shape(init, jax.random.key(0))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: rng.uniform(-0.5, 1, x.shape).astype(x.dtype), shapes)
    variables["batch_stats"] = jax.tree.map(lambda x: x + 1, variables.get("batch_stats", {}))
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])

    def tokenize(texts):
        return np.array([[int(c) for c in text] for text in texts], np.int32)

    return Encode(objective, variables, mesh, tokenize), objective, variables, tokenize


PAIRS = (
    np.random.default_rng(1).integers(0, 256, (11, 32, 32, 3)).astype(np.uint8),
    [f"{i % 5 + 4}9{i % 3 + 4}3" for i in range(11)],
)


@pytest.mark.parametrize("variant", ["resnet18", pytest.param("RN50", marks=pytest.mark.slow)])
def test_heat_equals_grad_cam_of_the_score(variant, side=8):
    image = ResNet(
        variant=variant, width=4, blocks=(1,), image_size=32, embed_dim=4, dtype="float32"
    )
    encode, objective, variables, tokenize = encode_of(image, 4)
    encode.heat_chunk = 8  # two chunks, the last with rows to fill it
    pictures, texts = PAIRS
    found = encode.heat(pictures, texts)
    params = variables["params"]["image"]

    def score(maps, text):  # of one picture, from its last feature map on
        tokens = maps.reshape(1, side * side, -1)
        if variant == "RN50":
            pool = AttentionPool(image.heads, "float32")
            pooled = pool.apply({"params": params["pool"]}, tokens)
        else:
            pooled = tokens.mean(axis=1)
        raw = pooled[0] @ params["projection"]["kernel"] + params["projection"].get("bias", 0)
        return raw @ text / jnp.linalg.norm(raw)

    tokens = objective.apply(variables, pictures, method="encode_image").tokens
    maps = tokens.reshape(len(pictures), side, side, -1)
    units = objective.apply(variables, tokenize(texts), method="encode_text").unit
    slopes = jax.jit(jax.vmap(jax.grad(score)))(maps, units)
    weights = slopes.mean((1, 2), keepdims=True)
    expected = np.maximum((weights * maps).sum(-1), 0)
    assert found.shape == (11, side, side) and found.dtype == np.float32
    assert (expected > 0).any(axis=(1, 2)).sum() > 2 and (expected == 0).any()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5 * expected.max())


def test_a_tower_without_convolutions_has_no_heat():
    image = ViT(image_size=32, patch=16, width=8, depth=1, heads=2, embed_dim=4, dtype="float32")
    with pytest.raises(ConfigError, match="config.image.name=resnet"):
        encode_of(image, 1)[0].heat(*PAIRS)
