"""The planner's decision as one would write it in NumPy: mask, predicted costs and network, with everything per plan made beforehand."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from cda4rec_jax.messages import MIN_KBPS, DeviceTier, EgressLevel, Link
from cda4rec_jax.planner.cost_profiles import CostProfile
from cda4rec_jax.planner.costs import RELEASED_EVENTS, PayloadSizes
from cda4rec_jax.planner.plan_space import STANDARD
from cda4rec_jax.planner.serving import CONTEXT_FIELDS

Rows = Float[np.ndarray, "_ _"]  # of any number and width


@dataclass(frozen=True, kw_only=True)
class Network:
    """The policy's network with its plan tower multiplied out: gelu between ``layers``, each (kernel [in, out], bias [out])."""

    layers: tuple[tuple[np.ndarray, np.ndarray], ...]
    tau: float

    def __call__(self, features: Rows) -> Float[np.ndarray, "n p"]:
        """Quality of every plan."""
        hidden = features
        for kernel, bias in self.layers[:-1]:
            hidden = _gelu(hidden @ kernel + bias)
        kernel, bias = self.layers[-1]
        return hidden @ kernel + bias


def _gelu(x: Rows) -> Rows:
    inner = x * (np.float32(0.7978845608) + np.float32(0.0356774081) * x * x)
    return np.float32(0.5) * x * (np.float32(1.0) + np.tanh(inner))


