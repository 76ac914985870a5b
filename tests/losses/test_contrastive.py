"""The sharded, tiled losses equal plain dense ones, in value and gradients, on every mesh."""

import inspect
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import load_oracle

from clipx import losses
from clipx.losses.forms import pick_form
from clipx.parallel.mesh import MeshConfig, make_mesh


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def rows(b=24, d=6):
    rng = np.random.default_rng(0)
    return unit(rng.normal(size=(b, d))), unit(rng.normal(size=(b, d)))


def excluded_pairs(b, ids, groups):
    out = np.zeros((b, b), bool)
    if ids is not None:
        out |= (ids[:, None] == ids[None]) & ~np.eye(b, dtype=bool)
    place = np.arange(b) // (b // groups)
    return out | (place[:, None] != place[None])


def dense_info_nce(a, b, scale, bias, ids=None, groups=1):
    logits = jnp.where(excluded_pairs(len(a), ids, groups), -jnp.inf, scale * a @ b.T)
    match = jnp.diag(logits)
    lse = jax.nn.logsumexp
    return 0.5 * (lse(logits, axis=1) - match) + 0.5 * (lse(logits, axis=0) - match)


def dense_sigmoid(a, b, scale, bias, ids=None, groups=1):
    sign = 2 * np.eye(len(a)) - 1
    pairs = -jax.nn.log_sigmoid(sign * (scale * a @ b.T + bias))
    return jnp.sum(jnp.where(excluded_pairs(len(a), ids, groups), 0.0, pairs), axis=1)


def dense_nt_xent(a, b, scale, bias, ids=None, groups=1):
    excluded, both = excluded_pairs(len(a), None, groups), jnp.concatenate([a, b])
    logits = scale * both @ both.T
    never = np.tile(excluded, (2, 2)) | np.eye(2 * len(a), dtype=bool)
    lse = jax.nn.logsumexp(jnp.where(never, -jnp.inf, logits), axis=1).reshape(2, -1)
    return jnp.mean(lse, axis=0) - scale * jnp.sum(a * b, axis=1)


def info_nce(a, b, scale, bias, **options):
    return losses.info_nce(a, b, scale=scale, **options)


def sigmoid(a, b, scale, bias, **options):
    return losses.sigmoid(a, b, scale=scale, bias=bias, **options)


def nt_xent(a, b, scale, bias, ids=None, **options):  # takes no ids
    return losses.nt_xent(a, b, temperature=1 / scale, **options)


NAMES = ["info_nce", "sigmoid", "nt_xent"]
PAIRS = [(info_nce, dense_info_nce), (sigmoid, dense_sigmoid), (nt_xent, dense_nt_xent)]
IDS = np.arange(24) // 2
# Every mesh, tile size (one with an uneven last tile) and option occurs, but not every combination.
CASES = [
    *itertools.product([None, (8, 1), (4, 2)], [None, 2], [{}]),
    ((1, 2), None, {}),
    ((2, 2), 4, {"ids": IDS}),
    (None, 7, {"ids": IDS, "groups": 2}),
    ((8, 1), 1, {"groups": 3}),
]
LAYOUTS = {
    "assembly": [((1, 2), 5, {}), ((4, 2), None, {"ids": IDS, "groups": 2})],
    "ring": [
        (None, None, {}),
        (None, 7, {"ids": IDS, "groups": 2}),
        ((1, 2), 5, {}),
        ((8, 1), 2, {"groups": 3}),
        ((4, 2), None, {"ids": IDS}),
    ],
}


def grads(fn, shape=None, dtype=np.float64, **options):
    weights = np.random.default_rng(1).normal(size=24)

    def total(a, b, scale, bias):
        return jnp.sum(weights * fn(a, b, scale, bias, **options))

    step = jax.jit(jax.value_and_grad(total, (0, 1, 2, 3)))
    devices = jax.devices()[: np.prod(shape or 1)]
    with jax.set_mesh(make_mesh(MeshConfig(*shape or (1,)), devices)):
        return step(*jax.tree.map(dtype, (*rows(), 14.0, -3.0)))


