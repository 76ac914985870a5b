"""DeCLIP: the authors' numbers, its queue and hidden words, and the laws for its options."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import ROOT, laws, tiny
from support.declip_oracle import ORACLE, WIDE, sines, unit

from clipx import losses
from clipx.config import files
from clipx.config.binding import bind
from clipx.errors import ConfigError
from clipx.models.heads import BatchNormMLP
from clipx.objectives import base
from clipx.objectives.base import Objective
from clipx.objectives.declip import DeCLIP, DeCLIPFeatures, capped
from clipx.parallel.mesh import path_name
from clipx.training.checkpoint import Checkpoints
from clipx.training.optimizer import OptimizerConfig
from clipx.training.parameter_rules import claim
from clipx.training.run import assemble
from clipx.training.schedule import make_schedule
from clipx.training.step import make_train_step, row_keys
from clipx.types import TrainState


def declip(**fields) -> DeCLIP:
    """A tiny DeCLIP with these fields."""
    towers = {"image": tiny.Linear(embed_dim=8), "text": tiny.Linear(embed_dim=8)}
    return DeCLIP(**towers, **tiny.FIELDS["declip"] | fields)


class Scanned(tiny.Linear):
    scan: bool = True


class Given(DeCLIP):
    """DeCLIP with the oracle's neighbours, predictions and projections."""

    def neighbours(self, features, memory, train):
        return [jnp.asarray(x, features.text.dtype) for x in ROWS[4:]], memory

    def siamese(self, features, train):
        return tuple(jnp.asarray(sines((4, 6), phase)) for phase in (0.1, 0.2, 0.3, 0.4))


ROWS = [unit(np.cos((i + 2) * sines((4, 6), 0.1 * i)) + sines((4, 6), 1.0 + i)) for i in range(6)]
HIDDEN = np.array([[4.5, 2], [3, 1], [0, 0], [2.5, 1]])  # a mean of 2.5 over four words


def plain(rows, log_scale):
    """The complete objective in plain array code, from rows of any length."""
    views, texts = [x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in rows[:2]], rows[2:]

    def half(a, b):
        logits = jnp.exp(log_scale) * a @ b.T
        return jnp.mean(jax.nn.logsumexp(logits, axis=1) - jnp.diag(logits))

    pairs = [(half(v, t) + half(t, v)) / 2 for t in texts for v in views]
    neighbours = [half(v, n) for n in ROWS[4:] for v in views]
    rest = 0.2 * ORACLE["simsiam"]["loss"] + 0.2 * 2.5
    return 0.4 * sum(pairs) / 4 + 0.2 * sum(neighbours) / 4 + rest


@WIDE
def test_the_total_is_declips(wide):
    """Oracle `declip_objective`: the total 11.0296054 and each of its terms. The gradients are
    compared with those of plain array code that gives the same total."""
    oracle, close = ORACLE["declip_objective"], {"rtol": 1e-9 if wide else 1e-5}
    module = Given(image=tiny.Linear(), text=tiny.Linear(), **tiny.WORDS)

    def total(rows, log_scale):
        features = DeCLIPFeatures(*rows, masked_lm=jnp.asarray(HIDDEN, rows[0].dtype))
        variables = {"params": {"logit_scale": log_scale}}
        loss = module.apply(variables, features, {}, train=True, method="loss")
        return loss.value, loss.metrics

    with jax.enable_x64(True):
        lengths = np.array([3.0, 0.5, 1, 1])
        inputs = [x * length for x, length in zip(ROWS, lengths)], np.float64(3.4)
        value, expected = jax.jit(jax.value_and_grad(plain, (0, 1)))(*inputs)
        np.testing.assert_allclose(value, oracle["total_0.4_0.2_0.2_0.2"], rtol=1e-9)
    with jax.enable_x64(wide):
        inputs = jax.tree.map(jnp.asarray, inputs)
        (value, metrics), slopes = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(*inputs)
    np.testing.assert_allclose(value, oracle["total_0.4_0.2_0.2_0.2"], **close)
    for name, key in {
        "contrastive": "clip_loss",
        "neighbour": "nn_loss",
        "simsiam": "simsiam",
        "masked_lm": "mlm",
    }.items():
        np.testing.assert_allclose(metrics[f"loss/{name}"], oracle[key], **close)
    laws.assert_same(slopes, expected, 1e-9 if wide else 1e-5)


