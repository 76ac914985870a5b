"""What the losses alone need, for `python -m clipx.plan --losses`: value and gradient, compiled for
TPUs that are not here, beside the formulations that one would write first.

Memory is the peak of one device, rows and gradients included. Cycles are the compiler's own
estimates with loops multiplied out; collectives are not in them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
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


def _logits(a, b, scale):
    return scale * jnp.einsum("id,jd->ij", a, b, preferred_element_type=jnp.float32)


def _cross_entropy(logits, match):
    return jax.nn.logsumexp(logits, axis=1) - match


def naive_info_nce(a, b, scale, bias):
    logits = _logits(a, b, scale)
    match = jnp.diagonal(logits)
    return 0.5 * (_cross_entropy(logits, match) + _cross_entropy(logits.T, match))


def naive_sigmoid(a, b, scale, bias):
    labels = 2 * jnp.eye(len(a)) - 1
    return -jnp.sum(jax.nn.log_sigmoid(labels * (_logits(a, b, scale) + bias)), axis=1)


def gathered_info_nce(a, b, scale, bias):
    """Each device's rows of either tower with all of the other, as open_clip's `local_loss`."""
    match = scale * jnp.sum(a.astype(jnp.float32) * b, axis=1)
    return 0.5 * sum(
        _cross_entropy(
            constrain_rows(_logits(x, jax.lax.with_sharding_constraint(y, P()), scale)), match
        )
        for x, y in ((a, b), (b, a))
    )


def gathered_sigmoid(a, b, scale, bias):
    every = jax.lax.with_sharding_constraint(b, P())
    logits = constrain_rows(_logits(a, every, scale) + bias)
    labels = constrain_rows(2 * jnp.eye(len(a)) - 1)
    return -jnp.sum(jax.nn.log_sigmoid(labels * logits), axis=1)


def _ours(name: str, form: str):
    if name == "InfoNCE":
        return lambda a, b, scale, bias: losses.info_nce(a, b, scale=scale, form=form)
    return lambda a, b, scale, bias: losses.sigmoid(a, b, scale=scale, bias=bias, form=form)


FORMS: dict[str, dict[str, Callable]] = {
    "InfoNCE": {"naive": naive_info_nce, "all-gather": gathered_info_nce},
    "SigLIP": {"naive": naive_sigmoid, "all-gather": gathered_sigmoid},
}
for _name, _forms in FORMS.items():
    _forms |= {form: _ours(_name, form) for form in get_args(Form)}


class Need(NamedTuple):
    """Of one device."""

    gib: float  # of memory
    fits: bool
    cycles: int = 0

    def __str__(self):
        size = f"{self.gib:,.1f} GiB" if self.gib >= 1 else f"{self.gib * 1024:,.0f} MiB"
        return f"{size}, {self.cycles / 1e6:,.1f} M" if self.fits else f"does not fit: {size}"


def main(
    topologies: Sequence[str] = TOPOLOGIES, batches: Sequence[int] = BATCHES, names=tuple(FORMS)
) -> int:
    """Prints the table, a row when its programs are compiled; in bold the form that is chosen."""
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
                told = {form: str(need(loss, on, batch)) for form, loss in FORMS[name].items()}
                told[chosen] = f"**{told[chosen]}**"
                row = (name, where.name, f"{batch:,}", *told.values())
                print("| " + " | ".join(row) + " |", flush=True)
    return 0


def need(loss: Callable, on, batch: int) -> Need:
    """What the compiler says, for the mesh `on`, of a loss's mean and its gradients for rows, scale
    and bias."""
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
    peak = compiled.memory_analysis().peak_memory_in_bytes
    return Need(peak / 2**30, True, hlo.read(text()).compiler_cycles)
