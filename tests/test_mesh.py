"""Where arrays lie: sizes of the mesh, rows, and the shardings of a state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from clipx import mesh as meshes
from clipx.config import ConfigError
from clipx.mesh import (
    MeshConfig,
    batch_sharding,
    local_rows,
    make_mesh,
    path_name,
    put,
    put_rows,
    replicated,
    state_shardings,
)
from clipx.models.text import TextTransformer
from clipx.models.vit import ViT
from clipx.objectives.clip import CLIP
from clipx.optimizer import OptimizerConfig, make_optimizer
from clipx.step import init_state


@pytest.mark.parametrize(
    "config, sizes",
    [
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(fsdp=2), (4, 2, 1)),
        (MeshConfig(data=2, fsdp=-1), (2, 4, 1)),
        (MeshConfig(data=1, fsdp=2, tensor=-1), (1, 2, 4)),
        (MeshConfig(data=2, fsdp=2, tensor=2), (2, 2, 2)),
    ],
)
def test_sizes(config, sizes):
    mesh = make_mesh(config)
    assert tuple(mesh.shape.items()) == tuple(zip(("data", "fsdp", "tensor"), sizes))
    assert list(mesh.devices.flat) == jax.devices()


@pytest.mark.parametrize(
    "config, where, found",
    [
        (MeshConfig(data=3), "", "8 device(s)"),
        (MeshConfig(fsdp=3), "", "8 device(s)"),
        (MeshConfig(data=2), "", "8 device(s)"),
        (MeshConfig(data=16), "", "8 device(s)"),
        (MeshConfig(fsdp=-1), "", "-1 for data and fsdp"),
        (MeshConfig(tensor=0), ".tensor", "0"),
        (MeshConfig(data=-2), ".data", "-2"),
    ],
)
def test_wrong_sizes(config, where, found):
    with pytest.raises(ConfigError) as error:
        make_mesh(config)
    assert error.value.where == f"config.mesh{where}"
    assert found in error.value.found


def test_rows():
    """Rows come to lie over data and fsdp, in their order, and whole along `tensor`."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    sharding = batch_sharding(mesh)
    rows = {"image": np.arange(24).reshape(8, 3), "row": np.arange(8)}
    held = local_rows(sharding, 8)
    np.testing.assert_array_equal(held, np.arange(8))
    placed = put_rows(rows, sharding, held, 8)
    for name, x in placed.items():
        assert x.sharding == sharding
        np.testing.assert_array_equal(x, rows[name])
    pieces = [
        (s.index[0].start, list(np.asarray(s.data))) for s in placed["row"].addressable_shards
    ]
    assert sorted(pieces) == sorted(2 * [(start, [start, start + 1]) for start in (0, 2, 4, 6)])


def test_rows_of_a_process_that_holds_some():
    """A process gives the rows of its own devices only, in ascending order."""
    mesh, asked = make_mesh(MeshConfig(), jax.devices()[:4]), []

    class Held:  # stands for the sharding of a process that owns the last two of four devices
        def addressable_devices_indices_map(self, shape):
            whole = batch_sharding(mesh).addressable_devices_indices_map(shape)
            return dict(list(whole.items())[:1:-1])

    np.testing.assert_array_equal(local_rows(Held(), 8), [4, 5, 6, 7])
    held, rows = np.array([4, 5, 6, 7]), np.arange(40, 48)

    def take(shape, sharding, piece):
        asked.append((shape, piece((slice(6, 8),))))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "make_array_from_callback", take)
        put_rows({"row": rows[held]}, batch_sharding(mesh), held, 8)
    ((shape, piece),) = asked
    assert shape == (8,)
    np.testing.assert_array_equal(piece, [46, 47])


def test_put():
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    tree = {"a": np.arange(16.0), "b": np.float32(3)}
    whole = put(tree, replicated(mesh))
    jax.tree.map(np.testing.assert_array_equal, whole, tree)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(whole))


def objective(heads=4, scan=False, pool="class"):
    towers = {"width": 32, "depth": 2, "heads": heads, "embed_dim": 8, "dtype": "float32"}
    image = ViT(image_size=16, patch=8, scan=scan, pool=pool, **towers)
    return CLIP(image=image, text=TextTransformer(vocab_size=64, context=8, eot_id=3, **towers))


@functools.cache
def abstract_state(**towers):
    module = objective(**towers)
    batch = tiny.batch(module, rows=8)

    def params():
        return module.init(jax.random.key(0), batch, jax.random.split(jax.random.key(0), 8), {})

    optimizer = make_optimizer(OptimizerConfig(), lambda n: 1.0, jax.eval_shape(params)["params"])
    return jax.eval_shape(lambda: init_state(module, optimizer, batch, seed=0))


