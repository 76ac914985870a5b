"""Names of topologies, what is known of their chips, and meshes over devices that are not here."""

import importlib.util

import pytest
from support.tpu import libtpu

from clipx.errors import ConfigError, install_hint
from clipx.parallel import chips
from clipx.parallel.chips import chip
from clipx.parallel.mesh import MeshConfig, make_mesh


@pytest.mark.parametrize(
    "kind, tera",
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", None),
        ("Tesla V100-SXM2-16GB", 125),
        ("Tesla T4", 65),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
        ("cpu", None),
    ],
)
def test_peaks(kind, tera):
    known = chip(kind)
    assert (known and known.tflops) == tera


@pytest.mark.parametrize(
    "name, near",
    [
        ("v5e", "v5e:4x4"),
        ("v5e:4x4x4", "v5e:8x8"),
        ("V5E:16x16", "v5e:16x16"),
        ("v5litepod:4x4", "v5e:4x4"),
        ("v7e:8x8", "v6e:8x8"),
        ("v5p:16x16", "v5p:4x8x8"),
        ("h100:64", "h100:8x8"),
        ("2xh100:8x8", "h100:8x8"),
        ("0xv5e:4x4", "v5e:4x4"),
    ],
)
def test_unknown_names(name, near):
    with pytest.raises(ConfigError) as caught:
        chips.parse(name)
    assert near in caught.value.fix, caught.value


def test_names():
    pod = chips.parse("2xv5e:16x16")
    assert (pod.size, pod.device_kind, pod.gpu) == (512, "TPU v5 lite", False)
    nodes = chips.parse("h100:8x8")
    assert (nodes.size, nodes.gpu, nodes.chip.tflops) == (64, True, 989)


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="no libtpu") as caught:
        chips.parse("v5e:4x4").devices()
    assert caught.value.fix == install_hint("tpu")


@libtpu
@pytest.mark.parametrize("name", ["v4:2x2x1", "v5p:2x2x2", "v6e:2x4", "v5e:1x1"])
def test_one_device_a_chip(name):
    wanted = chips.parse(name)
    devices = wanted.devices()
    assert len(devices) == wanted.size
    assert {d.device_kind for d in devices} == {wanted.device_kind}
    assert make_mesh(MeshConfig(), devices).shape["data"] == wanted.size


@libtpu
def test_layout_of_no_slice():
    with pytest.raises(ConfigError) as caught:
        chips.parse("v5e:3x5").devices()
    assert "v5e:4x4" in caught.value.fix


@libtpu
def test_slices_are_outermost_on_data():
    """What crosses the slow network is the sum of gradients alone."""
    devices = chips.parse("2xv5e:4x4").devices()
    mesh = make_mesh(MeshConfig(data=4, fsdp=4, tensor=2), devices)
    first, second = (
        {d.slice_index for d in half.flat} for half in (mesh.devices[:2], mesh.devices[2:])
    )
    assert first != second and len(first) == len(second) == 1
    with pytest.raises(ConfigError, match="mesh.data"):
        make_mesh(MeshConfig(data=1, fsdp=-1), devices)


@libtpu
def test_mesh_that_is_no_product_of_the_torus():
    mesh = make_mesh(MeshConfig(fsdp=8, tensor=2), chips.parse("v5e:4x4").devices())
    assert dict(mesh.shape) == {"data": 1, "fsdp": 8, "tensor": 2}
