"""The losses, callable alone: `from clipx import losses`, then `jax.jit(losses.info_nce)`."""

from clipx.losses.contrastive import enqueue, info_nce, nearest, nt_xent, recall_at_1, sigmoid
from clipx.losses.late_interaction import late_interaction, token_similarity
from clipx.losses.masked_language import mask_tokens, masked_lm
from clipx.losses.mutual_information import jsd, prior
from clipx.losses.siamese import simsiam

__all__ = [
    "enqueue",
    "info_nce",
    "jsd",
    "late_interaction",
    "mask_tokens",
    "masked_lm",
    "nearest",
    "nt_xent",
    "prior",
    "recall_at_1",
    "sigmoid",
    "simsiam",
    "token_similarity",
]
