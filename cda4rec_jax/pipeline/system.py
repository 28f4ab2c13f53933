"""Cloud agent, device agent and planner policy as one module, and the sizes that tie them together."""

from dataclasses import dataclass

from flax import nnx

from cda4rec_jax.agents.cloud import CloudAgent, CloudConfig
from cda4rec_jax.agents.device import FEATURES, DeviceAgent, DeviceConfig
from cda4rec_jax.array_typing import ItemText
from cda4rec_jax.planner import Policy, PolicyConfig


@dataclass(frozen=True, kw_only=True)
class SystemConfig:
    """Both agents and the policy.

    Both agents read equally many events, so that FULL consent lets the cloud do the device's part.
    """

    cloud: CloudConfig
    device: DeviceConfig | None  # None: a cloud model alone, such as SASRec
    policy: PolicyConfig = PolicyConfig()
    profile_events: int = 100  # newest events before the released ids that a profile summarises
    max_cache_age: int = 20  # events after which a device drops its cached embedding
    without_features: tuple[str, ...] = ()  # of ``agents.device.FEATURES``, that the fusion head sees as 0: an ablation

    def __post_init__(self):
        if self.device is not None and self.cloud.history_length != self.device.history_length:
            raise ValueError(
                f"cloud reads {self.cloud.history_length} events and device {self.device.history_length}: they must read equally many"
            )
        if unknown := set(self.without_features) - set(FEATURES):
            raise ValueError(f"without_features names {sorted(unknown)}: expected some of {', '.join(FEATURES)}")

    @property
    def history_length(self) -> int:
        return self.cloud.history_length

    @property
    def stored_events(self) -> int:
        """Newest events that a device keeps at hand: enough for a FULL abstract as it was ``max_cache_age`` events ago."""
        return self.history_length + self.profile_events + self.max_cache_age


class System(nnx.Module):
    """Everything that is trained."""

    def __init__(self, config: SystemConfig, text: ItemText, prefix_size: int, *, rngs: nnx.Rngs):
        self.cloud = CloudAgent(config.cloud, text, prefix_size, rngs=rngs)
        width = config.cloud.decoder.width
        self.device = None if config.device is None else DeviceAgent(config.device, width, prefix_size, rngs=rngs)
        self.policy = None if config.device is None else Policy(config.policy, rngs=rngs)
