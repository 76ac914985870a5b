"""ProtoCLIP: an episode against plain array code, its schedule, its heads, its recipe."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import ROOT, load_oracle, tiny

from clipx.config import files
from clipx.config.binding import bind
from clipx.errors import ConfigError
from clipx.models.heads import BatchNormMLP, PrototypeHeads
from clipx.objectives.protoclip import Compat, EpisodeFeatures, ProtoCLIP, ProtoCLIPFeatures
from clipx.ops import kmeans
from clipx.parallel.mesh import MeshConfig, batch_sharding, make_mesh, path_name, put
from clipx.training.checks import check_towers
from clipx.training.parameter_rules import claim
from clipx.training.run import assemble
from clipx.training.schedule import make_schedule
from clipx.training.step import row_keys

FIELDS = tiny.FIELDS["protoclip"]
TOWERS = {"image": tiny.Linear(embed_dim=8), "text": tiny.Linear(embed_dim=8)}
ROWS = 64  # of an episode
KEY = jax.random.key(5)
PAIRS = [("image", "text"), ("text", "image"), ("image", "external"), ("text", "external")]


def protoclip(**fields) -> ProtoCLIP:
    return ProtoCLIP(**TOWERS, **FIELDS | fields)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def rows(seed, count, width):
    """Unit rows in clusters, for k-means to find."""
    rng = np.random.default_rng(seed)
    centre = rng.normal(size=(5, width))[np.arange(count) % 5]
    return unit(centre + 0.5 * rng.normal(size=(count, width))).astype(np.float32)


EPISODE = EpisodeFeatures(image=rows(0, ROWS, 6), text=rows(1, ROWS, 6), teacher=rows(2, ROWS, 4))
FEATURES = ProtoCLIPFeatures(
    image=3 * rows(3, 32, 8), text=rows(4, 32, 8), position=np.arange(1, 64, 2, dtype=np.int32)
)


@functools.cache
def variables():
    """Random parameters, with different heads for the two modalities; compiles nothing."""
    rng, module = np.random.default_rng(6), protoclip()

    def init():
        return module.init(KEY, FEATURES, module.init_memory(), train=True, method="loss")

    shapes = jax.eval_shape(init)
    params = jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape), shapes["params"])
    params["logit_scale"] = params["heads"]["logit_scale"] = np.log(1 / 0.07)
    stats = jax.tree.map(lambda x: np.ones(x.shape), shapes["batch_stats"])
    return tiny.as_dtype(
        jax.tree.map(np.asarray, {"params": params, "batch_stats": stats}), "float32"
    )


MODULE = protoclip()


@jax.jit
def refresh(memory, features):
    return MODULE.apply(variables(), memory, features, key=KEY, method="refresh")


@functools.cache
def refreshed():
    """The memory of the first episode."""
    return jax.tree.map(np.asarray, refresh(MODULE.init_memory(), EPISODE))


@functools.partial(jax.jit, static_argnums=0)
def loss_of(module, params, features, memory):
    """The loss, and the running statistics after it."""
    return module.apply(
        {**variables(), "params": params},
        features,
        memory,
        train=True,
        method="loss",
        mutable=["batch_stats"],
    )


@functools.partial(jax.jit, static_argnums=0)
def step(module, params, features, memory):
    """The loss, the gradient of the parameters, and the running statistics after it."""

    def total(params):
        loss, after = loss_of(module, params, features, memory)
        return loss.value, (loss, after["batch_stats"])

    slopes, (loss, stats) = jax.grad(total, has_aux=True)(params)
    return loss, slopes, stats


def head(x, which):
    """One head in training mode, in plain array code."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf)[which], variables()["params"]["heads"]["mlp"])
    x = x @ p["fc_0"]["kernel"] + p["fc_0"]["bias"]
    x = (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + 1e-5)
    x = np.maximum(x * p["norm_0"]["scale"] + p["norm_0"]["bias"], 0)
    return unit(x @ p["fc_1"]["kernel"] + p["fc_1"]["bias"])


def log_softmax(x):
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def mean_of(labels, x):
    """Prototypical back translation in plain array code: the mean of each cluster's members."""
    means = [x[labels == i].mean(axis=0) if np.any(labels == i) else 0 * x[0] for i in range(5)]
    return np.array(means)


def plain(memory, term, a, b, *, translated, temperature):
    """ProtoLoss of one direction in plain array code, from the clusters in `memory`."""
    centroids = memory["centroids"]
    table = memory["translated"][f"{a}_from_{b}"] if translated else centroids[b]
    logits = head(getattr(FEATURES, a), ("image", "text").index(a)) @ table.T / 0.07
    labels = memory["labels"][b][FEATURES.position]
    target = np.eye(5)[labels]
    if term == "prototype" and temperature:
        teacher = centroids[b]
        target = np.exp(log_softmax(teacher[labels] @ teacher.T / temperature))
    accuracy = np.mean(logits.argmax(axis=1) == labels)
    return -np.mean(np.sum(target * log_softmax(logits), axis=1)), accuracy


