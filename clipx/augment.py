"""Photometry on the device: uint8 pictures in, numbers that a tower takes out."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)  # openai/CLIP, clip/clip.py
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


def normalize(
    image: UInt8[Array, "*b h w 3"],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> Float[Array, "*b h w 3"]:
    """Float32 pictures, scaled to 0..1, less `mean`, over `std`, per RGB channel."""
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    return (image.astype(jnp.float32) / 255.0 - mean) / std
