from __future__ import annotations

import numpy as np
import pytest
from support.pixels import Encode, Examples, draw, unit

from clipx.config.binding import bind
from clipx.errors import ConfigError
from clipx.evaluators import clustering
from clipx.evaluators.clustering import Clustering, nearest_centroid

metrics = pytest.importorskip("sklearn.metrics")


def test_clusters_that_are_the_classes_and_clusters_that_are_not():
    rows, labels = draw(0, 90, 4, 0.05)
    encode = Encode("unit", unit(rows).astype("f"))
    found = Clustering(Examples(list(labels)), seed=1, batch_size=40)(encode)
    assert found == {"ari": pytest.approx(1), "ami": pytest.approx(1)}
    other = np.random.default_rng(3).permutation(labels)
    found = Clustering(Examples(list(other)))(encode)
    assert abs(found["ari"]) < 0.05 and abs(found["ami"]) < 0.05


def test_a_sample_trains_and_every_row_is_assigned(monkeypatch):
    monkeypatch.setattr(clustering, "ROWS_PER_CLUSTER", 8)
    seen, fit = [], clustering.kmeans.fit
    monkeypatch.setattr(
        clustering.kmeans,
        "fit",
        lambda x, k, **given: seen.append((x, given)) or fit(x, k, **given),
    )
    rows, labels = draw(1, 90, 4, 0.3)
    rows = unit(rows).astype("f")
    found = Clustering(Examples(list(labels)), restarts=2, seed=5)(Encode("unit", rows))
    ((sample, given),) = seen
    assert (
        len({tuple(row) for row in sample.tolist()} & {tuple(row) for row in rows.tolist()}) == 32
    )
    assert given["iterations"] == 100 and given["restarts"] == 2
    centroids = np.asarray(fit(sample, 4, **given).centroids)
    distances = np.linalg.norm(rows[:, None] - centroids, axis=2)
    clusters = nearest_centroid(rows, centroids, 7)
    np.testing.assert_array_equal(clusters, distances.argmin(1))
    assert found["ari"] == pytest.approx(metrics.adjusted_rand_score(labels, clusters))


def test_a_model_that_diverged_scores_as_one_cluster():
    labels = draw(0, 90, 4, 0)[1]  # the same shapes as above, whose program is compiled
    found = Clustering(Examples(list(labels)))(Encode("unit", np.full((90, 8), np.nan)))
    assert found == {"ari": pytest.approx(0), "ami": pytest.approx(0)}


@pytest.mark.parametrize(
    "labels, said", [([0, 0], "greatest label 0"), ([0, 2], "label 2"), ([], "an empty data set")]
)
def test_errors_of_the_set(labels, said):
    with pytest.raises(ConfigError) as error:
        Clustering(Examples(labels))(Encode("unit", np.eye(2)))
    assert said in str(error.value)


def test_config_errors_come_before_any_example_is_read(monkeypatch):
    for name in ("iterations", "restarts", "batch_size"):
        with pytest.raises(ConfigError, match=f"clustering.{name}"):
            bind(Clustering, {name: 0}, where="clustering", examples=None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"\[eval\]"):
        bind(Clustering, {}, examples=None)
