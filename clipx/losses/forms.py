"""The forms of a pairwise loss, and the choice between them by the number of rows."""

from __future__ import annotations

from typing import Literal, cast, get_args

import jax

from clipx.losses.tiles import size
from clipx.types import Array, batch_axes

Form = Literal["gather", "assembly", "ring"]


def pick_form(form: str | None, visitors: Array | jax.ShapeDtypeStruct) -> Form:
    """`form`, or for None the form that suits rows like `visitors` on the current mesh.

    Raises `ValueError` for an unknown form. The choice rests on these estimates of the TPU compiler
    for InfoNCE on v5e chips (width 512, bfloat16), in MiB per chip and millions of cycles:

        rows on chips      gather       assembly     ring
         16,384 on  16      71, 2.2     104, 1.0     19, 3.0
         32,768 on  16     127, 9.9                  37, 7.5
         32,768 on 256      81, 0.6     113, 0.3      2, 6.1
      1,048,576 on 256                               67, 370

    A ring of few rows makes many short stops. An assembly is fastest where its memory fits. Small
    batches stay in the form "gather", so that their losses keep the same bits from release to
    release (`benchmarks/loss_forms.py`).
    """
    if form is not None:
        if form not in get_args(Form):
            raise ValueError(f"form={form!r}: expected one of {get_args(Form)}, or None")
        return cast(Form, form)
    devices, elements = size(batch_axes()), visitors.size
    if elements < 2**23 or (devices == 1 and elements <= 2**24):
        return "gather"
    few = visitors.shape[0] // devices < 1024
    return "assembly" if elements < (2**26 if few else 2**24) and devices > 1 else "ring"
