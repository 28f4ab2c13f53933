"""The cloud agent: semantic user modelling over what an abstract releases."""

from cda4rec_jax.agents.cloud.modeling import CloudAgent, CloudConfig

__all__ = ["CloudAgent", "CloudConfig"]
