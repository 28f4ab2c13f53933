"""Maximum inner product search over a catalogue: scores and their top k, without the [queries, items] scores."""

from cda4rec_jax.kernels.topk_dot.api import topk_dot

__all__ = ["topk_dot"]