@pytest.mark.parametrize("form", ["gather", "assembly", "ring"])
@pytest.mark.parametrize("tiled, dense", PAIRS, ids=NAMES)
def test_value_and_gradients_equal_the_dense_twin(tiled, dense, form):
    gathered, expected = CASES[-4:] if tiled is nt_xent else CASES, {}
    with jax.enable_x64(True):
        for shape, chunk, options in gathered if form == "gather" else LAYOUTS[form]:
            got, key = grads(tiled, shape, chunk=chunk, form=form, **options), str(options)
            expected[key] = expected.get(key) or grads(dense, **options)
            for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected[key])):
                np.testing.assert_allclose(x, y, rtol=0, atol=1e-12, err_msg=f"{shape} {chunk}")


@pytest.mark.parametrize("tiled, dense", PAIRS, ids=NAMES)
def test_a_ring_of_float32_equals_the_twin_of_float64(tiled, dense):
    got = grads(tiled, (2, 2), np.float32, chunk=4, form="ring")
    with jax.enable_x64(True):
        expected = grads(dense)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
        assert x.dtype == np.float32
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def arrays(jaxpr):
    """(primitive, size of its output) of every equation of a program."""
    for equation in jaxpr.eqns:
        yield from ((equation.primitive.name, v.aval.size) for v in equation.outvars)
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from arrays(inner)


@pytest.mark.parametrize("loss", [info_nce, sigmoid, nt_xent], ids=NAMES)
def test_a_ring_gathers_nothing_and_holds_no_block(loss):
    """512 rows of width 4 on 8 devices, in tiles of 16 x 16: nothing exceeds rows and gradients."""
    a, programs = jnp.ones((512, 4)), {}
    with jax.set_mesh(make_mesh(MeshConfig(4, 2), jax.devices())):
        for form in ("gather", "ring"):
            each = partial(loss, scale=9.0, bias=0.0, chunk=16, form=form)
            slope = jax.make_jaxpr(jax.grad(lambda a, each=each: each(a, a).sum()))(a)
            programs[form] = list(arrays(slope.jaxpr))
    names, sizes = zip(*programs["ring"])
    assert "all_gather" in dict(programs["gather"]) and "all_gather" not in names
    assert "ppermute" in names and max(sizes) <= 2 * a.size


def test_the_form_suits_the_rows():
    """An unknown form is refused."""

    def picked(b, devices, form=None):
        rows = jax.ShapeDtypeStruct((b, 512), np.float32)
        with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:devices])):
            return pick_form(form, rows)

    assert [picked(b, 1) for b in (512, 32768, 65536)] == ["gather", "gather", "ring"]
    assert [picked(b, 8) for b in (8192, 16384, 32768)] == ["gather", "assembly", "ring"]
    assert picked(64, 1, "ring") == "ring"
    with pytest.raises(ValueError, match="form='rings': expected one of"):  # not the tests' check
        inspect.unwrap(losses.info_nce)(*rows(), scale=1.0, form="rings")


def test_one_direction_alone():
    a, b = (jnp.asarray(x, jnp.float32) for x in rows())
    logits = 5.0 * a @ b.T
    expected = jax.nn.logsumexp(logits, axis=1) - jnp.diag(logits)
    for form in ("gather", "assembly", "ring"):
        got = losses.info_nce(a, b, scale=5.0, symmetric=False, form=form)
        np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("form", ["gather", "ring"])
def test_recall_at_1_counts_ties_as_misses(form):
    a = np.eye(4, dtype=np.float32)
    b, same = a[[0, 1, 3, 2]], np.ones_like(a)
    recall = jax.jit(partial(losses.recall_at_1, form=form, chunk=3), static_argnames="groups")
    np.testing.assert_array_equal(recall(a, b), [1, 1, 0, 0])
    np.testing.assert_array_equal(recall(same, same), np.zeros(4))
    np.testing.assert_array_equal(recall(same, same, groups=4), np.ones(4))
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:4])):
        np.testing.assert_array_equal(recall(a, b), [1, 1, 0, 0])


