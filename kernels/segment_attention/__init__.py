"""Causal attention over packed rows, without the [tokens, tokens] weights of long rows."""

from cda4rec_jax.kernels.segment_attention.api import segment_attention

__all__ = ["segment_attention"]
