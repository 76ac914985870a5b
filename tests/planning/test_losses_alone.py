"""`python -m clipx.plan --losses` compares forms of one loss, and reports what does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tpu import libtpu

from clipx.parallel import mesh
from clipx.planning import losses


@pytest.mark.parametrize("name", losses.FORMS)
def test_all_are_the_same_loss(name):
    rng = np.random.default_rng(0)
    rows = [jnp.asarray(rng.normal(size=(16, 4)), jnp.float32) for _ in range(2)]

    @jax.jit
    def every(a, b):
        return jnp.stack([loss(a, b, 3.0, -1.0) for loss in losses.FORMS[name].values()])

    with jax.set_mesh(mesh.make_mesh(mesh.MeshConfig(4, 2), jax.devices())):
        values = np.asarray(every(*rows))
    assert len(values) == 5
    np.testing.assert_allclose(values, values[:1].repeat(5, axis=0), rtol=2e-5)


def test_what_does_not_fit_is_a_number(monkeypatch):
    """A loss that does not fit is reported with the compiler's size; other errors are raised."""

    class Refused:
        def __init__(self, why):
            self.why = why

        def lower(self, *arguments):
            return self

        def compile(self, **options):
            raise jax.errors.JaxRuntimeError(self.why)

    on = mesh.make_mesh(mesh.MeshConfig(), jax.devices())
    why = "RESOURCE_EXHAUSTED: ... temporaries (514.19G) exceeds available HBM (15.75G)."
    monkeypatch.setattr(jax, "jit", lambda fn: Refused(why))
    need = losses.need(losses.naive_info_nce, on, 2**20)
    assert not need.fits and str(need) == "does not fit: 514.2 GiB"
    monkeypatch.setattr(jax, "jit", lambda fn: Refused("INTERNAL: no"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        losses.need(losses.naive_info_nce, on, 2**20)


@pytest.mark.slow
@libtpu
def test_the_table(capsys):
    """Also the memory of the ring: 32,768 rows on 16 chips need at most 38 MiB."""
    losses.main(["v5e:4x4"], [32_768], ["InfoNCE"])
    head, columns, _, row = capsys.readouterr().out.splitlines()
    assert "compiled ahead of time, not run" in head and columns.count("|") == row.count("|")
    ring = row.strip("| ").split(" | ")[-1]
    assert ring.startswith("**") and int(ring.strip("*").split(" MiB")[0]) <= 38