class NumpyDecision:
    """From packed requests to the scores of all plans.

    Args:
        quality: the network, from features; ``Network``, or the same in another runtime.
        tau: temperature of the scores.
        profile, exposure_by_level, sizes: as ``ServedPlanner`` takes them.
    """

    def __init__(
        self, quality: Callable[[Rows], Rows], tau: float, profile: CostProfile, exposure_by_level: Any, sizes: PayloadSizes
    ):
        table = STANDARD.table
        self._quality, self._tau = quality, np.float32(tau)
        self._sizes = {name: np.float32(value) for name, value in vars(sizes).items()}
        self._profile = {name: np.asarray(value) for name, value in vars(profile).items() if name != "name"}
        self._exposure = np.asarray(exposure_by_level, np.float32)
        link, fresh = table.uses_link.astype(np.float32), table.semantic_cloud.astype(np.float32)
        size = self._sizes
        self._limits = np.asarray(RELEASED_EVENTS, np.float32)[table.level]
        self._up_fixed = link * (
            size["header_bytes"]
            + fresh * (size["profile_bytes"] + size["attributes_bytes"] * (table.level == EgressLevel.FULL))
            + (1 - fresh) * size["embedding_bytes"]
        )
        self._up_per_event = link * fresh * size["item_id_bytes"]
        item_bytes = np.where(table.structured_device, size["evidence_bytes"], size["scored_item_bytes"])
        self._down = (link * (size["header_bytes"] + table.candidates * item_bytes + fresh * size["embedding_bytes"])).astype(
            "f4"
        )
        self._semantic = self._profile["semantic_ms"][table.level] * fresh
        self._semantic_per_event = self._profile["semantic_ms_per_event"] * fresh
        beside = table.structured_device.astype(int)  # whether candidates come with records, and ranking reads them
        pool = np.where(table.uses_link, table.candidates_index, -1)
        self._abstract = self._profile["abstract_ms"][:, beside, table.level] * table.uses_link
        self._retrieval = self._profile["retrieval_ms"][beside, table.candidates_index]
        self._ranking = self._profile["ranking_ms"][:, beside, pool]
        self._ranking_cloud = self._profile["ranking_cloud_ms"][table.structured_cloud.astype(int)] * table.ranking_cloud
        self._allowed_reuse = ~table.semantic_reuse
        self._no_link = ~table.uses_link

    def __call__(self, packed: Rows) -> Float[np.ndarray, "n p"]:
        """Scores; -inf where a plan is forbidden."""
        at = {name: packed[:, column] for column, name in enumerate(CONTEXT_FIELDS)}
        enums = {name: at[name].astype(np.int32) for name in ("cache_level", "tier", "link", "consent")}
        worth = self._quality(features(at, enums)) - self._cost(at, enums)
        return np.where(self._mask(at, enums), worth / self._tau, -np.inf)

    def choices(self, packed: Rows) -> Int[np.ndarray, "n"]:
        """Plans of many requests."""
        return self(packed).argmax(axis=1)

    def _mask(self, at: dict[str, np.ndarray], enums: dict[str, np.ndarray]) -> np.ndarray:
        table, cache = STANDARD.table, enums["cache_level"][:, None]
        mask = self._egress(cache) <= enums["consent"][:, None]
        mask &= self._allowed_reuse | (cache > 0)
        mask &= self._no_link | (enums["link"] != Link.OFFLINE)[:, None]
        mask &= table.memory_mb <= at["free_memory_mb"][:, None]
        mask[:, STANDARD.last_resort] = True
        return mask

    def _egress(self, cache: np.ndarray) -> np.ndarray:
        reused = STANDARD.table.semantic_reuse & STANDARD.table.uses_link
        return np.where(reused, cache, STANDARD.table.level)

    def _cost(self, at: dict[str, np.ndarray], enums: dict[str, np.ndarray]) -> np.ndarray:
        table, profile, tier, link = STANDARD.table, self._profile, enums["tier"], enums["link"]
        events = np.minimum(at["history_length"], self._sizes["history_events"])[:, None]
        released = np.minimum(events, self._limits)
        up_bytes = self._up_fixed + self._up_per_event * released
        half_ms, floor = np.float32(0.5) * at["round_trip_ms"][:, None], np.float32(MIN_KBPS)
        link_ms = (
            2 * half_ms
            + 8 * up_bytes / np.maximum(at["uplink_kbps"], floor)[:, None]
            + 8 * self._down / np.maximum(at["downlink_kbps"], floor)[:, None]
        ) * table.uses_link
        abstract = self._abstract[tier]
        cache_retrieval = profile["cache_retrieval_ms"][tier][:, None] * self._no_link
        on_device = profile["structured_ms"][tier][:, None] + profile["structured_ms_per_event"][tier][:, None] * events
        structured = on_device * table.structured_device
        in_cloud = (profile["structured_cloud_ms"] + profile["structured_cloud_ms_per_event"] * events) * table.structured_cloud
        cloud = np.maximum(self._semantic + self._semantic_per_event * released + self._retrieval, in_cloud)
        cloud = cloud + self._ranking_cloud
        ranking = self._ranking[tier] * ~table.ranking_cloud
        planning = profile["planning_ms"][tier][:, None]
        branch = np.where(table.uses_link, abstract + link_ms + profile["queue_ms"] + cloud, cache_retrieval)
        latency = planning + np.maximum(branch, structured) + ranking
        device_ms = planning + abstract + cache_retrieval + structured + ranking
        radio = (
            profile["radio_uplink_mj_per_kb"][link][:, None] * up_bytes / 1000
            + profile["radio_downlink_mj_per_kb"][link][:, None] * self._down / 1000
            + profile["radio_active_w"][link][:, None] * link_ms
        )
        energy = profile["device_power_w"][tier][:, None] * device_ms + radio
        exposure = self._exposure[self._egress(enums["cache_level"][:, None]) * table.uses_link]
        price = {name: at[f"utility_per_{name}"][:, None] for name in ("ms", "mj", "exposure")}
        return price["ms"] * latency + price["mj"] * energy + price["exposure"] * exposure


def features(at: dict[str, np.ndarray], enums: dict[str, np.ndarray]) -> Rows:
    """``planner.contexts.context_features`` in NumPy."""
    logs = ("history_length", 5), ("cache_age_events", 2), ("session_count", 4), ("hours_since_last", 6)
    memory = ("free_memory_mb", 7), ("round_trip_ms", 5), ("uplink_kbps", 9), ("downlink_kbps", 9)
    length, age, sessions, hours = (np.log1p(at[name]) / np.float32(scale) for name, scale in logs)
    situation = [np.log1p(at[name]) / np.float32(scale) for name, scale in memory]
    user = [length, age, at["category_entropy"] / np.float32(3), at["rare_share"], sessions, hours, at["has_timestamps"]]
    sizes = {"cache_level": len(EgressLevel), "tier": len(DeviceTier), "link": len(Link), "consent": len(EgressLevel)}
    one_hots = [np.eye(size, dtype=np.float32)[enums[name]] for name, size in sizes.items()]
    return np.concatenate([np.stack([*user, *situation], axis=1), one_hots[0][:, 1:], *one_hots[1:]], axis=1)
