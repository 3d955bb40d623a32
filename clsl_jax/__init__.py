"""clsl_jax: multi-label image classification from partly labelled data, in JAX and Flax."""

__version__ = "0.1.0"
