"""The systems of ``cda4rec bench plan``: ours and others, each from NumPy to NumPy, with its outputs checked against ours."""

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from cda4rec_jax.array_typing import Array
from cda4rec_jax.bench.peers.numpy_planning import Network, NumpyDecision
from cda4rec_jax.bench.systems import System, started
from cda4rec_jax.errors import UserError
from cda4rec_jax.planner import (
    ContextConfig,
    CostProfile,
    PayloadSizes,
    Policy,
    PolicyConfig,
    UserFacts,
    WeightScales,
    context_features,
    deployment_profile,
    sample_contexts,
)
from cda4rec_jax.planner.serving import BLOCK, ServedPlanner, pack, single_kernel, unpack
from cda4rec_jax.runs.artifacts import load_trained

DECISION, NETWORK = "ours, whole decision", "ours, network alone"
TOLERANCE = 1e-5  # of outputs, relative to the largest
NUM_CONTEXTS = 1 << 17  # that rotate

Rows = Float[np.ndarray, "_ _"]  # of any number and width


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A trained policy, what it decides from, and contexts."""

    name: str
    policy: Policy
    profile: CostProfile
    exposure_by_level: Float[Array, "level"]
    sizes: PayloadSizes
    requests: Rows  # packed
    features: Rows  # of the same contexts


def setting_of(run: Path | None) -> Setting:
    """The policy of a run, or the standard policy with random weights; requests of contexts v1."""
    if run is not None:
        trained = load_trained(run)
        if trained.system.policy is None:
            raise UserError(f"{run} holds a baseline without a planner: --run takes a joint run")
        if not isinstance(trained.system.policy, Policy):
            raise UserError(
                f"{run} has a planner of its own ({type(trained.system.policy).__name__}): --run takes one with Policy"
            )
        world = trained.world()
        name, policy = trained.corpus.interactions.name, trained.system.policy
        profile, exposure, sizes, scales = world.profile, world.exposure_by_level, world.sizes, world.scales
    else:
        name, policy = "random-weights", Policy(PolicyConfig(), rngs=nnx.Rngs(0))
        last = policy.context_tower.layers[-1]
        last.kernel[...] = jax.random.normal(jax.random.key(0), last.kernel.shape)
        profile, exposure, sizes = deployment_profile(), jnp.asarray([0.0, 0.1, 0.3, 0.8]), PayloadSizes()
        scales = WeightScales.of(quality_gap=0.04, latency_gap_ms=80.0, energy_gap_mj=100.0, exposure_gap=0.5)
    requests = _requests(scales)
    features = np.asarray(jax.jit(lambda rows: context_features(unpack(rows)))(requests))
    return Setting(
        name=name,
        policy=policy,
        profile=profile,
        exposure_by_level=exposure,
        sizes=sizes,
        requests=requests,
        features=features,
    )


def _requests(scales: WeightScales) -> Rows:
    draws = np.random.default_rng(0)
    facts = UserFacts(
        history_length=draws.integers(1, 200, NUM_CONTEXTS).astype(np.float32),
        category_entropy=draws.uniform(0.0, 3.0, NUM_CONTEXTS).astype(np.float32),
        rare_share=draws.uniform(0.0, 1.0, NUM_CONTEXTS).astype(np.float32),
        session_count=draws.integers(1, 20, NUM_CONTEXTS).astype(np.float32),
        hours_since_last=draws.exponential(24.0, NUM_CONTEXTS).astype(np.float32),
        has_timestamps=np.ones(NUM_CONTEXTS, np.float32),
        max_cache_age=np.full(NUM_CONTEXTS, 10.0, np.float32),
    )
    draw = jax.jit(lambda facts, events: pack(sample_contexts(facts, events, scales, 0, ContextConfig())))
    return np.asarray(draw(facts, np.arange(NUM_CONTEXTS)))


def network_of(policy: Policy) -> Network:
    """The policy's quality network with its plan tower multiplied into the last layer, which spares others a product."""
    layers = policy.context_tower.layers
    dense = [(np.asarray(layer.kernel[...]), np.asarray(layer(jnp.zeros((1, layer.in_features))))[0]) for layer in layers]
    scale = np.float32(policy.quality_scale[...]) / np.float32(policy.config.rank**0.5)
    plans = np.asarray(policy.plan_vectors()).T * scale
    kernel, bias = dense[-1]
    last = (kernel @ plans, bias @ plans + np.asarray(policy.mean_quality[...]))
    return Network(layers=(*dense[:-1], last), tau=float(policy.tau()))


