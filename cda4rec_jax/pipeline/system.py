"""Cloud agent, device agent and planner policy as one module, and the sizes that tie them together."""

from dataclasses import dataclass, replace

from flax import nnx

from cda4rec_jax.agents.cloud import CloudAgent, CloudConfig
from cda4rec_jax.agents.device import FEATURES, DeviceAgent, DeviceConfig
from cda4rec_jax.array_typing import ItemText
from cda4rec_jax.errors import UserError
from cda4rec_jax.planner import STANDARD, LearnedPlanner, OwnPlanner, PlanSpace, Policy, PolicyConfig
from cda4rec_jax.privacy.levels import MAX_FULL_ITEMS


@dataclass(frozen=True, kw_only=True)
class SystemConfig:
    """Both agents and the policy.

    Both agents read equally many events, so that FULL consent lets the cloud do the device's part.
    """

    cloud: CloudConfig
    device: DeviceConfig | None  # None: a cloud model alone, such as SASRec
    policy: PolicyConfig = PolicyConfig()
    planner: OwnPlanner | None = None  # a class to learn in the place of ``Policy``
    profile_events: int = 100  # newest events before the released ids that a profile summarises
    max_cache_age: int = 20  # events after which a device drops its cached embedding
    resident_items: int = 100  # most popular items, whose records every device holds beside its last candidates
    without_features: tuple[str, ...] = ()  # of ``agents.device.FEATURES``, that the fusion head sees as 0: an ablation

    def __post_init__(self):
        if self.device is not None and self.cloud.history_length != self.device.history_length:
            raise ValueError(
                f"cloud reads {self.cloud.history_length} events and device {self.device.history_length}: they must read equally many"
            )
        if self.device is not None and self.history_length > MAX_FULL_ITEMS:
            raise ValueError(
                f"history_length is {self.history_length}: a request of level FULL releases at most {MAX_FULL_ITEMS} ids, and the gate "
                "would let none of these out"
            )
        if self.resident_items < 1:
            raise ValueError(
                f"resident_items is {self.resident_items}: a device without a link needs at least 1 item to recommend"
            )
        if unknown := set(self.without_features) - set(FEATURES):
            raise ValueError(f"without_features names {sorted(unknown)}: expected some of {', '.join(FEATURES)}")

    @property
    def space(self) -> PlanSpace:
        """The plans that there are. Raises UserError where those of the planner cannot be found."""
        return STANDARD if self.planner is None else self.planner.space

    @property
    def history_length(self) -> int:
        return self.cloud.history_length

    @property
    def stored_events(self) -> int:
        """Newest events that a device keeps at hand: enough for a FULL abstract as it was ``max_cache_age`` events ago."""
        return self.history_length + self.profile_events + self.max_cache_age


def with_planner(config: SystemConfig, target: str) -> SystemConfig:
    """The same system with a planner of a user's own, ``package.module:Class``.

    Raises:
        UserError: it has no device agent, and so nothing to plan; there is no such class, or it lacks something that a planner has.
    """
    if config.device is None:
        raise UserError(f"a baseline has one agent and plans nothing: leave the planner {target} out, or take another preset")
    return replace(config, planner=OwnPlanner.find(target, config.policy))


class System(nnx.Module):
    """Everything that is trained."""

    def __init__(self, config: SystemConfig, text: ItemText, prefix_size: int, *, rngs: nnx.Rngs):
        self.cloud = CloudAgent(config.cloud, text, prefix_size, rngs=rngs)
        width = config.cloud.decoder.width
        self.device = None if config.device is None else DeviceAgent(config.device, width, prefix_size, rngs=rngs)
        planner = Policy if config.planner is None else config.planner.load()
        self.policy: LearnedPlanner | None = (
            None if config.device is None else planner(config.policy, space=config.space, rngs=rngs)  # pyright: ignore[reportCallIssue]
        )
