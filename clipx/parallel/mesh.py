"""The device mesh, and where every array of a run lies on it."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from clipx.errors import ConfigError
from clipx.types import BATCH_AXES, PyTree

AXES = (*BATCH_AXES, "tensor")
SMALL = 2**12  # elements; splitting less than this saves nothing
_STACKED = re.compile(r"(^|/)blocks/")  # by `nn.scan`: the first dimension counts layers
# Which dimension of a parameter the tensor axis splits: attention's heads, the MLP's hidden width.
_TENSOR = (
    (r"(^|/)attn/(qkv|q|kv)/(kernel|bias)$", -2),
    (r"(^|/)attn/out/kernel$", -3),
    (r"(^|/)mlp/fc/(kernel|bias)$", -1),
    (r"(^|/)mlp/proj/kernel$", -2),
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one may be -1, which takes what is left."""

    data: int = -1  # rows
    fsdp: int = 1  # rows, and parameters with their optimizer state
    tensor: int = 1  # attention heads and MLP width
    max_replicated: float = 0.1  # of the parameters' bytes: so much may stay whole over `fsdp`

    def __post_init__(self):
        if not 0 <= self.max_replicated <= 1:
            found = str(self.max_replicated)
            raise ConfigError("MeshConfig.max_replicated", found, "a share in [0, 1]")

    def sizes(self, devices: int) -> dict[str, int]:
        sizes = {name: getattr(self, name) for name in AXES}
        free = [name for name, size in sizes.items() if size == -1]
        known = math.prod(size for size in sizes.values() if size != -1)
        for name, size in sizes.items():
            if size == 0 or size < -1:
                raise ConfigError(f"config.mesh.{name}", str(size), "a positive number, or -1")
        if len(free) > 1:
            raise ConfigError("config.mesh", f"-1 for {' and '.join(free)}", "-1 for one at most")
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


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """A mesh over `devices` (default: all), axes data, fsdp, tensor. Axes are of the automatic
    kind: the partitioner lays out what nobody names."""
    devices = jax.devices() if devices is None else list(devices)
    sizes = config.sizes(len(devices))
    shape = tuple(sizes.values())
    if devices[0].platform == "tpu":  # neighbours on the mesh are neighbours on the wires
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
    """TPUs as a grid, slices outermost along `data`: between them is the slow network."""
    from jax.experimental import mesh_utils

    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if shape[0] % slices:
        raise ConfigError(
            "config.mesh.data",
            f"{shape[0]} for {slices} slices",
            f"a multiple of {slices}: slices share no parameter",
            "mesh.data=-1 takes the devices that are left",
        )
    within = (shape[0] // slices, *shape[1:])
    across = (slices, *(1 for _ in shape[1:]))

    def grid(**options) -> np.ndarray:
        if slices == 1:
            return mesh_utils.create_device_mesh(shape, devices=devices, **options)
        return mesh_utils.create_hybrid_device_mesh(within, across, devices=devices, **options)

    try:
        return grid()
    except NotImplementedError:  # no side of the torus has that length: an axis takes half of one
        return grid(allow_split_physical_axes=True)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the batch axes."""
    return NamedSharding(mesh, PartitionSpec(tuple(a for a in BATCH_AXES if a in mesh.shape)))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def _tensor_axis(path: str, shape: tuple[int, ...]) -> int | None:
    """The dimension that the tensor axis splits, from the end; None for parameters it leaves."""
    for pattern, axis in _TENSOR:
        if re.search(pattern, path) and len(shape) >= -axis:
            return axis
    return None


def partition_spec(path: str, shape: tuple[int, ...], sizes: dict[str, int]) -> PartitionSpec:
    """How a parameter of this path and shape is split over a mesh of these sizes."""
    spec: list[str | None] = [None] * len(shape)
    tensor, fsdp = sizes.get("tensor", 1), sizes.get("fsdp", 1)
    axis = _tensor_axis(path, shape) if tensor > 1 else None
    if axis is not None and shape[axis] % tensor == 0:
        spec[axis] = "tensor"
    if fsdp > 1 and math.prod(shape) >= SMALL:
        # never over layers: each step of the scan would gather the slice it needs from one device
        first = 1 if _STACKED.search(path) else 0
        free = [i for i in range(first, len(shape)) if spec[i] is None and shape[i] % fsdp == 0]
        if free:
            spec[max(free, key=lambda i: shape[i])] = "fsdp"
    return PartitionSpec(*spec)


def state_shardings(mesh: Mesh, state: PyTree) -> PyTree:
    """A sharding for every leaf of an abstract `TrainState`.

    Parameters and the optimizer's copies of them are split over `tensor` by name and over `fsdp`
    along the largest dimension that divides, but that of stacked layers; what is small or does not
    divide is replicated.
    """
    sizes = dict(mesh.shape)

    def leaf(path, x):
        return NamedSharding(mesh, partition_spec(path_name(path), x.shape, sizes))

    split = jax.tree_util.tree_map_with_path(
        leaf, {"params": state.params, "opt_state": state.opt_state}
    )
    whole = jax.tree.map(lambda _: replicated(mesh), state)
    return whole.replace(**split)


def bytes_whole(tree: PyTree) -> int:
    """Bytes of a tree's arrays, abstract ones too, wherever their parts lie."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def bytes_held(tree: PyTree) -> int:
    """Bytes on one device of an abstract tree's arrays, which say how they are sharded."""

    def part(x):
        return jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype)

    return bytes_whole(jax.tree.map(part, tree))