def systems_of(setting: Setting, batch: int, peers: Sequence[str], threads: int) -> list[System]:
    """Every system at a batch size, ready; ours come first, and are what the others' outputs are compared with.

    Raises:
        UserError: outputs differ by more than ``TOLERANCE``.
    """
    served = ServedPlanner(setting.policy, setting.profile, setting.exposure_by_level, setting.sizes)
    policy, network = setting.policy, network_of(setting.policy)
    requests, features = _rotating(setting.requests, batch), _rotating(setting.features, batch)
    decision = served if batch == 1 else served.choices
    alone = single_kernel(lambda row: policy.quality(row[None, :])[0]) if batch == 1 else jax.jit(policy.quality)
    ours = {"version": f"jax {jax.__version__}", "against": ()}
    qualities = np.asarray(jax.jit(policy.quality)(setting.features[:BLOCK]))
    scores = served.scores(setting.requests[:BLOCK])
    rows, feature_rows = ([one[0] for one in requests], [one[0] for one in features]) if batch == 1 else (requests, features)
    found = [
        System(name=DECISION, run=decision, inputs=rows, **ours),
        System(name=NETWORK, run=lambda given: np.asarray(alone(given)), inputs=feature_rows, **ours),
    ]
    others = _networks(network, peers, threads if batch > 1 else 1)
    for peer, quality in others.items():
        off = _off(quality(setting.features[:BLOCK]), qualities)
        # The aim sets our whole decision against onnxruntime's network.
        against = (NETWORK, DECISION) if peer == "onnxruntime" else (NETWORK,)
        found.append(_peer(f"{peer}, network alone", peer, quality, features, against, off))
    for peer, quality in others.items():
        if peer != "torch":
            plain = NumpyDecision(quality, network.tau, setting.profile, setting.exposure_by_level, setting.sizes)
            name = "numpy, whole decision" if peer == "numpy" else f"{peer} and numpy, whole decision"
            off = _off(plain(setting.requests[:BLOCK]), scores)
            found.append(_peer(name, peer, plain if batch == 1 else plain.choices, requests, (DECISION,), off))
    for one in found:
        if not one.difference <= TOLERANCE:
            raise UserError(
                f"{one.name!r} is {one.difference:.1e} off our outputs, relative to the largest: more than {TOLERANCE}, so speeds say "
                "nothing. This is a bug to report"
            )
    return [started(one) for one in found]


def _networks(network: Network, peers: Sequence[str], threads: int) -> Mapping[str, Callable[[np.ndarray], np.ndarray]]:
    found: dict[str, Callable[[np.ndarray], np.ndarray]] = {}
    if "onnxruntime" in peers:
        from cda4rec_jax.bench.peers.onnx_planning import onnx_network

        found["onnxruntime"] = onnx_network(network, threads=threads)
    if "torch" in peers:
        from cda4rec_jax.bench.peers.torch_planning import torch_network

        found["torch"] = torch_network(network, threads=threads)
    if "numpy" in peers:
        found["numpy"] = network
    return found


def _peer(
    name: str,
    package: str,
    run: Callable[[np.ndarray], object],
    inputs: Sequence[np.ndarray],
    against: tuple[str, ...],
    off: float,
) -> System:
    version = f"{package} {importlib.metadata.version(package)}"
    return System(name=name, version=version, against=against, run=run, inputs=inputs, difference=off)


def _rotating(rows: Rows, batch: int) -> list[Rows]:
    most = max(2, min(BLOCK, len(rows) // batch))
    return [np.ascontiguousarray(rows[start * batch : (start + 1) * batch]) for start in range(most)]


def _off(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, relative to the largest finite number; infinite where other plans are forbidden."""
    finite = np.isfinite(expected)
    if not np.array_equal(finite, np.isfinite(found)):
        return float("inf")
    return float(np.abs(found[finite] - expected[finite]).max() / np.abs(expected[finite]).max())