@WIDE
def test_the_heads_are_declips(wide):
    """Oracles `projection_mlp` and `prediction_mlp`: outputs and running statistics in training."""
    projector, predictor = BatchNormMLP((6, 6, 6), last_norm=True), BatchNormMLP((3, 6))
    names = {"linear1": "fc_0", "linear2": "fc_1", "linear3": "fc_2", "layer2": "fc_1"}
    names |= {"bn1": "norm_0", "bn2": "norm_1", "bn3": "norm_2"}
    close = {"rtol": 0, "atol": 1e-9 if wide else 1e-6}
    for head, key, x in (
        (projector, "projection_mlp", np.cos(3 * sines((4, 5), 1.3))),
        (predictor, "prediction_mlp", np.cos(3 * sines((4, 6), 1.4))),
    ):
        oracle, params = ORACLE[key], {}
        for i, (name, shape) in enumerate(oracle["param_order"]):
            layer, kind = name.split(".")
            value = sines(shape, i, 0.5)
            if kind == "weight":
                kind = "scale" if value.ndim == 1 else "kernel"
            params.setdefault(names[layer], {})[kind] = value.T
        stats = {
            name: {"mean": np.zeros(len(layer["scale"])), "var": np.ones(len(layer["scale"]))}
            for name, layer in params.items()
            if "scale" in layer
        }
        with jax.enable_x64(wide):
            variables = jax.tree.map(jnp.asarray, {"params": params, "batch_stats": stats})
            out, after = head.apply(variables, jnp.asarray(x), train=True, mutable="batch_stats")
        np.testing.assert_allclose(out, oracle["train_out"], **close)
        if key == "projection_mlp":
            moved = after["batch_stats"]["norm_0"]
            np.testing.assert_allclose(moved["mean"], oracle["bn1_running_mean"], **close)
            np.testing.assert_allclose(moved["var"], oracle["bn1_running_var"], **close)


def test_the_scale_is_capped_and_its_gradient_is_not():
    """Oracle `scale_clamp_ste`."""
    oracle = ORACLE["scale_clamp_ste"]
    with jax.enable_x64(True):
        slope = jax.grad(lambda s, cap: 2 * capped(jnp.exp(s), cap))
        for cap, scale in ((100.0, oracle["forward_scale"]), (None, np.exp(6))):
            np.testing.assert_allclose(capped(jnp.exp(oracle["s"]), cap), scale, rtol=1e-12)
            found = slope(oracle["s"], cap)
            np.testing.assert_allclose(found, oracle["d(2*scale)/ds"], rtol=1e-9)
    assert capped(jnp.float32(np.exp(6)), 100.0) == 100 and capped(jnp.float32(7), 100.0) == 7


@pytest.mark.parametrize("spec, key", [("declip", "1e-3"), ("filip", "5e-4")])
def test_the_schedule_is_declips(spec, key):
    """Oracles `lr_yfcc_peak1e-3` and `lr_yfcc_peak5e-4`. The reference counts steps from 1."""
    config = files.load(str(ROOT / "configs" / f"{spec}.py"))
    optimizer, steps = bind(OptimizerConfig, config["optimizer"]), config["train"]["total_steps"]
    with jax.enable_x64(True):
        rate = make_schedule(optimizer, steps=steps, batch_size=4096, rows=None)
        for step, expected in ORACLE[f"lr_yfcc_peak{key}"].items():
            found = rate(jnp.float64(int(step) - 1))
            np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-15, err_msg=step)