def _whole(sizes: dict[str, int], axis: str, params: PyTree) -> dict[str, Any]:
    """The parameters that `axis` does not split, by path, largest first."""
    named = [(path_name(path), x) for path, x in jax.tree.leaves_with_path(params)]
    found = [(path, x) for path, x in named if axis not in partition_spec(path, x.shape, sizes)]
    return dict(sorted(found, key=lambda item: -bytes_whole(item[1])))


def _listed(leaves: dict[str, Any], most: int = 4) -> str:
    """The first of them and their shapes; blocks that are alike as one."""
    alike = collections.Counter(
        f"{re.sub(r'block_[0-9]+', 'block_*', path)} {list(x.shape)}" for path, x in leaves.items()
    )
    first = [f"{n} x {name}" if n > 1 else name for name, n in list(alike.items())[:most]]
    return ", ".join(first) + ("" if len(alike) <= most else ", ...")


def describe_whole(mesh: Mesh, params: PyTree) -> list[str]:
    """A line for `fsdp` and for `tensor`, where the mesh has them: how much of the parameters it
    splits, and what stays whole, the largest by name."""
    total, lines = bytes_whole(params), []
    for axis in ("fsdp", "tensor"):
        if mesh.shape[axis] > 1:
            whole = _whole(dict(mesh.shape), axis, params)
            size = bytes_whole(whole)
            lines.append(
                f"{axis} {mesh.shape[axis]} splits {1 - size / total:.1%} of {total / 1e6:,.1f} MB "
                f"of parameters; whole stay {len(whole)} of them, {size / 1e6:,.1f} MB: "
                + _listed(whole)
            )
    return lines


def refuse_whole(config: MeshConfig, mesh: Mesh, params: PyTree) -> None:
    """Raises `ConfigError` for heads and widths that `tensor` cannot split, for a `tensor` that
    splits nothing, and where parameters too large to overlook stay whole over `fsdp`."""
    sizes = dict(mesh.shape)
    named = {path_name(path): x for path, x in jax.tree.leaves_with_path(params)}
    if (tensor := sizes["tensor"]) > 1:
        axes = {path: _tensor_axis(path, x.shape) for path, x in named.items()}
        lengths = {path: named[path].shape[i] for path, i in axes.items() if i is not None}
        odd = {path: named[path] for path, length in lengths.items() if length % tensor}
        fits = math.gcd(tensor, *lengths.values())
        if odd or not lengths:
            raise ConfigError(
                "config.mesh.tensor",
                f"{tensor}, which does not divide {_listed(odd)}"
                if odd
                else f"{tensor}, and no attention heads or MLP in {_listed(named)}",
                "a number that divides the heads and the MLP widths of both towers",
                f"config.mesh.tensor={fits if lengths else 1}",
            )
    if (fsdp := sizes["fsdp"]) > 1:
        total = bytes_whole(named)

        def large(fsdp):
            whole = _whole(sizes | {"fsdp": fsdp}, "fsdp", params)
            whole = {path: x for path, x in whole.items() if math.prod(x.shape) >= SMALL}
            return whole, bytes_whole(whole) / max(total, 1)

        whole, share = large(fsdp)
        if share > config.max_replicated:
            less = [n for n in range(fsdp - 1, 1, -1) if fsdp % n == 0]
            less = [n for n in less if large(n)[1] <= config.max_replicated][:1]
            fixes = [f"config.mesh.fsdp={n}" for n in less]
            fixes.append(f"config.mesh.max_replicated={math.ceil(share * 100) / 100}")
            raise ConfigError(
                "config.mesh.fsdp",
                f"{fsdp}, which leaves {share:.0%} of the parameters whole on every device, as it "
                f"divides no dimension of {_listed(whole)}",
                f"at most {config.max_replicated:.0%} (config.mesh.max_replicated)",
                " or ".join(fixes),
            )


def path_name(path) -> str:
    """`image/block_0/qkv/kernel` for a key path of a parameter tree."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def put(tree: PyTree, sharding: NamedSharding) -> PyTree:
    """Global arrays from NumPy arrays that every process holds whole."""

    def leaf(x):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(leaf, tree)


def put_parts(tree: PyTree, shardings: PyTree) -> PyTree:
    """`put` of the parts of a tree that are there, as the shardings of the whole one say."""
    if isinstance(tree, Mapping):
        return {key: put_parts(part, shardings[key]) for key, part in tree.items()}
    return put(tree, shardings)


def local_rows(sharding: NamedSharding, rows: int) -> np.ndarray:
    """Which of `rows` global rows this process's devices hold, ascending."""
    index = sharding.addressable_devices_indices_map((rows,))
    return np.unique(np.concatenate([np.arange(rows)[i] for i in index.values()]))


def put_rows(tree: PyTree, sharding: NamedSharding, held: np.ndarray, rows: int) -> PyTree:
    """Global arrays of `rows` rows from NumPy arrays of the rows `held` by this process."""

    def leaf(x):
        def piece(index):
            wanted = np.arange(rows)[index[0]]
            return x[np.searchsorted(held, wanted)]

        return jax.make_array_from_callback((rows, *x.shape[1:]), sharding, piece)

    return jax.tree.map(leaf, tree)