def test_an_episode_is_protoclips():
    """Labels, inertia and centroids are those of k-means on each modality with one key. Prototypes
    are means over the other modality's clusters."""
    memory = refreshed()
    assert memory["episode"] == 0
    for name in ("image", "text"):
        fit = kmeans.fit(getattr(EPISODE, name), 5, key=KEY, iterations=3, restarts=2)
        np.testing.assert_array_equal(memory["labels"][name], fit.assignment)
        np.testing.assert_allclose(memory["centroids"][name], fit.centroids, atol=1e-6)
        inertia = memory["clusters"][f"{name}_inertia"]
        np.testing.assert_allclose(inertia, fit.inertia / ROWS, rtol=1e-6)
    for name, labels in memory["labels"].items():
        assert memory["clusters"][f"{name}_empty"] == 5 - len(np.unique(labels))
    equal = np.mean(memory["labels"]["image"] == memory["labels"]["text"])
    np.testing.assert_allclose(memory["clusters"]["equal_labels"], equal)
    assert list(memory["translated"]) == sorted(f"{a}_from_{b}" for a, b in PAIRS)
    for a, b in PAIRS:
        table = mean_of(memory["labels"][b], getattr(EPISODE, a))
        np.testing.assert_allclose(memory["translated"][f"{a}_from_{b}"], table, atol=1e-6)


def known(names, memory):
    """The entries of `memory` whose keys are in `names`."""
    if not isinstance(names, dict):
        return memory
    return {name: known(part, memory[name]) for name, part in names.items()}


@pytest.mark.parametrize(
    "fields",
    [
        {"contrastive_weight": 0.7, "prototype_weight": 0.4},
        {"back_translation": False, "external_weight": 0.0, "target_temperature": 0.1},
        {"target_temperature": 0.0, "prototype_weight": 0.4},
    ],
    ids=["all", "no_pbt", "hard"],
)
def test_the_total_is_protoclips(fields):
    """In an episode after the warm-up: every term, their sum, and the chance level. The loss leaves
    the memory as it is."""
    module = protoclip(**fields)
    before = module.init_memory()
    memory = known(before, refreshed()) | {"episode": np.int32(1)}
    loss, _ = loss_of(module, variables()["params"], FEATURES, memory)
    weights = {"prototype": 1.0, "external": 0.5} | {
        name.removesuffix("_weight"): x for name, x in fields.items() if name.endswith("_weight")
    }
    options = {
        "translated": fields.get("back_translation", True),
        "temperature": fields.get("target_temperature", 0.01),
    }
    terms = {"prototype": PAIRS[:2]} | ({"external": PAIRS[2:]} if weights["external"] else {})
    logits = unit(FEATURES.image) @ unit(FEATURES.text).T / 0.07
    both = (np.mean(np.diag(log_softmax(x))) for x in (logits, logits.T))
    expected = {"contrastive": -sum(both) / 2}
    for term, pairs in terms.items():
        each = [plain(memory, term, a, b, **options) for a, b in pairs]
        expected[term] = np.mean([value for value, _ in each])
        for (a, b), (_, accuracy) in zip(pairs, each):
            np.testing.assert_allclose(loss.metrics[f"batch/{a}_from_{b}"], accuracy, rtol=1e-6)
    total = weights.get("contrastive", 1.0) * expected["contrastive"]
    total += sum(weights[term] * expected[term] for term in terms)
    for term, value in expected.items():
        np.testing.assert_allclose(loss.metrics[f"loss/{term}"], value, rtol=2e-5)
    np.testing.assert_allclose(loss.value, total, rtol=2e-5)
    chance = weights.get("contrastive", 1.0) * math.log(32)
    chance += sum(weights[term] for term in terms) * math.log(5)
    np.testing.assert_allclose(loss.metrics["chance_loss"], chance, rtol=1e-6)
    assert loss.metrics["clusters/episode"] == 1
    jax.tree.map(np.testing.assert_array_equal, loss.memory, memory)
    arguments = before, EPISODE
    method = functools.partial(module.apply, variables(), key=KEY, method="refresh")
    for after in (loss.memory, jax.eval_shape(method, *arguments)):
        assert jax.tree.structure(before) == jax.tree.structure(after)
        for x, y in zip(*map(jax.tree.leaves, (before, after))):
            assert (x.shape, x.dtype) == (y.shape, y.dtype)


