"""Every loss as a plain function: `from clipx import losses`, then `jax.jit(losses.info_nce)`."""

from clipx.losses.contrastive import info_nce, nt_xent, recall_at_1, sigmoid
from clipx.losses.late_interaction import late_interaction, token_similarity
from clipx.losses.masked_language import mask_tokens, masked_lm
from clipx.losses.mutual_information import jsd, prior
from clipx.losses.neighbours import enqueue, nearest
from clipx.losses.prototypical import (
    back_translate,
    prototype_accuracy,
    prototypical,
    targets,
)
from clipx.losses.siamese import simsiam

__all__ = [
    "back_translate",
    "enqueue",
    "info_nce",
    "jsd",
    "late_interaction",
    "mask_tokens",
    "masked_lm",
    "nearest",
    "nt_xent",
    "prior",
    "prototype_accuracy",
    "prototypical",
    "recall_at_1",
    "sigmoid",
    "simsiam",
    "targets",
    "token_similarity",
]
