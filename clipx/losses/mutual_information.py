"""CLIP-Lite's losses on logits: of a critic that scores pairs, and of a prior discriminator."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float

from clipx.types import Array


def _wide(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def jsd(
    positive: Float[Array, " b"],
    negative: Float[Array, " b"],
    *,
    weight: Float[Array, " b"] | None = None,
) -> Float[Array, " b"]:
    """softplus(-T+) + softplus(T-) of each row, in nats, float32 at least.

    This is minus the Jensen-Shannon lower bound on mutual information (CLIP-Lite, arXiv 2112.07133,
    section 3), without its constant offset or a factor of one half. T+ is `positive`, the critic's
    score of the row's own pair; T- is `negative`, its score of a wrong pair. `weight` multiplies
    the term of T-. Finite for any finite score. A critic that always answers 0 costs 2 ln 2.
    """
    wrong = jax.nn.softplus(_wide(negative))
    return jax.nn.softplus(-_wide(positive)) + (wrong if weight is None else weight * wrong)


def prior(real_logit: Float[Array, " b"], uniform_logit: Float[Array, " b"]) -> Float[Array, " b"]:
    """softplus(-uniform) + softplus(real) of each row, in nats, float32 at least.

    This is the binary cross-entropy of a discriminator that tells uniform noise (class 1) from
    features (class 0). It takes logits, because log(1 - sigmoid(x)) is -inf in half precision for
    x of 9 or more. A discriminator that always answers 0 costs 2 ln 2.
    """
    return jax.nn.softplus(-_wide(uniform_logit)) + jax.nn.softplus(_wide(real_logit))
