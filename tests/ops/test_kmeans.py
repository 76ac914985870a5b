import io
import os
import pathlib
import tarfile
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import load_oracle

from clipx.errors import ConfigError
from clipx.ops import kmeans, lloyd
from clipx.parallel import mesh as meshes

KEY = jax.random.key(0)
ORACLE = load_oracle("protoclip")
N, D, K = 1501, 8, 12  # no number of devices divides N


def mixture(n=N, d=D, centres=K, spread=1.0):
    draw = np.random.default_rng(0)
    centre = spread * draw.standard_normal((centres, d))
    rows = centre[draw.integers(0, centres, n)] + draw.standard_normal((n, d))
    return rows.astype(np.float32)


@cache
def pictures(n=N, d=D):
    """The leading principal components of CIFAR-10 pictures."""
    root = os.environ.get("CIFAR10")
    if not root:
        pytest.skip("CIFAR10 is not set")
    from PIL import Image

    rows = []
    with tarfile.open(pathlib.Path(root) / "train.tar") as tar:
        for member in tar:
            if member.name.endswith((".png", ".jpg", ".jpeg", ".webp")):
                picture = Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB")
                rows.append(np.asarray(picture.resize((8, 8)), np.float32).ravel() / 255)
            if len(rows) == n:
                break
    rows = np.stack(rows) - np.mean(rows, axis=0)
    return np.ascontiguousarray(rows @ np.linalg.eigh(rows.T @ rows)[1][:, : -d - 1 : -1])


DATA = pytest.mark.parametrize("data", [mixture, pictures])


def fit(x, **changes):
    """Most tests share this one program."""
    return kmeans.fit(x, K, **(dict(key=KEY, restarts=3) | changes))


def on(devices):
    return jax.set_mesh(meshes.make_mesh(meshes.MeshConfig(), jax.devices()[:devices]))


def recorded():
    i, j = np.arange(300)[:, None], np.arange(8)
    x = np.sin(0.37 * i**2 + 1.7 * j + 0.11 * i * j)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def faiss_rows(n, k, redo):
    """The rows that faiss starts a run from: the head of a Fisher-Yates shuffle."""
    state = np.random.RandomState((1235 + redo * 15486557) % 2**32)
    draws, rows = state._bit_generator.random_raw(n), np.arange(n)
    for i in range(n - 1):
        j = i + int(draws[i]) % (n - i)
        rows[i], rows[j] = rows[j], rows[i]
    return rows[:k]


def test_recorded_objective():
    """From the start of faiss's best run of three: the same objective and labels."""
    expected = ORACLE["kmeans"]
    assert faiss_rows(300, 12, 0).tolist() == expected["init_rows_redo0"]
    x = recorded()
    found = kmeans.fit(x, 12, key=KEY, init=x[faiss_rows(300, 12, 2)])
    np.testing.assert_allclose(found.inertia, expected["sum_sq_dist_final_assign"], rtol=1e-6)
    assert found.counts.tolist() == expected["label_counts"]
    assert found.assignment[:20].tolist() == expected["labels_first20"]
    norms = np.linalg.norm(found.centroids, axis=1)
    np.testing.assert_allclose(norms, expected["centroid_norms"], atol=2e-6)


@DATA
def test_result_is_consistent_and_repeatable(data):
    x = data()
    found = fit(x)
    distance = np.square(x[:, None].astype(np.float64) - np.asarray(found.centroids)).sum(2)
    assert (distance.argmin(1) == found.assignment).mean() > 0.999
    np.testing.assert_allclose(found.inertia, distance.min(1).sum(), rtol=1e-6)
    np.testing.assert_array_equal(np.bincount(found.assignment, minlength=K), found.counts)
    for a, b in zip(found, fit(x)):
        np.testing.assert_array_equal(a, b)


@DATA
def test_topologies(data):
    x = data()
    alone = fit(x)
    for devices in (2, 8):
        with on(devices):
            found = fit(x)
        np.testing.assert_allclose(found.inertia, alone.inertia, rtol=1e-6)
        assert np.mean(np.asarray(found.assignment) == alone.assignment) >= 0.9999
        assert found.assignment.shape == (N,)


