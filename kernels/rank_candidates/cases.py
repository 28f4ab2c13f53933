"""Shapes that every implementation must agree on, and the workloads that matter; and weights and requests of such shapes."""

from dataclasses import dataclass, replace

import numpy as np

from cda4rec_jax.array_typing import Array
from cda4rec_jax.kernels.rank_candidates.weights import RankerWeights


@dataclass(frozen=True, kw_only=True)
class Case:
    """``tokens`` of ``window`` are there."""

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp_hidden: int
    window: int
    tokens: int
    candidates: int
    features: int = 26
    moderating: int = 6
    head_hidden: int = 32


SMALL_CASE = Case(
    name="small",
    layers=2,
    width=12,
    heads=2,
    kv_heads=1,
    mlp_hidden=10,
    window=9,
    tokens=7,
    candidates=5,
    features=4,
    moderating=2,
)
_TWO_LAYERS = Case(
    name="two layers of 64", layers=2, width=64, heads=2, kv_heads=2, mlp_hidden=64, window=51, tokens=51, candidates=100
)
CONTRACT_CASES = (
    Case(
        name="as small as it gets",
        layers=1,
        width=2,
        heads=1,
        kv_heads=1,
        mlp_hidden=1,
        window=1,
        tokens=1,
        candidates=1,
        features=1,
        moderating=1,
        head_hidden=1,
    ),
    Case(
        name="odd everything",
        layers=3,
        width=18,
        heads=3,
        kv_heads=1,
        mlp_hidden=7,
        window=23,
        tokens=19,
        candidates=37,
        features=5,
        moderating=2,
        head_hidden=13,
    ),
    replace(_TWO_LAYERS, name="whole vectors, a full window"),
    Case(
        name="shared keys, wide layers",
        layers=2,
        width=96,
        heads=4,
        kv_heads=2,
        mlp_hidden=200,
        window=34,
        tokens=33,
        candidates=20,
    ),
    Case(
        name="a short history in a long window",
        layers=1,
        width=32,
        heads=2,
        kv_heads=2,
        mlp_hidden=32,
        window=201,
        tokens=3,
        candidates=16,
    ),
)
WORKLOAD_CASES = (
    replace(_TWO_LAYERS, name="the presets' device", layers=1, width=32, mlp_hidden=32),
    _TWO_LAYERS,
    replace(_TWO_LAYERS, name="two layers of 64, 500 candidates", candidates=500),
)


def random_weights(case: Case, seed: int = 0) -> RankerWeights:
    """Of a size at which every part of the network changes the outcome."""
    draws = np.random.default_rng(seed)

    def normal(*shape: int) -> Array:
        return (draws.normal(size=shape) * shape[-2] ** -0.5 if len(shape) > 1 else draws.normal(size=shape)).astype(np.float32)

    n, e, f = case.layers, case.width, case.features
    size = e // case.heads
    return RankerWeights(
        attention_norm=1 + 0.1 * normal(n, e),
        qkv=normal(n, e, (case.heads + 2 * case.kv_heads) * size),
        out=normal(n, case.heads * size, e),
        mlp_norm=1 + 0.1 * normal(n, e),
        gate_up=normal(n, e, 2 * case.mlp_hidden),
        down=normal(n, case.mlp_hidden, e),
        final_norm=1 + 0.1 * normal(e),
        linear=normal(f),
        moderators=normal(case.moderating, f),
        moderating=draws.permutation(f)[: case.moderating].astype(np.int32),
        hidden=normal(f, case.head_hidden),
        bias=normal(case.head_hidden),
        out_units=normal(case.head_hidden),
        mean=normal(f),
        deviation=np.exp(normal(f)),
        gates=np.where(draws.random(f) < 0.5, draws.integers(0, f, f), f).astype(np.int32),
        score_scale=np.asarray(0.5, np.float32),
        num_heads=case.heads,
        num_kv_heads=case.kv_heads,
        window=case.window,
        score_feature=f // 2,
    )


@dataclass(frozen=True, kw_only=True)
class RankerInputs:
    """Tokens of one history, of which ``case.tokens`` are real, and its candidates."""

    tokens: Array
    vectors: Array
    vector_scales: Array
    features: Array


def random_inputs(case: Case, seed: int = 1) -> RankerInputs:
    """Padding holds what no real token holds: who reads it is found out."""
    draws = np.random.default_rng(seed)
    tokens = draws.normal(size=(case.window, case.width)).astype(np.float32)
    tokens[case.tokens :] = np.nan
    vectors = draws.integers(-127, 128, (case.candidates, case.width), dtype=np.int8)
    vector_scales = draws.uniform(0.5, 1.5, case.candidates).astype(np.float32) / 127
    features = draws.normal(size=(case.candidates, case.features)).astype(np.float32)
    return RankerInputs(tokens=tokens, vectors=vectors, vector_scales=vector_scales, features=features)
