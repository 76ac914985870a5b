"""The forms for one CPU device are the plain ones, and their work grows as a stack does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from clipx.models import cpu
from clipx.models.transformer import Transformer


def drawn(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def agree(ours, plain, x, kernel):
    def both(fn):
        out, pull = jax.vjp(fn, x, kernel)
        return out, *pull(jnp.cos(out))

    for mine, theirs in zip(both(ours), both(plain)):
        np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("shape", "kernel", "inputs"),
    [
        ((5, 7, 6), (6, 2, 3), 1),
        ((5, 7, 2, 3), (2, 3, 4), 2),
        ((6,), (6, 3), 1),
    ],
)
def test_product(shape, kernel, inputs):
    x, kernel = drawn(shape, kernel)
    agree(
        lambda x, k: cpu.product(x, k, inputs), lambda x, k: jnp.tensordot(x, k, inputs), x, kernel
    )


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("size", "padding"), [((1, 1), 0), ((3, 3), 1), ((2, 3), ((0, 2), (1, 0)))]
)
def test_convolution(size, padding, stride):
    x, kernel = drawn((2, 5, 6, 3), (*size, 3, 4))
    layers = [
        nn.Conv(4, size, stride, padding=padding, use_bias=False, conv_general_dilated=form)
        for form in (cpu.convolution, None)
    ]
    agree(*(lambda x, k, of=of: of.apply({"params": {"kernel": k}}, x) for of in layers), x, kernel)


def test_what_is_held_is_the_same_whatever_it_holds():
    x = jnp.array([jnp.nan, jnp.inf, -jnp.inf, 0.0, -1e30, 3.0])
    for first in range(len(x)):
        rolled = jnp.roll(x, first)
        np.testing.assert_array_equal(jax.jit(cpu.hold)(rolled), rolled)
    assert cpu.hold(jnp.zeros((0, 3))).shape == (0, 3)
    assert cpu.hold(jnp.ones(3, jnp.bfloat16)).dtype == jnp.bfloat16


def test_the_work_of_a_stack_grows_with_its_depth():
    def flops(depth):
        tower = Transformer(depth=depth, heads=2, mlp_width=32)
        (x,) = drawn((4, 9, 16))
        params = jax.eval_shape(tower.init, jax.random.key(0), x)
        gradient = jax.grad(lambda params, x: jnp.sum(tower.apply(params, x) ** 2))
        return jax.jit(gradient).lower(params, x).compile().cost_analysis()["flops"]

    first, second = flops(3), flops(6)
    assert second / first < 2.05  # 2.01; 2.15 where blocks compute each other's sums again


def test_a_policy_saves_these_products_as_others():
    def saved(form):
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        block = jax.checkpoint(lambda x, k: jnp.sin(form(jnp.sin(x), k)), policy=policy)
        return jax.make_jaxpr(jax.grad(lambda x, k: block(x, k).sum(), (0, 1)))(
            *drawn((3, 4), (4, 5))
        )

    count = [str(saved(form)).count("dot_general") for form in (cpu.product, jnp.dot)]
    assert count[0] == count[1]