@pytest.mark.slow  # full-size towers
def test_published_size_and_what_decays():
    """180.307 M parameters; the heads' numbers are counted in the authors' code. Everything decays
    except biases of layers, gains and the scale. The patch embedding neither learns nor decays."""
    config = files.load(str(ROOT / "configs" / "declip.py"))
    run = assemble(config, jax.devices()[:1])
    params = run.state.params
    count = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in params.items()}
    assert count["projector"] == 2_630_656 and count["predictor"] == 1_051_136
    assert count["vocabulary"] == 512 * 49409 + 49409
    assert round(sum(count.values()) / 1e6, 3) == 180.307
    assert run.state.memory["queue"].shape == (65536, 512)
    rules = run.config.optimizer.rules
    for path, index in jax.tree.leaves_with_path(claim(rules, params)):
        name, rule = path_name(path), rules[index]
        frozen = name == "image/patch_embedding/kernel"
        spared = name.endswith(("/bias", "/scale", "logit_scale")) and "qkv" not in name
        assert (rule.weight_decay == 0) == (spared or frozen), name
        assert (rule.learning_rate == 0) == frozen, name
        assert (rule.clamp == (3.0, 6.0)) == (name == "logit_scale"), name


@pytest.mark.slow  # the laws hold the default
@pytest.mark.parametrize(
    "variant, which",
    [
        pytest.param(
            *("late_interaction_weight=0.2,neighbour_direction=both,groups=2", "all"),
            marks=pytest.mark.slow,
        ),
        ("contrast_clean_caption=True,false_negatives=mask,simsiam_weight=0", "rows"),
        ("masked_lm_weight=0,neighbour_weight=0,late_interaction_weight=1,top_k=1", "rows"),
    ],
)
def test_laws_of_options(variant, which):
    name = f"declip:{variant}"
    laws.check_rows(name)
    if which == "all":
        laws.check_topology_and_slices(name, "float64", 1e-11)


@functools.cache
def features_of(name: str, dropout: float = 0.0, train: bool = True) -> DeCLIPFeatures:
    module, variables = tiny.objective(name, dropout=dropout), tiny.variables(name)
    keys = row_keys(0, jnp.int32(5), tiny.ROWS)
    embed = jax.jit(lambda batch: module.apply(variables, batch, keys, train=train, method="embed"))
    return jax.tree.map(np.asarray, embed(tiny.batch(module)))


def test_the_first_text_has_hidden_words_but_not_in_evaluation():
    """The first text is the caption with hidden words. With `contrast_clean_caption` it is the
    caption itself, while `masked_lm` still hides as many words. In evaluation no word is hidden."""
    hidden = features_of("declip:mask_rate=0.5")
    clean = features_of("declip:mask_rate=0.5,contrast_clean_caption=True")
    still = features_of("declip:mask_rate=0.5", train=False)
    np.testing.assert_array_equal(clean.text, still.text)
    np.testing.assert_array_equal(clean.masked_lm, hidden.masked_lm)
    different = np.any(hidden.text != clean.text, axis=1)
    np.testing.assert_array_equal(different, hidden.masked_lm[:, 1] > 0)
    assert different.sum() > 20 and not still.masked_lm.any()
    np.testing.assert_array_equal(hidden.other_text, clean.other_text)


def test_scanned_towers_on_tpus_take_all_views_as_one_batch(monkeypatch):
    """Each view's and text's features stay the same, dropout included."""
    name = "declip:contrast_clean_caption=True"
    expected = features_of(name, dropout=0.3)
    plain = tiny.objective(name, dropout=0.3)
    towers = {k: Scanned(embed_dim=8, dtype="float32", dropout=0.3) for k in ("image", "text")}
    module, variables = plain.clone(**towers), tiny.variables(name)
    encode, calls = Objective.encode_image, []

    def counted(self, image, **options):
        calls.append(len(image))
        return encode(self, image, **options)

    monkeypatch.setattr(base, "on_tpu", lambda: True)
    monkeypatch.setattr(Objective, "encode_image", counted)
    keys = row_keys(0, jnp.int32(5), tiny.ROWS)
    got = module.apply(variables, tiny.batch(module), keys, train=True, method="embed")
    assert calls == [2 * tiny.ROWS]
    for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)


def loss_of(module, features, memory, variables=None):
    if variables is None:
        variables = {"params": {"logit_scale": np.float32(1.0)}}
    return jax.jit(
        lambda f, m: module.apply(
            variables, f, m, train=True, method="loss", mutable=["batch_stats"]
        )[0]
    )(features, memory)


