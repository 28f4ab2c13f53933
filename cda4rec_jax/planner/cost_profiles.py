"""Where the numbers of a cost profile come from: a modelled deployment, or times measured on this machine."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from cda4rec_jax.array_typing import Array
from cda4rec_jax.errors import UserError
from cda4rec_jax.planner.plan_space import (
    CACHED_CANDIDATES,
    CANDIDATE_COUNTS,
    NEIGHBOUR_EVENTS,
    OWN_CANDIDATES,
    RELEASING_LEVELS,
    RESIDENT_CANDIDATES,
)

_LEVEL_NAMES = tuple(level.name.lower() for level in RELEASING_LEVELS)
_COUNT_NAMES = tuple(str(count) for count in CANDIDATE_COUNTS)
_POOL_NAMES = (*_COUNT_NAMES, "cache")

# Energy is a model under both profiles: public power figures times modelled or measured time. No energy was measured.

# Active power of the application processor while it computes, by tier, declared within and below what phones sustain, 3-5 W before
# they throttle (Bhat et al., "Power-temperature stability and safety analysis for multiprocessor systems", ACM TECS 2017).
DEVICE_POWER_W = (2.0, 3.0, 4.5)

# Radio energy by Link. WiFi, LTE and 3G: power = alpha * throughput + beta (Huang et al., MobiSys 2012, table 4: alpha up/down in
# mW/Mbps 283/137, 438/52, 869/122; beta 133, 1288, 818 mW); 1 mW/Mbps = .008 mJ/KB. EDGE: .036 J/KB as for GSM, transfer only
# (Balasubramanian et al., IMC 2009). The tail after a transfer is left out: in a foreground app it is shared with other traffic.
RADIO_UPLINK_MJ_PER_KB = (2.27, 3.51, 6.95, 36.0, 0.0)
RADIO_DOWNLINK_MJ_PER_KB = (1.10, 0.42, 0.98, 36.0, 0.0)
RADIO_ACTIVE_W = (0.133, 1.288, 0.818, 0.0, 0.0)

# How much slower a low and a mid device computes than the machine that was measured: single-core scores of entry, middle and top
# phones are near 450, 1000 and 2000 (Geekbench 6, browser.geekbench.com/mobile-benchmarks).
TIER_SLOWDOWN = (4.5, 2.0, 1.0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class CostProfile:
    """What a sub-task costs, as a table with linear terms; a pytree, so that every cost is differentiable in it.

    Axes: ``tier`` DeviceTier (3), ``level`` EgressLevel (4, NOTHING first), ``count`` CANDIDATE_COUNTS (3), ``pool`` what is ranked
    (4: CANDIDATE_COUNTS, then the device's cache), ``link`` Link (5), ``off_on`` (2) without and with structured user modelling: on
    the device for the abstract and for retrieval, in the cloud for ranking there.
    """

    name: str = field(metadata={"static": True})  # "deployment (modelled)" or "measured"
    planning_ms: Float[Array, "tier"]
    abstract_ms: Float[Array, "tier off_on level"]  # until it is on its way; NOTHING: a kept embedding instead
    semantic_ms: Float[Array, "level"]
    semantic_ms_per_event: Float[Array, ""]  # released event
    retrieval_ms: Float[Array, "off_on count"]  # structured modelling on the device wants the candidates' records, too
    cache_retrieval_ms: Float[Array, "tier"]
    structured_ms: Float[Array, "tier"]
    structured_ms_per_event: Float[Array, "tier"]
    structured_cloud_ms: Float[Array, ""]
    structured_cloud_ms_per_event: Float[Array, ""]
    ranking_ms: Float[Array, "tier off_on pool"]
    ranking_cloud_ms: Float[Array, "off_on"]
    queue_ms: Float[Array, ""]  # mean wait for the cloud model
    device_power_w: Float[Array, "tier"]
    radio_uplink_mj_per_kb: Float[Array, "link"]
    radio_downlink_mj_per_kb: Float[Array, "link"]
    radio_active_w: Float[Array, "link"]  # while a transfer lasts


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Declared sizes of the modelled deployment.

    FLOPs of a prefill are 2 * parameters * tokens (Kaplan et al. 2020, arXiv 2001.08361).

    - Cloud: a 1.7B-parameter LLM (the size of Qwen3-1.7B) that reads titles, 12 tokens an item and 64 for the profile and the
      instruction, on an L4: 121 TFLOP/s in bf16 without sparsity and 300 GB/s (NVIDIA L4 data sheet). At 40% of that peak and
      half a card per request it does 24 TFLOP/s; reading 3.4 GB of weights once takes 11 ms, tokenising and dispatch 4 ms.
    - Device: a .3B-parameter model (near Gemma 3 270M) that reads one item vector an event. High tier: 3.6 TFLOP/s, from 1,000
      prefill tokens a second of a 1.8B model on a phone's NPU (Xu et al. 2024, arXiv 2407.05858), 22 times its baselines on
      average. Declared between and below: mid tier .5 TFLOP/s (a phone GPU), low tier .08 TFLOP/s (an entry phone's CPU).
    - Queue: 8 ms, an M/M/1 server at 35% load with the 15 ms of one short request.
    - Fusion head and features: 4 multiply-adds for each of 64 dimensions, each candidate and each of 200 events.
    - Declared, since no public figure fits: 40% of peak and half a card; 12 and 64 tokens; 4 ms to tokenise and dispatch; 3 ms to
      rank in the cloud; .1% more time of retrieval for each candidate; 1 ms to begin structured modelling in the cloud; the device's
      milliseconds to dispatch a model (a quarter of it to make an abstract or to read the cache) and to plan.
    """

    cloud_parameters: float = 1.7e9
    cloud_flops_per_s: float = 24e12
    cloud_overhead_ms: float = 15.0
    cloud_profile_tokens: float = 64.0
    cloud_tokens_per_event: float = 12.0
    cloud_queue_ms: float = 8.0
    cloud_retrieval_ms: float = 1.0  # ScaNN over a million items (ann-benchmarks.com: about a millisecond at recall .95)
    cloud_ranking_ms: float = 3.0
    cloud_structured_ms: float = 1.0
    device_parameters: float = 0.3e9
    device_flops_per_s: tuple[float, float, float] = (0.08e12, 0.5e12, 3.6e12)
    device_dispatch_ms: tuple[float, float, float] = (4.0, 2.0, 1.0)
    device_planning_ms: tuple[float, float, float] = (0.09, 0.04, 0.02)
    ranking_flops_per_candidate: float = 2.0 * 4 * 64 * 200
    search_flops_per_item: float = 2.0 * 64  # of the device among the resident items
    item_neighbours: int = 24  # in the record of an item
    resident_items: int = 100  # whose records the device holds; it ranks some of them, piece by piece: they need no more memory


def deployment_profile(workload: Workload | None = None) -> CostProfile:
    """The modelled deployment: overhead + FLOPs / throughput, from the declared ``workload``, which names its sources."""
    declared = workload or Workload()
    cloud_ms_per_token = 2e3 * declared.cloud_parameters / declared.cloud_flops_per_s
    profile_ms = declared.cloud_overhead_ms + declared.cloud_profile_tokens * cloud_ms_per_token
    # By NumPy, as each operation of JAX outside of a program is one to compile.
    device_flops = np.asarray(declared.device_flops_per_s, np.float32)
    dispatch_ms = np.asarray(declared.device_dispatch_ms, np.float32)
    pools = np.asarray((*CANDIDATE_COUNTS, CACHED_CANDIDATES), np.float32)
    # Without and with structured user modelling, by whose result the device searches the resident items a second time.
    by_history = OWN_CANDIDATES + NEIGHBOUR_EVENTS * declared.item_neighbours
    ranked = pools[None, :] + np.minimum(
        declared.resident_items, RESIDENT_CANDIDATES + np.asarray([[0], [by_history]], np.float32)
    )
    searched = declared.resident_items * np.asarray([[1.0], [2.0]], np.float32)
    ranking_flops = declared.ranking_flops_per_candidate * ranked + declared.search_flops_per_item * searched
    ranking_ms = dispatch_ms[:, None, None] + 1e3 * ranking_flops[None] / device_flops[:, None, None]
    retrieval_ms = declared.cloud_retrieval_ms * (1.0 + pools[: len(CANDIDATE_COUNTS)] / 1000.0)
    return CostProfile(
        name="deployment (modelled)",
        planning_ms=jnp.asarray(declared.device_planning_ms),
        abstract_ms=jnp.asarray(0.25 * dispatch_ms[:, None, None] * np.asarray([[[0.0, 1.0, 1.0, 1.0]] * 2], np.float32)),
        semantic_ms=jnp.asarray([0.0, profile_ms, profile_ms, profile_ms]),
        semantic_ms_per_event=jnp.asarray(declared.cloud_tokens_per_event * cloud_ms_per_token),
        retrieval_ms=jnp.asarray(np.stack([retrieval_ms, retrieval_ms])),
        cache_retrieval_ms=jnp.asarray(0.25 * dispatch_ms),
        structured_ms=jnp.asarray(dispatch_ms),
        structured_ms_per_event=jnp.asarray(2e3 * declared.device_parameters / device_flops),
        structured_cloud_ms=jnp.asarray(declared.cloud_structured_ms),
        structured_cloud_ms_per_event=jnp.asarray(2e3 * declared.device_parameters / declared.cloud_flops_per_s),
        ranking_ms=jnp.asarray(ranking_ms),
        ranking_cloud_ms=jnp.asarray(np.full(2, declared.cloud_ranking_ms, np.float32)),
        queue_ms=jnp.asarray(declared.cloud_queue_ms),
        **_energy_fields(),
    )


@dataclass(frozen=True, kw_only=True)
class MeasuredTimes:
    """Median (p50) milliseconds that each sub-task takes of a warm request, on the machine that was measured.

    Calibration with whole requests counts to each sub-task what a request needs for it beyond the function itself: to planning the
    mask and the costs; to the abstract the hand-over to a thread, gate, ledger and codec; to ranking the codec and the hand-over of
    what is ranked. So the parts of a request add up to its latency. As JSON this is one object with these keys; a mapping is an
    object with exactly the keys named here.
    """

    planning_ms: float
    abstract_ms: Mapping[str, float]  # "profile", "recent", "full"; "reuse": a kept embedding instead
    abstract_beside_ms: Mapping[str, float]  # the same while the device also does structured modelling
    semantic_ms: Mapping[str, float]  # "profile", "recent", "full"
    retrieval_ms: Mapping[str, float]  # "20", "100", "500": items and scores
    retrieval_evidence_ms: Mapping[str, float]  # the same with the records that structured modelling wants
    cache_retrieval_ms: float
    structured_ms: float
    structured_cloud_ms: float
    ranking_ms: Mapping[str, float]  # on the device, with structured modelling: "20", "100", "500", "cache"
    ranking_skip_ms: Mapping[str, float]  # the same without
    ranking_cloud_ms: Mapping[str, float]  # by structured modelling: "skip", "cloud"

    def __post_init__(self):
        problems = []
        for name, expected in _MEASURED_KEYS.items():
            if set(getattr(self, name)) != set(expected):
                problems.append(f"{name} has keys {sorted(getattr(self, name))}, expected {list(expected)}")
        for name, value in self._numbers():
            if not 0 <= value < float("inf"):
                problems.append(f"{name} is {value}, expected a finite number of milliseconds, 0 or more")
        if problems:
            raise UserError("bad measured times: " + "; ".join(problems) + f". {_MEND}")

    def _numbers(self) -> list[tuple[str, float]]:
        numbers = []
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, Mapping):
                numbers.extend((f"{entry.name}[{key!r}]", number) for key, number in value.items())
            else:
                numbers.append((entry.name, value))
        return numbers

    @classmethod
    def from_json(cls, data: Mapping) -> "MeasuredTimes":
        """Reads what ``dataclasses.asdict`` wrote, also in the form of version 0.1 (bare functions, fewer shapes).

        Raises:
          UserError: a key is missing or unknown, or a time is not a finite number of milliseconds.
        """
        expected = {entry.name for entry in fields(cls)}
        try:
            if set(data) == _KEYS_0_1:
                data = _from_0_1(data)
            if set(data) != expected:
                raise UserError(f"bad measured times: got keys {sorted(data)}, expected {sorted(expected)}. {_MEND}")
            numbers: dict = {name: float(data[name]) for name in expected - set(_MEASURED_KEYS)}
            maps: dict = {name: {key: float(value) for key, value in data[name].items()} for name in _MEASURED_KEYS}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"bad measured times: {error!r} in {dict(data)}, expected milliseconds. {_MEND}") from error
        return cls(**numbers, **maps)