@DATA
def test_as_good_as_scikit_learn(data):
    from sklearn.cluster import KMeans

    x = data()
    theirs = KMeans(K, n_init=3, random_state=0, max_iter=20, init="random").fit(x).inertia_
    assert fit(x).inertia <= 1.005 * theirs


@DATA
def test_as_good_as_faiss(data):
    faiss = pytest.importorskip("faiss", reason="faiss is not installed")
    x = data()
    model = faiss.Kmeans(D, K, niter=20, nredo=3, min_points_per_centroid=1)
    model.train(x)
    assert fit(x).inertia <= 1.005 * model.obj[-1]


@pytest.mark.slow  # the test below holds what it samples by
def test_kmeans_plus_plus_finds_far_clusters():
    x = mixture(spread=30.0)
    found = [fit(x, init="kmeans++", restarts=1)]
    with on(8):
        found.append(fit(x, init="kmeans++", restarts=1))
    for each in found:
        assert each.inertia < 1.1 * N * D  # one centroid in each of the centres
        np.testing.assert_array_equal(each.assignment, found[0].assignment)


def test_kmeans_plus_plus_samples_by_squared_distance():
    x = np.float32([[0], [1], [3]])
    plan = lloyd.make_plan(3, 1, 2)
    start = jax.jit(
        jax.vmap(lambda key: kmeans.start_centroids(plan, "kmeans++", jnp.asarray(x), None, key))
    )
    first, second = np.moveaxis(np.asarray(start(jax.random.split(KEY, 6000)))[..., 0], 1, 0)
    for a, b, chance in ((0, 3, 0.9), (1, 3, 0.8), (3, 0, 9 / 13)):
        assert abs(np.mean(first == a) - 1 / 3) < 0.03
        assert abs(np.mean(second[first == a] == b) - chance) < 0.04
    assert np.all(first != second)


def test_tiles_change_nothing(monkeypatch):
    """Neither tiles of rows nor tiles of centroids; of equal centroids the first wins."""
    x = mixture()
    whole = fit(x, restarts=1)
    monkeypatch.setitem(lloyd.TILES, "cpu", (2**10, 5))
    found = fit(x, restarts=1, chunk=100)
    np.testing.assert_allclose(found.inertia, whole.inertia, rtol=1e-6)
    assert np.mean(np.asarray(found.assignment) == whole.assignment) >= 0.999
    plan = lloyd.make_plan(N, D, K)
    same = jnp.tile(x[:3], (4, 1))
    assert plan.columns < 6  # the copies of a centroid are in different tiles
    nearest = lloyd.nearest_centroid(plan, jnp.asarray(x[:100]), same)
    assert set(np.asarray(nearest)) == {0, 1, 2}


def test_empty_clusters_are_split():
    x = mixture(n=300)
    far = np.full((K, D), 1e3, np.float32)
    far[0] = 0
    found = fit(x, init=far, restarts=1)
    assert np.all(found.counts > 0)
    assert found.inertia < 0.7 * np.square(x - x.mean(0)).sum()


def test_split_of_a_cluster():
    """The donor is sampled by its members less one; the halves are scaled by 1 ± 1/1024."""
    centroids = jnp.asarray([[1.0, 2, 3], [0, 0, 0], [4, 5, 6], [7, 8, 9]])
    counts = jnp.asarray([4.0, 0, 9, 1])  # the last cluster cannot give a member away
    split = jax.jit(jax.vmap(lambda key: lloyd.split_empty(centroids, counts, key)))
    found = np.asarray(split(jax.random.split(KEY, 4000)))
    donor = np.where(found[:, 1, 0] > 2, 2, 0)
    assert abs(np.mean(donor == 2) - 8 / 11) < 0.03
    apart = np.float32([1, -1, 1]) / 1024
    np.testing.assert_allclose(found[:, 1], centroids[donor] * (1 + apart), rtol=1e-6)
    each = np.arange(4000)
    np.testing.assert_allclose(found[each, donor], centroids[donor] * (1 - apart), rtol=1e-6)
    np.testing.assert_array_equal(found[each, 2 - donor], centroids[2 - donor])


def test_as_many_clusters_as_rows():
    x = mixture(n=20)
    found = kmeans.fit(x, 20, key=KEY, iterations=3)
    assert found.inertia < 1e-12 * np.square(x).sum()
    assert found.counts.tolist() == [1] * 20


