"""The device mesh, and how every array of a run is sharded over it."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from clipx.config.ranges import Fraction, Range
from clipx.errors import ConfigError
from clipx.types import BATCH_AXES, PyTree

AXES = (*BATCH_AXES, "tensor")
SMALL = 2**12  # elements; sharding a smaller parameter saves nothing
_STACKED = re.compile(r"(^|/)blocks/")  # by `nn.scan`: the first dimension is the layer
# The dimension of a parameter that the tensor axis shards: attention heads, or MLP hidden width.
_TENSOR = (
    (r"(^|/)attn/(qkv|q|kv)/(kernel|bias|lora_b)$", -2),
    (r"(^|/)attn/out/(kernel|lora_a)$", -3),
    (r"(^|/)mlp/fc/(kernel|bias|lora_b)$", -1),
    (r"(^|/)mlp/proj/(kernel|lora_a)$", -2),
)

AxisSize = Annotated[int, Range(1, 2**20, also=(-1,))]


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis. One may be -1: it takes the devices that are left."""

    data: AxisSize = -1  # rows
    fsdp: AxisSize = 1  # rows; also parameters and their optimizer state
    tensor: AxisSize = 1  # attention heads and MLP width
    # share of the parameters' bytes that `fsdp` may leave replicated
    max_replicated: Fraction = 0.1

    def sizes(self, devices: int) -> dict[str, int]:
        """The length of each axis over so many devices. Raises `ConfigError` if they do not fit."""
        sizes = {name: getattr(self, name) for name in AXES}
        free = [name for name, size in sizes.items() if size == -1]
        known = math.prod(size for size in sizes.values() if size != -1)
        if len(free) > 1:
            raise ConfigError(
                "config.mesh", f"-1 for {' and '.join(free)}", "-1 for at most one axis"
            )
        if free and devices % known == 0:
            sizes[free[0]] = devices // known
        if math.prod(sizes.values()) != devices or (free and devices % known):
            raise ConfigError(
                "config.mesh",
                f"{', '.join(f'{name} {getattr(self, name)}' for name in AXES)} for {devices} "
                "device(s)",
                f"sizes whose product is {devices}",
                "mesh.data=-1 takes the devices that are left",
            )
        return sizes


def make_mesh(config: MeshConfig, devices: Iterable[Any] | None = None) -> Mesh:
    """A mesh over `devices` (default: all) with axes data, fsdp and tensor. All axes are of type
    Auto: the partitioner chooses the sharding of every array that has none specified."""
    devices = jax.devices() if devices is None else list(devices)
    sizes = config.sizes(len(devices))
    shape = tuple(sizes.values())
    if devices[0].platform == "tpu":  # neighbours in the mesh are then neighbours on the torus
        grid = _torus(shape, devices)
    else:
        grid = np.asarray(devices).reshape(shape)
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def active_axes() -> tuple[list, dict[str, int]] | None:
    """Devices and axis sizes of the mesh that `jax.set_mesh` has set; None if none is set. Raises
    `ConfigError` for axes that clipx does not know."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return None
    if unknown := set(mesh.shape) - set(AXES):
        raise ConfigError(
            "jax.set_mesh",
            f"axes {', '.join(sorted(unknown))}",
            f"axes among {', '.join(AXES)}",
            "set a mesh of these axes, or load outside of jax.set_mesh",
        )
    return list(mesh.devices.flat), {"data": 1, **mesh.shape}


def _torus(shape: tuple[int, ...], devices: list) -> np.ndarray:
    """TPUs as a grid. Slices are outermost along `data`: the network between them is slow."""
    from jax.experimental import mesh_utils

    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if shape[0] % slices:
        raise ConfigError(
            "config.mesh.data",
            f"{shape[0]} for {slices} slices",
            f"a multiple of {slices}: parameters are not sharded across slices",
            "mesh.data=-1 takes the devices that are left",
        )
    within = (shape[0] // slices, *shape[1:])
    across = (slices, *(1 for _ in shape[1:]))

    def grid(**options: Any) -> np.ndarray:
        if slices == 1:
            return mesh_utils.create_device_mesh(shape, devices=devices, **options)
        return mesh_utils.create_hybrid_device_mesh(within, across, devices=devices, **options)

    try:
        return grid()
    except NotImplementedError:  # no side of the torus has that length: let axes share a side
        return grid(allow_split_physical_axes=True)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: rows over the batch axes."""
    return NamedSharding(mesh, PartitionSpec(tuple(a for a in BATCH_AXES if a in mesh.shape)))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def _tensor_axis(path: str, shape: tuple[int, ...]) -> int | None:
    """The dimension that the tensor axis shards, counted from the end (negative); None for a
    parameter that it does not shard."""
    for pattern, axis in _TENSOR:
        if re.search(pattern, path) and len(shape) >= -axis:
            return axis
    return None


