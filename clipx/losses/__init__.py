"""The losses, callable alone: `from clipx import losses`, then `jax.jit(losses.info_nce)`."""

from clipx.losses.contrastive import info_nce, recall_at_1, sigmoid

__all__ = ["info_nce", "recall_at_1", "sigmoid"]