def specs(tree) -> dict[str, P]:
    leaves = jax.tree.leaves_with_path(tree)
    return {path_name(path): sharding.spec for path, sharding in leaves}


def split(mesh: dict, **towers):
    """The specs of parameters and of the optimizer state, by path, and the parameters' shapes."""
    state = abstract_state(**towers)
    shardings = state_shardings(make_mesh(MeshConfig(**mesh)), state)
    shapes = {path_name(path): x.shape for path, x in jax.tree.leaves_with_path(state.params)}
    return specs(shardings.params), specs(shardings.opt_state), shapes


@pytest.mark.parametrize("pool", ["class", "attention"])
@pytest.mark.parametrize("scan", [False, True])
def test_tensor_splits_attention_and_mlp(scan, pool):
    """Every kernel of attention and MLP is split over its heads or its hidden width."""
    params, _, shapes = split({"data": -1, "tensor": 4}, scan=scan, pool=pool)
    sizes = {"qkv": 4, "q": 4, "kv": 4, "out": 4, "fc": 128, "proj": 128}
    seen = set()
    for path, spec in params.items():
        *_, part, name, kind = ["", "", *path.split("/")]
        sharded = [shapes[path][i] for i, axis in enumerate(spec) if axis == "tensor"]
        if part in ("attn", "mlp") and kind == "kernel":
            assert sharded == [sizes[name]], path
            seen.add(name)
        elif part in ("attn", "mlp") and name in ("qkv", "q", "kv", "fc"):
            assert sharded == [sizes[name]], path  # the bias of what is split
        else:
            assert sharded == [], path
    assert seen == set(sizes) - ({"q", "kv"} if pool == "class" else set())


def test_heads_that_do_not_divide_stay_whole():
    params, _, _ = split({"data": -1, "tensor": 8}, heads=4)
    assert {"tensor"} == {a for p, s in params.items() if "/mlp/" in p for a in s if a}
    assert not [p for p, s in params.items() if "/attn/" in p and "tensor" in s]


def test_fsdp_splits_the_largest_dimension():
    """What is large is split along the largest dimension that divides; the rest lies whole."""
    params, opt_state, shapes = split({"data": 2, "fsdp": 4})
    large = 0
    for path, spec in params.items():
        shape = shapes[path]
        axes = [i for i, axis in enumerate(spec) if axis is not None]
        if np.prod(shape) < 2**12:
            assert axes == [], path
            continue
        large += 1
        ((axis,), size) = axes, max(x for x in shape if x % 4 == 0)
        assert spec[axis] == "fsdp" and shape[axis] == size, path
    assert large >= 4
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    odd = {
        "a": jax.ShapeDtypeStruct((4096, 6), jnp.float32),
        "b": jax.ShapeDtypeStruct((4097,), "f4"),
    }
    state = abstract_state().replace(params=odd, opt_state=(), memory=odd)
    assert specs(state_shardings(mesh, state).params) == {"a": P("fsdp", None), "b": P(None)}
    assert set(specs(state_shardings(mesh, state).memory).values()) == {P()}


@pytest.mark.parametrize("mesh", [{"fsdp": 4}, {"tensor": 4}, {"fsdp": 2, "tensor": 2}])
def test_moments_follow_their_parameters(mesh):
    params, opt_state, shapes = split({"data": -1, **mesh})
    assert any(any(spec) for spec in params.values())
    for moment in ("mu", "nu"):
        for path, spec in params.items():
            ((_, own),) = [x for x in opt_state.items() if x[0].endswith(f"/{moment}/{path}")]
            assert own == spec


def test_sharded_parameters_change_nothing(monkeypatch):
    """Loss and gradients with parameters over fsdp and tensor equal those of one device."""
    monkeypatch.setattr(meshes, "_SMALL", 1)
    name = "clip"
    expected = tiny.value_and_grads(name)
    sizes = {"data": 2, "fsdp": 2, "tensor": 2}
    params = tiny.variables(name)["params"]
    state = abstract_state().replace(params=params, opt_state=())
    shardings = state_shardings(make_mesh(MeshConfig(**sizes)), state).params
    used = {axis for spec in specs(shardings).values() for axis in spec}
    assert used == {None, "fsdp", "tensor"}
    got = tiny.value_and_grads(name, mesh=sizes, params=jax.device_put(params, shardings))
    for (path, x), y in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected)):
        bound = 1e-5 * max(1.0, np.abs(y).max(initial=0.0))
        np.testing.assert_allclose(x, y, rtol=0, atol=bound, err_msg=jax.tree_util.keystr(path))
