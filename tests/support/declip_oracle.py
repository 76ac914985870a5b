"""What the tests against `oracles/declip.json` share."""

import numpy as np
import pytest

from support import load_oracle

ORACLE = load_oracle("declip")
WIDE = pytest.mark.parametrize("wide", [True, False], ids=["float64", "float32"])


def sines(shape, phase, scale=1.0):
    """The inputs that the oracle calls S: sines of 0.7 per element, from `phase`."""
    return (scale * np.sin(phase + 0.7 * np.arange(np.prod(shape)))).reshape(shape)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)
