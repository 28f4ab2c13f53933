"""A simulated shop whose truth is known: for quick starts, tests, and questions that real data cannot answer."""

from cda4rec_jax.data.synthetic.config import SyntheticConfig
from cda4rec_jax.data.synthetic.truth import Truth
from cda4rec_jax.data.synthetic.world import World, synthetic_world

__all__ = ["SyntheticConfig", "Truth", "World", "synthetic_world"]
