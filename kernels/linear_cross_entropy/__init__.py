"""Next-item cross-entropy over the whole catalogue or over sampled items, without the logits of all tokens."""

from cda4rec_jax.kernels.linear_cross_entropy.api import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