def rows(seed, count=4):
    return np.random.default_rng(seed).normal(size=(count, 4, 8)).astype(np.float32)


ALONE = {"simsiam_weight": 0.0, "masked_lm_weight": 0.0}


def test_the_queue_is_searched_before_it_is_filled():
    """Both texts are looked up in the old queue. The augmented texts enter first. Rows beyond the
    queue's end are dropped, and the next step starts at its beginning."""
    module = declip(**ALONE, queue_size=14, neighbour_weight=0.6)
    memory = module.init_memory()
    np.testing.assert_allclose(np.linalg.norm(memory["queue"], axis=1), 1, rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, memory, module.init_memory())
    queues, pointers = [memory["queue"]], []
    for step in range(3):
        images, other, text, augmented = map(unit, rows(step))
        features = DeCLIPFeatures(images, other, text, augmented)
        queue, loss = np.asarray(memory["queue"]), loss_of(module, features, memory)
        found = [queue[np.argmax(x @ queue.T, axis=1)] for x in (text, augmented)]
        pairs = [
            np.mean(losses.info_nce(i, n, scale=np.exp(1.0), symmetric=False))
            for n in found
            for i in (images, other)
        ]
        np.testing.assert_allclose(loss.metrics["loss/neighbour"], np.mean(pairs), rtol=1e-5)
        memory = loss.memory
        queues.append(np.asarray(memory["queue"]))
        pointers.append(int(memory["pointer"]))
        if step == 0:
            np.testing.assert_array_equal(queues[1][:8], np.concatenate([augmented, text]))
            np.testing.assert_array_equal(queues[1][8:], queues[0][8:])
        if step == 1:  # 8 to 11: augmented; 12 and 13: captions, of which two more are dropped
            np.testing.assert_array_equal(queues[2][8:], np.concatenate([augmented, text[:2]]))
            np.testing.assert_array_equal(queues[2][:8], queues[1][:8])
    assert pointers == [8, 0, 8]


def test_neighbours_teach_images_alone():
    """In either direction no gradient reaches the texts. The reverse direction changes the images'
    gradient."""
    found = {}
    for direction in ("image_to_text", "both"):
        module = declip(**ALONE, contrastive_weight=0.0, neighbour_direction=direction)
        memory = module.init_memory()

        def total(features, module=module, memory=memory):
            return loss_of(module, features, memory).value

        found[direction] = jax.grad(total)(DeCLIPFeatures(*rows(0)))
        assert not np.any(found[direction].text) and not np.any(found[direction].other_text)
        assert np.all(found[direction].image) and np.all(found[direction].other_image)
    assert np.any(found["both"].image != found["image_to_text"].image)


def test_groups_have_queues_and_statistics_of_their_own():
    """With two groups, each has its own queue and SimSiam statistics. The contrastive term still
    uses all rows as negatives."""
    names = ("declip:masked_lm_weight=0", "declip:masked_lm_weight=0,groups=2")
    variables = tiny.variables(names[0])
    one, two = (tiny.objective(name) for name in names)
    features = DeCLIPFeatures(*rows(3, 4))
    memory = two.init_memory()
    assert memory["queue"].shape == (2, 48, 8)
    whole = loss_of(two, features, memory, variables)
    halves = []
    for group, part in enumerate((slice(0, 2), slice(2, 4))):
        group_memory = {"queue": memory["queue"][group], "pointer": memory["pointer"]}
        half = jax.tree.map(lambda x, part=part: x[part], features)
        halves.append(loss_of(one, half, group_memory, variables))
        np.testing.assert_array_equal(whole.memory["queue"][group], halves[-1].memory["queue"])
    simsiam = [half.metrics["loss/simsiam"] for half in halves]
    np.testing.assert_allclose(whole.metrics["loss/simsiam"], np.mean(simsiam), rtol=1e-5)
    together = loss_of(one, features, one.init_memory(), variables).metrics
    np.testing.assert_allclose(
        whole.metrics["loss/contrastive"], together["loss/contrastive"], rtol=1e-6
    )
    assert not np.isclose(whole.metrics["loss/simsiam"], together["loss/simsiam"], rtol=1e-3)
    with pytest.raises(ConfigError, match=r"(?s)config.objective.groups.*2, with 3 rows"):
        loss_of(two, jax.tree.map(lambda x: x[:3], features), memory, variables)


