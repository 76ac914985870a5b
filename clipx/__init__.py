"""clipx: image-text pre-training from little data, in JAX."""

__version__ = "0.1.0"
