"""The mesh: its sizes, the placing of rows, and the shardings of a state."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from support import tiny

from clipx.config.binding import bind
from clipx.errors import ConfigError
from clipx.models.text import TextTransformer
from clipx.models.vit import ViT
from clipx.objectives.clip import CLIP
from clipx.parallel import mesh as meshes
from clipx.parallel.mesh import (
    MeshConfig,
    batch_sharding,
    describe_whole,
    local_rows,
    make_mesh,
    path_name,
    put,
    put_rows,
    refuse_whole,
    replicated,
    state_shardings,
)
from clipx.training.optimizer import LookaheadConfig, OptimizerConfig, make_optimizer
from clipx.training.step import init_state


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
    ],
)
def test_sizes_that_do_not_fit(config, where, found):
    with pytest.raises(ConfigError) as error:
        make_mesh(config)
    assert error.value.where == f"config.mesh{where}"
    assert found in error.value.found


@pytest.mark.parametrize("key, value", [("tensor", 0), ("data", -2), ("fsdp", 2**31)])
def test_wrong_sizes(key, value):
    with pytest.raises(ConfigError) as error:
        bind(MeshConfig, {key: value}, where="config.mesh")
    assert error.value.where == f"config.mesh.{key}"


def test_rows():
    """Rows are sharded over data and fsdp, in their order, and replicated along `tensor`."""
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
    """A process provides only the rows of its own devices, in ascending order."""
    mesh, asked = make_mesh(MeshConfig(), jax.devices()[:4]), []

    class Held:  # stands for the sharding of a process that owns the last two of four devices
        def addressable_devices_indices_map(self, shape):
            all_devices = batch_sharding(mesh).addressable_devices_indices_map(shape)
            return dict(list(all_devices.items())[:1:-1])

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
    placed = put(tree, replicated(mesh))
    jax.tree.map(np.testing.assert_array_equal, placed, tree)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(placed))


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

    optimizer = make_optimizer(
        OptimizerConfig(lookahead=LookaheadConfig()),
        lambda n: 1.0,
        jax.eval_shape(params)["params"],
    )
    return jax.eval_shape(lambda: init_state(module, optimizer, batch, seed=0))


def specs(tree) -> dict[str, P]:
    leaves = jax.tree.leaves_with_path(tree)
    return {path_name(path): sharding.spec for path, sharding in leaves}


def split(mesh: dict, **towers):
    """Returns, each by path: the specs of the parameters, the specs of the optimizer state, and the
    shapes of the parameters."""
    state = abstract_state(**towers)
    shardings = state_shardings(make_mesh(MeshConfig(**mesh)), state)
    shapes = {path_name(path): x.shape for path, x in jax.tree.leaves_with_path(state.params)}
    return specs(shardings.params), specs(shardings.opt_state), shapes


@pytest.mark.parametrize("pool", ["class", "attention"])
@pytest.mark.parametrize("scan", [False, True])
def test_tensor_splits_attention_and_mlp(scan, pool):
    """Every kernel of attention and MLP is sharded over its heads or its hidden width."""
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
            assert sharded == [sizes[name]], path  # the bias of a sharded kernel
        else:
            assert sharded == [], path
    assert seen == set(sizes) - ({"q", "kv"} if pool == "class" else set())


def test_layers_that_are_stacked_are_not_split():
    """Not even if the layer dimension is the largest divisible one: 48 layers, 16 heads of 104."""
    params = {"image": {"transformer": {"blocks": {"attn": {"qkv": {
        "kernel": jax.ShapeDtypeStruct((48, 1664, 3, 16, 104), jnp.float32),
        "bias": jax.ShapeDtypeStruct((48, 3, 16, 104), jnp.float32),
    }}}}}}  # fmt: skip
    state = abstract_state().replace(params=params, opt_state=())
    kernel, bias = "kernel", "bias"
    for sizes, expected in (
        ({"fsdp": 8}, {kernel: P(None, "fsdp", None, None, None), bias: P(*3 * [None], "fsdp")}),
        ({"fsdp": 4, "tensor": 2},
         {kernel: P(None, "fsdp", None, "tensor", None), bias: P(None, None, "tensor", "fsdp")}),
    ):  # fmt: skip
        found = specs(state_shardings(make_mesh(MeshConfig(**sizes)), state).params)
        assert {path.rpartition("/")[2]: spec for path, spec in found.items()} == expected
    assert meshes.partition_spec("a/blocks/attn/qkv/bias", (48, 3, 16, 104), {"fsdp": 48}) == P(
        *4 * [None]
    )


def refused(sizes: dict, **towers) -> ConfigError:
    config = MeshConfig(**sizes)
    with pytest.raises(ConfigError) as error:
        refuse_whole(config, make_mesh(config), abstract_state(**towers).params)
    return error.value


def test_heads_that_do_not_divide_are_refused():
    error = refused({"tensor": 8}, heads=4)
    assert error.where == "config.mesh.tensor" and error.fix == "config.mesh.tensor=4"
    assert "8, which does not divide 2 x image/transformer/block_*/attn/" in error.found
    fine = MeshConfig(tensor=4)
    refuse_whole(fine, make_mesh(fine), abstract_state(heads=4).params)
    fine, flat = MeshConfig(tensor=2), {"fc": {"kernel": jax.ShapeDtypeStruct((64, 64), "f4")}}
    with pytest.raises(ConfigError, match="no attention heads or MLP in fc/kernel"):
        refuse_whole(fine, make_mesh(fine), flat)


def test_too_much_replication_is_refused():
    """8 divides no dimension of an array with 58 % of the bytes; 4 does. Small ones are ignored."""
    params = {
        "odd": jax.ShapeDtypeStruct((60, 100), jnp.float32),
        "even": jax.ShapeDtypeStruct((64, 65), jnp.float32),
        "small": {f"block_{i}": jax.ShapeDtypeStruct((7,), jnp.float32) for i in range(14)},
    }
    config = MeshConfig(fsdp=8)
    mesh = make_mesh(config)
    with pytest.raises(ConfigError) as error:
        refuse_whole(config, mesh, params)
    assert "leaves 58% of the parameters replicated" in error.value.found
    assert error.value.found.endswith("no dimension of odd [60, 100]")
    assert error.value.fix == "config.mesh.fsdp=4 or config.mesh.max_replicated=0.59"
    refuse_whole(MeshConfig(fsdp=8, max_replicated=0.59), mesh, params)
    refuse_whole(MeshConfig(), make_mesh(MeshConfig()), params)
    config = MeshConfig(fsdp=4)
    refuse_whole(config, make_mesh(config), params)
    (line,) = describe_whole(mesh, params)
    assert "fsdp 8 splits 40.6% of 0.0 MB" in line
    unsplit = "odd [60, 100], 14 x small/block_* [7]"
    assert line.endswith(f"replicated are 15 parameters, 0.0 MB: {unsplit}")
    assert describe_whole(make_mesh(MeshConfig()), params) == []
    for share in (-0.1, 1.1):
        with pytest.raises(ConfigError, match="max_replicated"):
            bind(MeshConfig, {"max_replicated": share})


def test_fsdp_splits_the_largest_dimension():
    """Large arrays are sharded along their largest divisible dimension; others are replicated."""
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
def test_the_optimizer_follows_its_parameters(mesh):
    """Both moments, and the slow weights of Lookahead."""
    params, opt_state, shapes = split({"data": -1, **mesh})
    assert any(any(spec) for spec in params.values())
    for copy in ("mu", "nu", "slow"):
        for path, spec in params.items():
            ((_, copied),) = [x for x in opt_state.items() if x[0].endswith(f"/{copy}/{path}")]
            assert copied == spec


def test_fsdp_gathers_weights_and_no_rows():
    """Activations larger than a weight stay on the device of their rows. So do rows that are looked
    up in a table that is sharded over its vocabulary."""
    text = TextTransformer(vocab_size=256, context=8, eot_id=3, width=32, depth=1, heads=2,
                           embed_dim=8, dtype="float32")  # fmt: skip
    mesh, ids = make_mesh(MeshConfig(fsdp=8, data=1)), jnp.zeros((64, 8), jnp.int32)
    params = jax.eval_shape(text.init, jax.random.key(0), ids)["params"]
    shardings = state_shardings(mesh, abstract_state().replace(params=params, opt_state=())).params
    assert shardings["token_embedding"].spec == P("fsdp", None)

    def pooled(params, ids):
        return text.apply({"params": params}, ids).raw

    with jax.set_mesh(mesh):
        compiled = jax.jit(pooled, in_shardings=(shardings, batch_sharding(mesh))).lower(
            params, ids
        )
        moved = re.findall(r"= (\S+) (?:all-gather|all-reduce)\(", compiled.compile().as_text())
    assert any("[256,32]" in kind for kind in moved)
    assert not [kind for kind in moved if "[64,8" in kind], moved
