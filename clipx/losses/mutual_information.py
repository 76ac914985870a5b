"""Losses on a critic's scores: what tells a pair from a wrong one, a feature from noise."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def _wide(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def jsd(
    positive: Float[Array, " b"],
    negative: Float[Array, " b"],
    *,
    weight: Float[Array, " b"] | None = None,
) -> Float[Array, " b"]:
    """softplus(-T+) + softplus(T-) of each row, in nats, at least float32: minus the
    Jensen-Shannon bound on mutual information (CLIP-Lite, arXiv 2112.07133, section 3).

    `positive` is the critic's score of a row's own pair, `negative` that of its wrong one, whose
    term is multiplied by `weight` if there is one. Finite for any finite score. A critic that says
    0 of everything costs 2 ln 2; there is neither an offset nor a factor of a half.
    """
    wrong = jax.nn.softplus(_wide(negative))
    return jax.nn.softplus(-_wide(positive)) + (wrong if weight is None else weight * wrong)


def prior(real_logit: Float[Array, " b"], uniform_logit: Float[Array, " b"]) -> Float[Array, " b"]:
    """softplus(-uniform) + softplus(real) of each row, in nats, at least float32: the binary
    cross-entropy of a discriminator that tells uniform noise (1) from features (0).

    Written with logits, as log(1 - sigmoid) is -inf in half precision from a logit of 9 on. A
    discriminator that cannot tell costs 2 ln 2.
    """
    return jax.nn.softplus(-_wide(uniform_logit)) + jax.nn.softplus(_wide(real_logit))