@pytest.mark.parametrize("late, first", [(False, 4), (True, 3)], ids=["exact", "compat"])
def test_episodes_of_the_contrastive_loss_alone(late, first):
    """Before the first refresh, in the warm-up and from `lit_start` (or one earlier) on, the heads
    have no gradient, even if the prototypes are NaN. Their running statistics still move."""
    module = protoclip(lit_start=4, compat=Compat(lit_start=late), contrastive_weight=0.5)
    nan_tables = jax.tree.map(lambda x: x * np.float32(np.nan), refreshed()["translated"])
    for episode in (-1, 0, 1, 2, 3, 4):
        active = 1 <= episode < first
        memory = refreshed() | {"episode": np.int32(episode)}
        memory |= {} if active else {"translated": nan_tables}
        loss, slopes, stats = step(module, variables()["params"], FEATURES, memory)
        weight = 0.5 if active else 1
        rest = loss.metrics["loss/prototype"] + 0.5 * loss.metrics["loss/external"]
        expected = weight * loss.metrics["loss/contrastive"] + (rest if active else 0)
        np.testing.assert_allclose(loss.value, expected, rtol=1e-6)
        chance = weight * math.log(32) + (1.5 * math.log(5) if active else 0)
        np.testing.assert_allclose(loss.metrics["chance_loss"], chance, rtol=1e-6)
        assert slopes["logit_scale"] != 0
        for slope in jax.tree.leaves(slopes["heads"]):
            assert np.all(np.isfinite(slope)) and bool(np.any(slope)) == active
        before = variables()["batch_stats"]["heads"]["mlp"]["norm_0"]["mean"]
        moved = stats["heads"]["mlp"]["norm_0"]["mean"]
        assert np.all(moved != before)


def test_nothing_is_seen_before_the_first_episode():
    """With the initial memory everything is finite, and the prototype term is at chance."""
    memory = MODULE.init_memory()
    assert memory["episode"] == -1 and not any(map(np.any, jax.tree.leaves(memory["labels"])))
    loss, _ = loss_of(MODULE, variables()["params"], FEATURES, memory)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(loss))
    np.testing.assert_allclose(loss.metrics["loss/prototype"], math.log(5), rtol=1e-6)
    np.testing.assert_allclose(loss.value, loss.metrics["loss/contrastive"])


def test_features_that_are_not_finite_leave_finite_tables():
    image = EPISODE.image.copy()
    image[3], image[7, 2] = np.nan, np.inf
    memory = refresh(MODULE.init_memory(), EPISODE.replace(image=image))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(memory))
    table = mean_of(np.asarray(memory["labels"]["text"]), np.where(np.isfinite(image), image, 0))
    np.testing.assert_allclose(memory["translated"]["image_from_text"], table, atol=1e-6)


