"""Memory and cycles of the losses alone, for `python -m clipx.plan --losses`: value and gradient,
compiled for TPUs that this machine does not have, in clipx's forms and in plain formulations.

Memory is the peak of one device, rows and gradients included. Cycles are the compiler's estimates
with loops multiplied out and collectives left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from clipx import losses
from clipx.errors import OutOfMemory
from clipx.losses.forms import Form, pick_form
from clipx.parallel import chips, mesh
from clipx.planning import hlo
from clipx.planning.estimate import compile_ahead
from clipx.types import constrain_rows

TOPOLOGIES = ("v5e:4x4", "v5e:4x8", "v5e:16x16")
BATCHES = (32_768, 1_048_576)
WIDTH = 512


# a loss of rows a and b, a scale and a bias, a value per row
Scalar = Array | float
Loss = Callable[[Array, Array, Scalar, Scalar], Array]


def _logits(a: Array, b: Array, scale: Scalar) -> Array:
    return scale * jnp.einsum("id,jd->ij", a, b, preferred_element_type=jnp.float32)


def _cross_entropy(logits: Array, match: Array) -> Array:
    return jax.nn.logsumexp(logits, axis=1) - match


def naive_info_nce(a: Array, b: Array, scale: Scalar, bias: Scalar) -> Array:
    """InfoNCE per row, from one matrix of all logits. Ignores `bias`."""
    logits = _logits(a, b, scale)
    match = jnp.diagonal(logits)
    return 0.5 * (_cross_entropy(logits, match) + _cross_entropy(logits.T, match))


def naive_sigmoid(a: Array, b: Array, scale: Scalar, bias: Scalar) -> Array:
    """SigLIP's loss per row, from one matrix of all logits."""
    labels = 2 * jnp.eye(len(a)) - 1
    return -jnp.sum(jax.nn.log_sigmoid(labels * (_logits(a, b, scale) + bias)), axis=1)


def gathered_info_nce(a: Array, b: Array, scale: Scalar, bias: Scalar) -> Array:
    """InfoNCE per row. Each device compares its rows of a tower with all rows of the other tower,
    as open_clip's `local_loss` does. Ignores `bias`."""
    match = scale * jnp.sum(a.astype(jnp.float32) * b, axis=1)
    directions = (
        _cross_entropy(
            constrain_rows(_logits(x, jax.lax.with_sharding_constraint(y, P()), scale)), match
        )
        for x, y in ((a, b), (b, a))
    )
    return 0.5 * sum(directions)  # pyright: ignore[reportReturnType]


def gathered_sigmoid(a: Array, b: Array, scale: Scalar, bias: Scalar) -> Array:
    """SigLIP's loss per row. Each device compares its rows of `a` with all rows of `b`."""
    every = jax.lax.with_sharding_constraint(b, P())
    logits = constrain_rows(_logits(a, every, scale) + bias)
    labels = constrain_rows(2 * jnp.eye(len(a)) - 1)
    return -jnp.sum(jax.nn.log_sigmoid(labels * logits), axis=1)


def _ours(name: str, form: Form) -> Loss:
    if name == "InfoNCE":
        return lambda a, b, scale, bias: losses.info_nce(a, b, scale=scale, form=form)
    return lambda a, b, scale, bias: losses.sigmoid(a, b, scale=scale, bias=bias, form=form)


FORMS: dict[str, dict[str, Loss]] = {
    "InfoNCE": {"naive": naive_info_nce, "all-gather": gathered_info_nce},
    "SigLIP": {"naive": naive_sigmoid, "all-gather": gathered_sigmoid},
}
for _name, _forms in FORMS.items():
    _forms |= {form: _ours(_name, form) for form in get_args(Form)}


class Need(NamedTuple):
    """What a loss needs of one device."""

    gib: float  # memory, in GiB
    fits: bool
    cycles: int = 0  # 0 if it does not fit

    def __str__(self) -> str:
        size = f"{self.gib:,.1f} GiB" if self.gib >= 1 else f"{self.gib * 1024:,.0f} MiB"
        return f"{size}, {self.cycles / 1e6:,.1f} M" if self.fits else f"does not fit: {size}"


def main(
    topologies: Sequence[str] = TOPOLOGIES,
    batches: Sequence[int] = BATCHES,
    names: Sequence[str] = tuple(FORMS),
) -> int:
    """Prints a table, each row as soon as its programs are compiled, and returns 0. The form that
    clipx would choose is bold."""
    columns = list(next(iter(FORMS.values())))
    print(
        f"Losses of {WIDTH}-d bfloat16 rows, value and gradient, peak of a device and cycles "
        f"(jax {jax.__version__}): compiled ahead of time, not run"
    )
    print("| loss | topology | batch | " + " | ".join(columns) + " |")
    print("|" + "---|" * (3 + len(columns)), flush=True)
    for where in map(chips.parse, topologies):
        on = mesh.make_mesh(mesh.MeshConfig(), where.devices())
        for batch in batches:
            with jax.set_mesh(on):
                chosen = pick_form(None, jax.ShapeDtypeStruct((batch, WIDTH), jnp.bfloat16))
            for name in names:
                needs = {form: str(need(loss, on, batch)) for form, loss in FORMS[name].items()}
                needs[chosen] = f"**{needs[chosen]}**"
                row = (name, where.name, f"{batch:,}", *needs.values())
                print("| " + " | ".join(row) + " |", flush=True)
    return 0


def need(loss: Loss, on: mesh.Mesh, batch: int) -> Need:
    """Compiles a loss's mean and its gradients with respect to rows, scale and bias for the mesh
    `on`, and returns what they need. Raises `OutOfMemory` if the compiler runs out of memory and
    does not say how much it needs."""
    shape = (batch, WIDTH)
    rows = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=mesh.batch_sharding(on))
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=mesh.replicated(on))
    step = jax.jit(jax.value_and_grad(lambda *xs: jnp.mean(loss(*xs)), (0, 1, 2, 3)))
    with jax.set_mesh(on):
        try:
            compiled, text = compile_ahead(step.lower(rows, rows, scalar, scalar))
        except OutOfMemory as error:
            if error.used is None:
                raise
            return Need(error.used / 2**30, False)
    memory = compiled.memory_analysis()
    assert memory is not None
    cycles = hlo.read(text()).compiler_cycles
    return Need(memory.peak_memory_in_bytes / 2**30, True, cycles)
