"""The laws, for every objective. The list of objectives is the files in clipx/objectives."""

import dataclasses

import jax
import pytest
from support import laws, tiny

from clipx.ops import photometry
from clipx.ops.photometry import Policy

# Photometry on the device is the same code for every method, so one method tests it. Crops and
# flips happen on the host, so one of several policies that differ only in them is enough.
DEVICE = {
    dataclasses.replace(policy, scale=(0.9, 1.0), flip=False, mirror_words=False): name
    for name, policy in photometry.POLICIES.items()
}
SLOW = pytest.mark.slow
POLICIES = [f"clip:augmentation={name}" for policy, name in DEVICE.items() if policy != Policy()]


@pytest.mark.parametrize("name", tiny.OBJECTIVES)
def test_topology_and_slices(name):
    laws.check_topology_and_slices(name, "float64", 1e-11)


# float64 is the sharper form; two processes are held to 1e-5 in float32 in tests/parallel
@pytest.mark.slow
@pytest.mark.parametrize("name", tiny.OBJECTIVES)
def test_topology_and_slices_in_float32(name):
    laws.check_topology_and_slices(name, "float32", 1e-5)


@pytest.mark.slow  # CLIP shows that it does with any towers
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("float64", 1e-11)])
@pytest.mark.parametrize("name", ["siglip+towers", "clip_lite+towers"])
def test_topology_and_slices_with_transformers(name, dtype, tolerance):
    laws.check_topology_and_slices(name, dtype, tolerance)
    laws.check_rows(name)
    laws.check_edge(name)


@pytest.mark.slow  # one of the two axes that the test above covers
@pytest.mark.parametrize("name", tiny.OBJECTIVES)
def test_topology_of_data_alone(name):
    expected = tiny.value_and_grads(name)
    laws.assert_same(tiny.value_and_grads(name, mesh={"data": 8}), expected, 1e-5)


@pytest.mark.slow  # `test_rows` covers every policy
@pytest.mark.parametrize("name", POLICIES)
def test_topology_and_slices_of_policies(name):
    expected = tiny.value_and_grads(name)
    got = tiny.value_and_grads(name, mesh={"data": 8}, microbatches=2)
    laws.assert_same(got, expected, 1e-5)


@pytest.mark.parametrize(
    "name", [*tiny.OBJECTIVES, *(pytest.param(n, marks=SLOW) for n in POLICIES[1:]), POLICIES[0]]
)
def test_rows(name):
    laws.check_rows(name)


@pytest.mark.parametrize("name", tiny.OBJECTIVES)
def test_edge(name):
    laws.check_edge(name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", tiny.OBJECTIVES)
def test_memory(name, dtype):
    """Law 6: the memory after a step has the structure and shapes of the memory before it."""
    before = jax.eval_shape(tiny.objective(name).init_memory)
    after = tiny.memory_after(name, dtype)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after)):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
