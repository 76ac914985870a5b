"""The rows of an episode that are shown, their places on the map, and the prototypes."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image
from support.loaders import build_loader

from clipx.data.sources.shapes import Shapes
from clipx.errors import MetricsError
from clipx.training import episodes


def labels(rows=9000, k=400):
    """Labels with clusters of very different sizes (image), and of similar sizes (text)."""
    rng = np.random.default_rng(0)
    uneven = np.minimum(rng.exponential(k / 6, rows).astype(np.int32), k - 1)
    return {"image": uneven, "text": rng.integers(0, k, rows).astype(np.int32)}


@pytest.mark.parametrize("names", [("image", "text"), ("image", "text", "external"), ("external",)])
def test_a_sample_has_random_rows_and_rows_of_the_large_clusters(names):
    given = labels()
    given = {name: given.get(name, given["image"][::-1]) for name in names}
    rows = episodes.sample(given)
    assert len(rows) == 2000 and np.all(np.diff(rows) > 0) and 0 <= rows[0] < rows[-1] < 9000
    np.testing.assert_array_equal(rows, episodes.sample(given))
    share = episodes._MEMBERS // (10 * len(names))
    for of_rows in given.values():
        counts = np.bincount(of_rows)
        for cluster in np.argsort(-counts, kind="stable")[:10]:
            assert np.sum(of_rows[rows] == cluster) >= min(share, counts[cluster])
    assert np.abs(np.histogram(rows, 9, (0, 9000))[0] - 2000 / 9).max() < 80  # spread evenly


def test_a_short_episode_is_sampled_completely():
    np.testing.assert_array_equal(episodes.sample(labels(70, 5)), np.arange(70))
    np.testing.assert_array_equal(episodes.sample(labels(1, 1)), [0])


def gaussians(rows=600, width=6):
    """(clusters, features, load, the places that `load` was asked for).

    The features are around four points of a plane, with a wide gap between the modalities. The
    colour of a picture and its caption are its place.
    """
    rng = np.random.default_rng(1)
    cluster = rng.choice(4, rows, p=(0.4, 0.3, 0.2, 0.1)).astype(np.int32)
    centres = np.zeros((4, width))
    centres[:, :2] = [(1, 0), (0, 1), (-1, 0), (0, -1)]
    sides = {"image": 5.0, "text": -5.0}
    features = {}
    for name, side in sides.items():
        x = centres[cluster] + rng.normal(scale=0.05, size=(rows, width))
        x[:, -1] += side
        features[name] = x.astype(np.float32)
    asked = []

    def load(places):
        asked.append(list(places))
        pictures = [np.full((200, 300, 3), divmod(p, 256) + (0,), np.uint8) for p in places]
        return pictures, [f"<row> {p}" for p in places]

    return cluster, features, load, asked


def written(folder, **changes):
    cluster, features, load, asked = gaussians()
    given = {"image": 7 - cluster, "text": cluster, "external": cluster * 0}
    rows = episodes.sample(given)
    values = {"rows": rows, "features": features, "labels": given, "load": load} | changes
    path = episodes.write(folder, 12, **values)
    return path, given, features, asked


def test_what_is_written_is_read(tmp_path):
    path, given, _, asked = written(tmp_path)
    assert path == tmp_path / "episodes" / "000012.json" and episodes.files(tmp_path) == [path]
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    episode = episodes.read(path)
    assert (episode.episode, episode.rows) == (12, 600)
    counts = np.bincount(given["text"]).tolist()
    assert episode.clusters["text"] == list(enumerate(counts))
    assert episode.clusters["image"] == [(7 - c, n) for c, n in enumerate(counts)]
    for name in ("image", "text"):
        found = np.array([c.cluster for c in episode.clusters[name]])[episode.colours[name]]
        np.testing.assert_array_equal(found, given[name])
    assert len(asked) == 1  # one call for all pictures


def test_small_clusters_have_no_colour(tmp_path):
    given = {"text": np.repeat(np.arange(30), 20).astype(np.int32)}
    given["text"][:40] = 29  # the other 28 clusters are of equal size: the first of them win
    path, *_ = written(tmp_path, labels=given, rows=np.arange(600))
    episode = episodes.read(path)
    assert [c.cluster for c in episode.clusters["text"]] == [29, *range(2, 11)]
    colours = np.array(episode.colours["text"])
    assert np.all((colours == -1) == (given["text"] > 10) & (given["text"] < 29))


def test_prototypes_are_the_rows_nearest_to_their_mean(tmp_path):
    path, given, features, (asked,) = written(tmp_path)
    prototypes = episodes.read(path).prototypes
    assert [(p.modality, p.cluster) for p in prototypes] == [
        *(("image", c) for c in (7, 6, 5)),
        *(("text", c) for c in (0, 1, 2)),
    ]
    for i, prototype in enumerate(prototypes):
        x, members = features[prototype.modality], given[prototype.modality] == prototype.cluster
        assert prototype.rows == members.sum()
        far = np.linalg.norm(x - x[members].mean(0), axis=1)
        far[~members] = np.inf
        expected = np.argsort(far)[:8]
        assert prototype.captions == [f"<row> {p}" for p in expected]
        for place, uri in zip(expected, prototype.pictures):
            kind, _, data = uri.partition("base64,")
            assert kind == "data:image/jpeg;"
            picture = Image.open(io.BytesIO(base64.b64decode(data)))
            assert picture.size == (128, 85)
            assert np.abs(np.subtract(picture.getpixel((9, 9)), (*divmod(place, 256), 0))).max() < 4
        assert asked[8 * i : 8 * i + 8] == expected.tolist()


def test_the_map_shows_the_plane_and_not_the_gap(tmp_path):
    """Distances in the plane are kept. A picture and its caption, ten apart, meet on the map."""
    path, _, features, _ = written(tmp_path)
    episode = episodes.read(path)
    assert 0.9 < sum(episode.variance) <= 1 and episode.variance[0] > episode.variance[1]
    for name, points in episode.points.items():
        points, plane = np.array(points), features[name][:, :2]
        far = [np.linalg.norm(x - x[:1], axis=1) for x in (points, plane)]
        np.testing.assert_allclose(*far, atol=0.1)
    image, text = map(np.array, episode.points.values())
    assert np.linalg.norm(image - text, axis=1).max() < 0.5


@pytest.mark.parametrize("value", [0.0, 1.0, np.nan, np.inf])
def test_a_collapsed_model_has_a_map(tmp_path, value):
    """Also if no feature is finite: the report must still be written."""
    same = {name: np.full((600, 6), value, np.float32) for name in ("image", "text")}
    path, *_ = written(tmp_path, features=same)
    episode = episodes.read(path)
    assert episode.variance == [0, 0] and not np.any(episode.points["text"])
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["episode"] == 12


def test_fewer_rows_than_are_shown_of_a_prototype(tmp_path):
    given = {"text": np.arange(600, dtype=np.int32)}
    path, *_ = written(tmp_path, labels=given, rows=np.arange(600))
    assert [len(p.captions) for p in episodes.read(path).prototypes] == [1, 1, 1]


def test_the_same_episode_gives_the_same_file(tmp_path):
    first = written(tmp_path)[0].read_bytes()
    assert written(tmp_path)[0].read_bytes() == first


def test_other_files_and_full_disks(tmp_path, monkeypatch):
    path, *_ = written(tmp_path)
    old = path.read_bytes()
    for text in ("{}", "[", '{"clusters": {}, "prototypes": [1]}'):
        (tmp_path / "0.json").write_text(text)
        with pytest.raises(ValueError):
            episodes.read(tmp_path / "0.json")

    def full(self, *arguments, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(MetricsError, match="cannot write .*000012.json: No space left on device$"):
        written(tmp_path)
    assert path.read_bytes() == old


class Words:
    """A tokenizer whose ids are the bytes of the text."""

    def __call__(self, texts):
        return np.array([[*text.encode()[:30].ljust(30)] for text in texts], np.int32)

    def decode(self, ids):
        return bytes(ids.tolist()).decode().strip()


def test_loading_gives_what_the_episode_trains_on():
    """`load` gives the same pictures and captions as the batches of the episode's steps."""
    source = Shapes(size=40, image_size=16)
    options = {"episode_steps": 3, "with_replacement": True}
    loader = build_loader(source, Words(), batch_size=8, seed=3, image_size=16, **options)
    places, pictures, captions = [5, 23, 0, 14], {}, {}
    for batch in loader.batches(6, 9):
        for place, image, ids in zip(batch["position"], batch["image"], batch["text"]):
            pictures[place], captions[place] = image[0], loader.tokenizer.decode(ids[0])
    assert sorted(pictures) == list(range(24))
    found, texts = episodes.loading(loader, 6)(places)
    np.testing.assert_array_equal(found, [pictures[p] for p in places])
    assert texts == [captions[p] for p in places]