@pytest.mark.slow
def test_an_episode_is_the_same_on_a_mesh():
    mesh = make_mesh(MeshConfig(), jax.devices())
    with jax.set_mesh(mesh):
        got = refresh(MODULE.init_memory(), put(EPISODE, batch_sharding(mesh)))
    for x, y in zip(*map(jax.tree.leaves, (got, refreshed())), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_what_an_episode_keeps_of_a_batch():
    """An episode keeps the heads' unit outputs, computed with running statistics and without
    dropout from unnormalised tower outputs, and the teacher's rows unchanged."""
    module, variables = tiny.objective("protoclip"), tiny.variables("protoclip")
    batch = tiny.batch(module).replace(extra={"teacher": rows(9, 32, 4)})

    @functools.partial(jax.jit, static_argnums=0)
    def survey(step, batch):
        keys = row_keys(0, jnp.int32(step), 32)
        features = module.apply(variables, batch, keys, train=False, method="embed")
        return features, module.apply(variables, features, method="episode_features")

    features, kept = survey(1, batch)
    jax.tree.map(np.testing.assert_array_equal, kept, survey(2, batch)[1])
    np.testing.assert_array_equal(kept.teacher, batch.extra["teacher"])
    np.testing.assert_array_equal(features.position, batch.position)
    assert module.external_width == 4
    assert protoclip(external_weight=0.0).external_width is None
    assert np.ptp(np.linalg.norm(features.image, axis=1)) > 1e-3
    for i, name in enumerate(("image", "text")):
        head_variables = {
            kind: jax.tree.map(lambda x, i=i: x[i], variables[kind]["heads"]["mlp"])
            for kind in ("params", "batch_stats")
        }
        row = BatchNormMLP((12, 6)).apply(head_variables, getattr(features, name))
        np.testing.assert_allclose(getattr(kept, name), unit(row), rtol=1e-4, atol=1e-5)


def test_heads_start_alike():
    """Both heads start with equal parameters and have the published size. Without hidden layers a
    head is one dense layer."""
    x = rows(0, 8, 5)
    params = jax.jit(PrototypeHeads((7, 3)).init)(KEY, x, x)["params"]["mlp"]
    for leaf in jax.tree.leaves(params):
        np.testing.assert_array_equal(leaf[0], leaf[1])
    assert np.all(np.std(params["fc_0"]["kernel"][0], axis=0) > 0)
    wide = jnp.zeros((2, 1024), jnp.float32)
    for widths, count in (((2048, 128), 2_365_568), ((128,), 1025 * 128)):
        shapes = jax.eval_shape(PrototypeHeads(widths).init, KEY, wide, wide)["params"]
        assert sum(x.size for x in jax.tree.leaves(shapes)) == 2 * count + 1


def test_groups_have_statistics_of_their_own():
    """The outputs for two groups are the outputs for two separate halves."""
    state = {kind: tree["heads"] for kind, tree in variables().items()}
    both = FEATURES.image, FEATURES.text

    def outputs(*both, groups=1):
        heads = PrototypeHeads((12, 6), groups)
        return jnp.stack(heads.apply(state, *both, train=True, mutable="batch_stats")[0])

    grouped = jax.jit(functools.partial(outputs, groups=2))(*both)
    half = jax.jit(outputs)
    halves = [half(*(x[part] for x in both)) for part in (slice(0, 16), slice(16, 32))]
    np.testing.assert_allclose(grouped, np.concatenate(halves, axis=1), atol=1e-5)


@pytest.mark.parametrize(
    "fields, where, found",
    [
        ({"k": 65}, "k", "too few rows for k: episodes of 2 batches of 32"),
        ({"episode_size": 31}, "episode_size", "31 rows, with batches of 32"),
        ({"external_weight": -1.0}, "external_weight", "-1"),
        ({"back_translation": False}, "external_weight", "0.5, without back_translation"),
        ({"prototype_weight": 0.0, "external_weight": 0.0}, "prototype_weight", "0"),
        ({"target_temperature": -1.0}, "target_temperature", "-1"),
        ({"lit_start": 1}, "lit_start", "1, after warmup_episodes=1"),
        ({"lit_start": 2, "compat": {"lit_start": True}}, "lit_start", "2, after"),
        ({"restarts": 0}, "restarts", "0"),
        ({"projection_layers": -1}, "projection_layers", "-1"),
        ({"compat": {"lit": True}}, "compat.lit", "unknown key"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_impossible_fields_are_config_errors(fields, where, found):
    size = {"batch_size": 32}
    section = {name: x for name, x in FIELDS.items() if name not in size}
    with pytest.raises(ConfigError) as error:
        bind(ProtoCLIP, section | fields, where="config.objective", **TOWERS, **size)
    assert error.value.where == f"config.objective.{where}" and found in error.value.found


def test_towers_of_two_widths():
    with pytest.raises(ConfigError, match=r"(?s)config.text.embed_dim.*8, and 16"):
        check_towers(ProtoCLIP(image=tiny.Linear(embed_dim=16), text=tiny.Linear(embed_dim=8)))


@pytest.mark.slow  # full-size towers
def test_the_published_recipe():
    """The sizes of the four groups of parameters, as the reference counts them, and each group's
    rule; the steps of an episode; the learning rates that were recorded from the reference."""
    config = files.load(f"{ROOT}/configs/protoclip.py:1gpu")
    run = assemble(config, jax.devices()[:1])
    rules, sizes = run.config.optimizer.rules, {}
    for path, index in jax.tree.leaves_with_path(claim(rules, run.state.params)):
        name, rule = path_name(path), rules[index]
        assert rule.horizon == (0.98 if name.startswith("image/") else 1)
        assert (rule.clamp is not None) == name.endswith("logit_scale")
        leaf = run.state.params
        for part in name.split("/"):
            leaf = leaf[part]
        group = name.startswith("image/"), rule.weight_decay > 0
        sizes[group] = sizes.get(group, 0) + leaf.size
    assert sizes[True, False] == 60_416 and sizes[True, True] == 38_256_480
    assert sizes[False, False] == 4_812_034 and sizes[False, True] == 63_609_344
    assert run.objective.episode_steps == 3125 and run.objective.with_replacement
    assert run.state.memory["labels"]["external"].shape == (200_000,)
    assert {x.shape for x in jax.tree.leaves(run.state.memory["translated"])} == {(20_000, 128)}
    oracle = load_oracle("protoclip")
    with jax.enable_x64(True):
        options = {"steps": run.steps, "batch_size": 64, "rows": None}
        rate = make_schedule(run.config.optimizer, **options)
        for count, rates in oracle["sched"]["single_gpu"].items():
            got = rate(jnp.float64(int(count)), horizon=0.98), rate(jnp.float64(int(count)))
            np.testing.assert_allclose(got, rates, rtol=1e-9, atol=1e-19)
