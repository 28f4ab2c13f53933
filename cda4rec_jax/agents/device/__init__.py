"""The device agent: structured user modelling over the private history, and final ranking."""

from cda4rec_jax.agents.device.features import FEATURES, candidate_features, without_semantics, without_structure
from cda4rec_jax.agents.device.modeling import DeviceAgent, DeviceConfig
from cda4rec_jax.agents.device.ranking import FusionHead
from cda4rec_jax.agents.device.serving import ranker_weights

__all__ = [
    "FEATURES",
    "DeviceAgent",
    "DeviceConfig",
    "FusionHead",
    "candidate_features",
    "ranker_weights",
    "without_semantics",
    "without_structure",
]