_MEND = "Measure again with `cda4rec calibrate`."
_MEASURED_KEYS: Mapping[str, tuple[str, ...]] = {
    "abstract_ms": (*_LEVEL_NAMES, "reuse"),
    "abstract_beside_ms": (*_LEVEL_NAMES, "reuse"),
    "semantic_ms": _LEVEL_NAMES,
    "retrieval_ms": _COUNT_NAMES,
    "retrieval_evidence_ms": _COUNT_NAMES,
    "ranking_ms": _POOL_NAMES,
    "ranking_skip_ms": _POOL_NAMES,
    "ranking_cloud_ms": ("skip", "cloud"),
}
_KEYS_0_1 = {
    *("planning_ms", "abstract_ms", "semantic_ms", "retrieval_ms", "cache_retrieval_ms", "structured_ms", "ranking_ms"),
    "ranking_cloud_ms",
}


def _from_0_1(data: Mapping) -> dict:
    """Times as version 0.1 measured them: functions alone, one shape where there are several now; predicts what it predicted."""
    ranking = {**data["ranking_ms"], "cache": data["ranking_ms"][str(CACHED_CANDIDATES)]}
    abstract = {**dict.fromkeys(_LEVEL_NAMES, data["abstract_ms"]), "reuse": 0.0}
    return {
        **data,
        "abstract_ms": abstract,
        "abstract_beside_ms": abstract,
        "retrieval_evidence_ms": data["retrieval_ms"],
        "structured_cloud_ms": data["structured_ms"],
        "ranking_ms": ranking,
        "ranking_skip_ms": ranking,
        "ranking_cloud_ms": dict.fromkeys(("skip", "cloud"), data["ranking_cloud_ms"]),
    }