def test_no_hidden_word_gives_a_masked_lm_loss_of_0():
    module = declip(simsiam_weight=0.0, neighbour_weight=0.0)
    features = DeCLIPFeatures(*rows(0), masked_lm=np.zeros((4, 2), np.float32))
    loss = loss_of(module, features, {})
    assert loss.metrics["loss/masked_lm"] == 0 and np.isfinite(loss.value) and loss.memory == {}


def test_views_and_what_terms_need():
    views = declip(augmentation="mocov2").views
    assert len(views.pictures) == 2 and views.texts == ("caption", "augmented")
    assert views.pictures[0] == views.pictures[1] and views.pictures[0].scale == (0.2, 1.0)
    assert declip(neighbour_weight=0.0).init_memory() == {}


@pytest.mark.parametrize(
    "fields, where",
    [
        ({"contrastive_weight": -0.1}, "config.objective.contrastive_weight"),
        (
            {"contrastive_weight": 0.0, "neighbour_weight": 0.0},
            "config.objective.contrastive_weight",
        ),
        ({"neighbour_direction": "text_to_image"}, "config.objective.neighbour_direction"),
        ({"queue_size": 0}, "config.objective.queue_size"),
        ({"simsiam_width": 1}, "config.objective.simsiam_width"),
        ({"logit_scale_cap": 0.0}, "config.objective.logit_scale_cap"),
        ({"groups": 0}, "config.objective.groups"),
        ({"mask_rate": 1.0}, "config.objective.mask_rate"),
        ({"mask_id": 5}, "config.objective.mask_id"),
        (
            {"late_interaction_weight": 0.2, "false_negatives": "mask"},
            "config.objective.false_negatives",
        ),
    ],
)
def test_impossible_fields_are_config_errors(fields, where):
    given = {"image": tiny.Linear(), "text": tiny.Linear(), "mask_id": 2, "special_ids": (3, 2)}
    with pytest.raises(ConfigError) as error:
        bind(DeCLIP, fields, where="config.objective", **given)
    assert error.value.where == where


def test_a_tokenizer_without_an_id_for_hidden_words_and_a_tower_without_a_width():
    with pytest.raises(ConfigError, match=r"(?s)config.tokenizer.mask.*mask=true"):
        declip(mask_id=None)
    assert declip(mask_id=None, contrast_clean_caption=True, masked_lm_weight=0.0)
    with pytest.raises(ConfigError, match=r"(?s)config.text.embed_dim"):
        DeCLIP(image=tiny.Linear(), text=tiny.Linear(embed_dim=0), mask_id=2)


@pytest.mark.slow  # ProtoCLIP's run tests resuming with a memory too
def test_a_run_that_goes_on_ends_in_the_same_bits(tmp_path):
    """Law 7 with a queue and hidden words: saved after the second of four steps."""
    module, optimizer = tiny.objective("declip"), optax.adam(1e-2)
    step = jax.jit(make_train_step(module, optimizer, seed=0))
    batches = [tiny.batch(module, rows=16, seed=seed) for seed in range(4)]
    variables = tiny.variables("declip")
    states = [
        TrainState(
            step=jnp.int32(0),
            params=variables["params"],
            opt_state=optimizer.init(variables["params"]),
            batch_stats=variables["batch_stats"],
            memory=module.init_memory(),
        )
    ]
    for batch in batches:
        states.append(step(states[-1], batch)[0])
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, states[2], {}, {})
    checkpoints.wait()
    state = checkpoints.restore(2, jax.eval_shape(lambda: states[2]))
    checkpoints.close()
    np.testing.assert_array_equal(state.memory["queue"], states[2].memory["queue"])
    assert [int(s.memory["pointer"]) for s in states] == [0, 32, 16, 0, 32]
    for batch in batches[2:]:
        state = step(state, batch)[0]
    jax.tree.map(np.testing.assert_array_equal, state, states[4])
    assert np.any(state.memory["queue"] != states[2].memory["queue"])