@pytest.mark.parametrize("form", ["gather", "ring"])
@pytest.mark.parametrize("loss", [info_nce, sigmoid, nt_xent], ids=NAMES)
def test_finite_in_bfloat16_at_scale_100(loss, form):
    a, b = (jnp.asarray(x, jnp.bfloat16) for x in rows())
    same = jnp.broadcast_to(a[:1], a.shape)
    for x, y in ((a, b), (same, same), (a, -a), (a[:1], b[:1])):
        total = jax.value_and_grad(lambda x, y: loss(x, y, 100.0, -10.0, form=form).mean(), (0, 1))
        for leaf in jax.tree.leaves(jax.jit(total)(x, y)):
            assert jnp.all(jnp.isfinite(leaf))
    assert loss(a, b, 100.0, -10.0).dtype == jnp.float32


def test_rows_that_do_not_spread_say_so():
    a = jnp.ones((6, 4))
    with (
        jax.set_mesh(make_mesh(MeshConfig(), jax.devices())),
        pytest.raises(ValueError, match="multiple of 8"),
    ):
        losses.info_nce(a, a, scale=1.0)
    with pytest.raises(ValueError, match="groups=4"):
        losses.info_nce(a, a, scale=1.0, groups=4)


def oracle_rows(r, c, p):
    return unit(np.sin(0.7 * np.arange(r * c).reshape(r, c) + p))


@pytest.mark.parametrize("wide", [True, False], ids=["float64", "float32"])
def test_info_nce_is_protoclips(wide):
    oracle = load_oracle("protoclip")["clip"]
    with jax.enable_x64(wide):
        image, text = (jnp.asarray(oracle_rows(6, 8, p)) for p in (0, 1.3))

        def loss(image, log_scale):
            return losses.info_nce(image, text, scale=jnp.exp(log_scale)).mean()

        value, (d_image, d_scale) = jax.value_and_grad(loss, (0, 1))(image, np.log(1 / 0.07))
        tolerance = 1e-9 if wide else 1e-5
        np.testing.assert_allclose(value, oracle["loss"], rtol=tolerance)
        np.testing.assert_allclose(d_scale, oracle["dL_dlogscale"], rtol=tolerance)
        np.testing.assert_allclose(jnp.abs(d_image).sum(), oracle["sum_abs_dzI"], rtol=tolerance)


def declip(name):
    return load_oracle("declip")[name]


def sines(shape, phase, scale=1.0):
    """The function S of `declip.json`."""
    return (scale * np.sin(phase + 0.7 * np.arange(np.prod(shape)))).reshape(shape)


def test_info_nce_is_declips_pairings():
    """`declip_objective`: four pairings, and the neighbour terms of both views, at scale exp 3.4.
    `clip_info_ce`, which is a loss of logits: rows against the unit vectors."""
    oracle = declip("declip_objective")

    info_nce = jax.jit(losses.info_nce, static_argnames="symmetric")

    def mean(i, t, **options):
        return info_nce(f[i], f[t], scale=np.exp(3.4), **options).mean()

    with jax.enable_x64(True):
        s = [sines((4, 6), 0.1 * i) for i in range(6)]
        f = [unit(np.cos((i + 2) * s[i]) + sines((4, 6), 1.0 + i)) for i in range(6)]
        got = [mean(i, t) for t in (2, 3) for i in (0, 1)]
        np.testing.assert_allclose(got, oracle["pair_losses_I1T_I2T_I1Ta_I2Ta"], rtol=1e-9)
        got = [np.mean([mean(i, n, symmetric=False) for n in (4, 5)]) for i in (0, 1)]
        np.testing.assert_allclose(got, oracle["nn_view1_view2"], rtol=1e-9)
        got = [
            info_nce(sines((4, 4), phase, 3.0), np.eye(4), scale=1.0, symmetric=False)
            for phase in (0.5, 0.6)
        ]
        np.testing.assert_allclose(np.mean(got), declip("clip_info_ce")["loss"], rtol=1e-9)