def test_nan_and_infinity_count_as_zero():
    x = mixture()
    bad, clean = x.copy(), x.copy()
    bad[3, 2], bad[5], bad[7, 1] = np.nan, np.inf, -np.inf
    clean[3, 2], clean[5], clean[7, 1] = 0, 0, 0
    for a, b in zip(fit(bad), fit(clean)):
        np.testing.assert_array_equal(a, b)
        assert np.all(np.isfinite(a))


def test_spherical():
    x = mixture()
    found = fit(x, spherical=True, restarts=1)
    np.testing.assert_allclose(np.linalg.norm(found.centroids, axis=1), 1, rtol=1e-6)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosine = unit @ np.asarray(found.centroids).T
    np.testing.assert_allclose(found.inertia, np.sum(2 - 2 * cosine.max(1)), rtol=1e-5)


@pytest.mark.parametrize("n", [100, 70_000, 600_000, 10_000_000])
def test_fixed_point_keeps_what_a_float_does(n):
    x = np.float32(np.random.default_rng(0).standard_normal((64, 3)) * [1e-30, 1, 1e12])
    plan = lloyd.make_plan(n, 3, 1)
    exponent = jnp.frexp(jnp.abs(x).max(0))[1]
    fixed = lloyd.to_fixed(plan, x, exponent)
    assert n * 2 ** (plan.bits) <= 2**31
    assert np.abs(np.asarray(fixed)).max() <= 2**plan.bits
    total = lloyd.from_fixed(plan, fixed.sum(0, keepdims=True), exponent)[0]
    error = np.abs(total - x.astype(np.float64).sum(0)) / np.abs(x).max(0)
    assert np.all(error < 64 * 2.0**-23)


def test_progress():
    x = mixture()
    seen = []
    found = fit(x, restarts=2, iterations=4, progress=lambda *a: seen.append(a))
    assert [a[:2] for a in seen] == [(r, i) for r in range(2) for i in range(4)]
    assert seen[0][2] > seen[3][2] and seen[-1][3] > seen[0][3] > 0
    jitted = fit(x, restarts=2, iterations=4)
    np.testing.assert_allclose(found.inertia, jitted.inertia, rtol=1e-6)
    assert np.mean(np.asarray(found.assignment) == jitted.assignment) >= 0.999


def test_stops_when_nothing_moves():
    x, seen = mixture(), []
    settled = fit(x, iterations=500)
    again = kmeans.fit(
        x, K, key=KEY, init=settled.centroids, progress=lambda *a: seen.append(a), iterations=9
    )
    assert len(seen) == 1
    np.testing.assert_array_equal(again.centroids, settled.centroids)


def test_progress_shows_a_bar(capsys):
    fit(mixture(), restarts=2, iterations=4, progress=True)
    assert "8/8" in capsys.readouterr().err


def test_progress_is_refused_inside_jit():
    with pytest.raises(ConfigError, match="jax.jit"):
        jax.jit(partial(fit, progress=True))(mixture())


@pytest.mark.parametrize(
    "k, options, words",
    [
        (11, {}, ("k=11", "n=10")),
        (0, {}, ("k=0", "n=10")),
        (2, {"init": "kmeans"}, ("'kmeans'", "kmeans++")),
        (2, {"init": np.zeros((3, 2))}, ("(3, 2)", "(2, 2)")),
        (2, {"init": np.zeros((2, 2)), "restarts": 2}, ("restarts",)),
        (2, {"iterations": 0}, ("iterations",)),
        (2, {"restarts": 0}, ("restarts",)),
        (2, {"chunk": 0}, ("chunk",)),
    ],
)
def test_impossible_arguments_are_refused(k, options, words):
    with pytest.raises(ConfigError) as error:
        kmeans.fit(np.zeros((10, 2), np.float32), k, key=KEY, **options)
    assert all(word in str(error.value) for word in words)


def test_no_block_of_rows_by_clusters():
    n, k, d = 40_000, 4_000, 16
    with on(8):
        x = jax.ShapeDtypeStruct((n, d), jnp.float32)
        key = jax.eval_shape(lambda: KEY)
        program = jax.jit(lambda x, key: kmeans.fit(x, k, key=key)).lower(x, key).compile()
    assert program.memory_analysis().temp_size_in_bytes < 4 * n * k / 8 / 4