def measured_profile(times: MeasuredTimes) -> CostProfile:
    """Times of these models on this machine. The machine stands for a high-tier device; lower tiers are TIER_SLOWDOWN as slow.

    Shapes are padded, so times do not depend on the history; there is no queue; cloud sub-tasks take what they take here. Energy
    is modelled, as in the deployment profile: no energy was measured.
    """
    slowdown = jnp.asarray(TIER_SLOWDOWN)
    zero = jnp.asarray(0.0)
    abstracts = (times.abstract_ms, times.abstract_beside_ms)
    abstract_ms = jnp.asarray([[abstract[name] for name in ("reuse", *_LEVEL_NAMES)] for abstract in abstracts])
    rankings = (times.ranking_skip_ms, times.ranking_ms)
    ranking_ms = jnp.asarray([[ranking[name] for name in _POOL_NAMES] for ranking in rankings])
    retrievals = (times.retrieval_ms, times.retrieval_evidence_ms)
    return CostProfile(
        name="measured",
        planning_ms=times.planning_ms * slowdown,
        abstract_ms=slowdown[:, None, None] * abstract_ms[None, :, :],
        semantic_ms=jnp.asarray([0.0, *(times.semantic_ms[name] for name in _LEVEL_NAMES)]),
        semantic_ms_per_event=zero,
        retrieval_ms=jnp.asarray([[retrieval[name] for name in _COUNT_NAMES] for retrieval in retrievals]),
        cache_retrieval_ms=times.cache_retrieval_ms * slowdown,
        structured_ms=times.structured_ms * slowdown,
        structured_ms_per_event=0.0 * slowdown,
        structured_cloud_ms=jnp.asarray(times.structured_cloud_ms),
        structured_cloud_ms_per_event=zero,
        ranking_ms=slowdown[:, None, None] * ranking_ms[None, :, :],
        ranking_cloud_ms=jnp.asarray([times.ranking_cloud_ms[name] for name in ("skip", "cloud")]),
        queue_ms=zero,
        **_energy_fields(),
    )


def _energy_fields() -> dict[str, Array]:
    return {
        "device_power_w": jnp.asarray(DEVICE_POWER_W),
        "radio_uplink_mj_per_kb": jnp.asarray(RADIO_UPLINK_MJ_PER_KB),
        "radio_downlink_mj_per_kb": jnp.asarray(RADIO_DOWNLINK_MJ_PER_KB),
        "radio_active_w": jnp.asarray(RADIO_ACTIVE_W),
    }