def partition_spec(path: str, shape: tuple[int, ...], sizes: dict[str, int]) -> PartitionSpec:
    """How a parameter with this path and shape is sharded over a mesh with axes of these sizes."""
    spec: list[str | None] = [None] * len(shape)
    tensor, fsdp = sizes.get("tensor", 1), sizes.get("fsdp", 1)
    axis = _tensor_axis(path, shape) if tensor > 1 else None
    if axis is not None and shape[axis] % tensor == 0:
        spec[axis] = "tensor"
    if fsdp > 1 and math.prod(shape) >= SMALL:
        # not over layers: each step of the scan would fetch its layer from a single device
        first = 1 if _STACKED.search(path) else 0
        free = [i for i in range(first, len(shape)) if spec[i] is None and shape[i] % fsdp == 0]
        if free:
            spec[max(free, key=lambda i: shape[i])] = "fsdp"
    return PartitionSpec(*spec)


def state_shardings(mesh: Mesh, state: PyTree) -> PyTree:
    """A sharding for every leaf of an abstract `TrainState`.

    Parameters, and the optimizer's copies of them such as moments, are sharded over `tensor` by
    their name, and over `fsdp` along their largest divisible dimension, except the dimension of
    stacked layers. Small and indivisible arrays, and the rest of the state, are replicated.
    """
    sizes = dict(mesh.shape)

    def leaf(path: jax.tree_util.KeyPath, x: jax.ShapeDtypeStruct) -> NamedSharding:
        return NamedSharding(mesh, partition_spec(path_name(path), x.shape, sizes))

    split = jax.tree_util.tree_map_with_path(
        leaf, {"params": state.params, "opt_state": state.opt_state}
    )
    all_replicated = jax.tree.map(lambda _: replicated(mesh), state)
    return all_replicated.replace(**split)


def bytes_whole(tree: PyTree) -> int:
    """Bytes of a tree's arrays, abstract ones too, counted once over all devices."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def bytes_held(tree: PyTree) -> int:
    """Bytes on one device of a tree's arrays, by the shardings that they carry."""

    def shard(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype)

    return bytes_whole(jax.tree.map(shard, tree))


def _unsplit(sizes: dict[str, int], axis: str, params: PyTree) -> dict[str, Any]:
    """The parameters that `axis` does not shard, by path, largest first."""
    named = [(path_name(path), x) for path, x in jax.tree.leaves_with_path(params)]
    unsplit = [(path, x) for path, x in named if axis not in partition_spec(path, x.shape, sizes)]
    return dict(sorted(unsplit, key=lambda item: -bytes_whole(item[1])))


def _listed(leaves: dict[str, Any], most: int = 4) -> str:
    """Names and shapes of the first leaves, for a message; like blocks are counted as one."""
    alike = collections.Counter(
        f"{re.sub(r'block_[0-9]+', 'block_*', path)} {list(x.shape)}" for path, x in leaves.items()
    )
    first = [f"{n} x {name}" if n > 1 else name for name, n in list(alike.items())[:most]]
    return ", ".join(first) + ("" if len(alike) <= most else ", ...")


def describe_whole(mesh: Mesh, params: PyTree) -> list[str]:
    """One line each for the `fsdp` and `tensor` axes that are longer than 1: how much of the
    parameters the axis shards, and the largest parameters that it leaves replicated."""
    total, lines = bytes_whole(params), []
    for axis in ("fsdp", "tensor"):
        if mesh.shape[axis] > 1:
            unsplit = _unsplit(dict(mesh.shape), axis, params)
            size = bytes_whole(unsplit)
            lines.append(
                f"{axis} {mesh.shape[axis]} splits {1 - size / total:.1%} of {total / 1e6:,.1f} MB "
                f"of parameters; replicated are {len(unsplit)} parameters, {size / 1e6:,.1f} MB: "
                + _listed(unsplit)
            )
    return lines