@pytest.mark.parametrize("wide", [True, False], ids=["float64", "float32"])
def test_nt_xent_is_declips(wide):
    """`nt_xent`"""
    a = unit(sines((3, 5), 0.7) ** 2)
    b = unit(np.cos(3 * sines((3, 5), 0.8)) + sines((3, 5), 0.7))
    with jax.enable_x64(wide):
        got = jax.jit(losses.nt_xent)(jnp.asarray(a), jnp.asarray(b)).mean()
    np.testing.assert_allclose(got, declip("nt_xent")["loss"], rtol=1e-9 if wide else 1e-5)


@pytest.mark.parametrize("wide", [True, False], ids=["float64", "float32"])
def test_the_queue_is_declips(wide):
    """`memory_bank`: the nearest rows, and a queue of 8 after three batches of 3.

    The last batch overflows: two rows are written, one is dropped, and the pointer returns to 0.
    """
    oracle, close = declip("memory_bank"), {"rtol": 0, "atol": 1e-9 if wide else 1e-6}
    with jax.enable_x64(wide):
        bank = unit((np.cos(4 * sines((4, 8), 1.1)) + sines((4, 8), 0.3)).T)
        query = unit(np.cos(2 * sines((3, 4), 1.2)))
        queue, pointer, pointers = jnp.asarray(bank), jnp.int32(0), []
        neighbours = jax.jit(losses.nearest)(jnp.asarray(query), queue)
        enqueue = jax.jit(losses.enqueue)
        np.testing.assert_allclose(neighbours, bank[oracle["nn_index"]], **close)
        np.testing.assert_allclose(neighbours, oracle["nn"], **close)
        for i in range(3):
            queue, pointer = enqueue(queue, pointer, unit(sines((3, 4), 5 + i) ** 3))
            pointers.append(int(pointer))
        assert pointers == oracle["ptr_after_each"] and pointer.dtype == jnp.int32
        np.testing.assert_allclose(queue.T, oracle["final_bank"], **close)


@pytest.mark.parametrize("shape", [None, (8, 1), (4, 2)], ids=str)
def test_nearest_by_cosine_in_one_bank_or_one_for_each_group(shape):
    """Bank rows of any length, one of zeros among them, come back as they are stored."""
    rng = np.random.default_rng(0)
    query, directions = rows()[0], unit(rng.normal(size=(3, 11, 6)))
    directions[:, 4] = 0
    bank = directions * rng.uniform(0.1, 9, (3, 11, 1))
    best = np.argmax(query @ directions.swapaxes(1, 2), axis=2)  # [bank, row]
    of_group = [bank[i // 8, best[i // 8, i]] for i in range(24)]

    def both(query, bank):
        one, grouped = losses.nearest(query, bank[1], chunk=2), losses.nearest(query, bank)
        return jnp.sum(one + grouped), (one, grouped)

    with jax.set_mesh(make_mesh(MeshConfig(*shape or (1,)), jax.devices()[: 8 if shape else 1])):
        step = jax.jit(jax.grad(both, (0, 1), has_aux=True))
        zero, (one, grouped) = step(np.float32(query), np.float32(bank))
    np.testing.assert_array_equal(one, np.float32(bank[1][best[1]]))
    np.testing.assert_array_equal(grouped, np.float32(of_group))
    assert not any(np.any(x) for x in zero)


def test_a_queue_is_replicated_and_each_group_has_its_own():
    new = np.arange(16, dtype=np.float32).reshape(8, 2) + 1
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices())):
        queue, pointer = jax.jit(losses.enqueue)(np.zeros((9, 2), np.float32), jnp.int32(0), new)
        assert queue.sharding.is_fully_replicated and pointer == 8
        np.testing.assert_array_equal(queue, np.concatenate([new, np.zeros((1, 2))]))
        queue, pointer = jax.jit(losses.enqueue)(np.zeros((2, 6, 2)), jnp.int32(2), new)
    np.testing.assert_array_equal(queue[:, 2:].reshape(8, 2), new)
    assert pointer == 0 and not np.any(queue[:, :2])
    with pytest.raises(ValueError, match="3 queues"):
        losses.enqueue(np.zeros((3, 6, 2)), jnp.int32(0), new)
    with pytest.raises(ValueError, match="3 banks"):
        losses.nearest(new, np.zeros((3, 6, 2)))
