"""The laws that every objective keeps; the files in clipx/objectives are the list."""

import dataclasses

import jax
import pytest
from support import laws, tiny

from clipx.ops import photometry
from clipx.ops.photometry import Policy

# what pictures go through before a tower is the same for every method; crops and flips are the
# host's, so policies that differ in those alone stand for each other
DEVICE = {
    dataclasses.replace(policy, scale=(0.9, 1.0), flip=False, mirror_words=False): name
    for name, policy in photometry.POLICIES.items()
}
SLOW = pytest.mark.slow
POLICIES = [f"clip:augmentation={name}" for policy, name in DEVICE.items() if policy != Policy()]


@pytest.mark.parametrize("name", tiny.OBJECTIVES)
def test_topology_and_slices(name):
    laws.check_topology_and_slices(name, "float64", 1e-11)


# float64 is the sharper form; CLIP's towers are those that have rounding of their own
@pytest.mark.parametrize(
    "name", ["clip", *(pytest.param(n, marks=SLOW) for n in tiny.OBJECTIVES if n != "clip")]
)
def test_topology_and_slices_in_float32(name):
    laws.check_topology_and_slices(name, "float32", 1e-5)


@pytest.mark.slow  # CLIP shows that it does with any towers
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("float64", 1e-11)])
@pytest.mark.parametrize("name", ["siglip+towers", "clip_lite+towers"])
def test_topology_and_slices_with_transformers(name, dtype, tolerance):
    laws.check_topology_and_slices(name, dtype, tolerance)
    laws.check_rows(name)
    laws.check_edge(name)


@pytest.mark.slow  # one axis of the two above
@pytest.mark.parametrize("name", tiny.OBJECTIVES)
def test_topology_of_data_alone(name):
    expected = tiny.value_and_grads(name)
    laws.assert_same(tiny.value_and_grads(name, mesh={"data": 8}), expected, 1e-5)


@pytest.mark.slow  # law 3 holds every policy to its rows
@pytest.mark.parametrize("name", POLICIES)
def test_topology_and_slices_of_policies(name):
    expected = tiny.value_and_grads(name)
    got = tiny.value_and_grads(name, mesh={"data": 8}, microbatches=2)
    laws.assert_same(got, expected, 1e-5)


@pytest.mark.parametrize("name", [*tiny.OBJECTIVES, *POLICIES])
def test_rows(name):
    laws.check_rows(name)


@pytest.mark.parametrize("name", tiny.OBJECTIVES)
def test_edge(name):
    laws.check_edge(name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", tiny.OBJECTIVES)
def test_memory(name, dtype):
    """Law 6: the memory that comes out has the structure and shapes of what went in."""
    before = jax.eval_shape(tiny.objective(name).init_memory)
    after = tiny.memory_after(name, dtype)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after)):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