def refuse_whole(config: MeshConfig, mesh: Mesh, params: PyTree) -> None:
    """Raises `ConfigError` for heads or widths that `tensor` does not divide, for a `tensor` that
    shards nothing, and if `fsdp` leaves more than `max_replicated` of the parameters replicated."""
    sizes = dict(mesh.shape)
    named = {path_name(path): x for path, x in jax.tree.leaves_with_path(params)}
    if (tensor := sizes["tensor"]) > 1:
        axes = {path: _tensor_axis(path, x.shape) for path, x in named.items()}
        lengths = {path: named[path].shape[i] for path, i in axes.items() if i is not None}
        indivisible = {path: named[path] for path, length in lengths.items() if length % tensor}
        fits = math.gcd(tensor, *lengths.values())
        if indivisible or not lengths:
            raise ConfigError(
                "config.mesh.tensor",
                f"{tensor}, which does not divide {_listed(indivisible)}"
                if indivisible
                else f"{tensor}, and no attention heads or MLP in {_listed(named)}",
                "a number that divides the heads and the MLP widths of both towers",
                f"config.mesh.tensor={fits if lengths else 1}",
            )
    if (fsdp := sizes["fsdp"]) > 1:
        total = bytes_whole(named)

        def large_unsplit(fsdp: int) -> tuple[dict[str, Any], float]:
            """The large parameters that `fsdp` does not shard, and their share of all bytes."""
            unsplit = _unsplit(sizes | {"fsdp": fsdp}, "fsdp", params)
            large = {path: x for path, x in unsplit.items() if math.prod(x.shape) >= SMALL}
            return large, bytes_whole(large) / max(total, 1)

        unsplit, share = large_unsplit(fsdp)
        if share > config.max_replicated:
            divisors = [n for n in range(fsdp - 1, 1, -1) if fsdp % n == 0]
            fitting = [n for n in divisors if large_unsplit(n)[1] <= config.max_replicated]
            fixes = [f"config.mesh.fsdp={n}" for n in fitting[:1]]
            fixes.append(f"config.mesh.max_replicated={math.ceil(share * 100) / 100}")
            raise ConfigError(
                "config.mesh.fsdp",
                f"{fsdp}, which leaves {share:.0%} of the parameters replicated, because it "
                f"divides no dimension of {_listed(unsplit)}",
                f"at most {config.max_replicated:.0%} (config.mesh.max_replicated)",
                " or ".join(fixes),
            )


def path_name(path: jax.tree_util.KeyPath) -> str:
    """`image/block_0/qkv/kernel` for a key path of a parameter tree."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def put(tree: PyTree, sharding: NamedSharding) -> PyTree:
    """Global arrays from NumPy arrays of which every process holds a complete copy."""

    def leaf(x: Any) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(leaf, tree)


def put_parts(tree: PyTree, shardings: PyTree) -> PyTree:
    """`put` for nested dictionaries. `shardings` may have more keys than `tree`."""
    if isinstance(tree, Mapping):
        return {key: put_parts(value, shardings[key]) for key, value in tree.items()}
    return put(tree, shardings)


def local_rows(sharding: NamedSharding, rows: int) -> np.ndarray:
    """The numbers, ascending, of those of `rows` global rows that this process's devices hold."""
    index = sharding.addressable_devices_indices_map((rows,))
    return np.unique(np.concatenate([np.arange(rows)[i] for i in index.values()]))


def put_rows(tree: PyTree, sharding: NamedSharding, held: np.ndarray, rows: int) -> PyTree:
    """Global arrays of `rows` rows. Each process passes NumPy arrays of its own rows, whose global
    numbers are `held` (see `local_rows`)."""

    def leaf(x: np.ndarray) -> jax.Array:
        def piece(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[0].indices(rows)
            first = np.searchsorted(held, start)
            return x[first : first + stop - start]  # not a copy: all rows of a device are held

        return jax.make_array_from_callback((rows, *x.shape[1:]), sharding, piece)

    return jax.tree.map(leaf, tree)
