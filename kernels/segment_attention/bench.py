"""Forward and backward pass against plain attention; see ``kernels.workloads``."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int, PRNGKeyArray

from cda4rec_jax.kernels.segment_attention import segment_attention
from cda4rec_jax.kernels.segment_attention.cases import WORKLOAD_CASES, Case
from cda4rec_jax.kernels.workloads import PLAIN, Workload

INPUT_BYTES = 64 * 2**20  # inputs are rotated, so that they do not stay in cache; more than most caches hold


def plain_attention(
    query: Float[Array, "r t n h"],
    key: Float[Array, "r t m h"],
    value: Float[Array, "r t m h"],
    segment_ids: Int[Array, "r t"],
    *,
    dropout_rate: float,
    dropout_key: PRNGKeyArray,
) -> Float[Array, "r t n h"]:
    """What one would write: grouped einsums, a masked softmax, and dropout by the generator of JAX (16 bits a weight)."""
    rows, length, heads, head_size = query.shape
    kv_heads = key.shape[2]
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    mask = same & jnp.tril(jnp.ones((length, length), bool))[None] & (segment_ids > 0)[:, None, :]
    grouped = query.reshape(rows, length, kv_heads, heads // kv_heads, head_size)
    logits = jnp.einsum("rtmgh,rumh->rmgtu", grouped, key)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], logits, -1e9), axis=-1)
    if dropout_rate > 0.0:
        bits = jax.random.bits(dropout_key, weights.shape, jnp.uint16)
        weights = jnp.where(bits >= round(dropout_rate * 65536), weights / (1.0 - dropout_rate), 0.0)
    return jnp.einsum("rmgtu,rumh->rtmgh", weights, value).reshape(query.shape)


def workloads(backend: str) -> Iterator[Workload]:
    """The rows that we train on, without and with dropout; the same everywhere."""
    for case in WORKLOAD_CASES:
        for dropout_rate in (0.0, 0.5):
            yield workload(case, dropout_rate, backend)


def workload(case: Case, dropout_rate: float, backend: str) -> Workload:
    """One case with the implementations of a backend; forward and backward."""
    first = make_inputs(case, 0)
    num_batches = max(2, INPUT_BYTES // sum(array.nbytes for array in first))
    options = {"dropout_rate": dropout_rate, "dropout_key": jax.random.key(0, impl="unsafe_rbg")}  # the generator of training
    attentions: dict[str, Callable[..., Array]] = {PLAIN: plain_attention, "segment_attention": segment_attention}
    if backend == "cpu":  # elsewhere it is what `segment_attention` chooses
        attentions["xla"] = partial(segment_attention, implementation="xla")
    reads = _reads(np.asarray(first[3]))
    return Workload(
        kernel="segment_attention",
        name=f"{case.name}, dropout {dropout_rate}",
        shapes=f"{case.rows} rows of {case.length}, {case.heads} heads of {case.head_size}, float32, forward and backward",
        batches=[first, *(make_inputs(case, seed) for seed in range(1, num_batches))],
        programs={name: _both_passes(partial(attention, **options)) for name, attention in attentions.items()},
        # Scores and mixing, and twice each in the backward pass.
        flops=3 * 2 * 2.0 * reads * case.heads * case.head_size,
        bytes_moved=2.0 * sum(array.nbytes for array in first),
        dtype="float32",
        difference=_largest_difference,
        tolerance=math.inf if dropout_rate else 1e-4,  # dropout falls on other weights
    )


def _both_passes(attention: Callable[..., Array]) -> Callable[..., tuple[Array, ...]]:
    """Output and gradients of ``attention`` for the cotangent that is the last input."""

    def run(query: Array, key: Array, value: Array, segment_ids: Array, cotangent: Array) -> tuple[Array, ...]:
        out, pull_back = jax.vjp(lambda *operands: attention(*operands, segment_ids), query, key, value)
        return out, *pull_back(cotangent)

    return run


def make_inputs(case: Case, seed: int) -> tuple[Array, ...]:
    rng = np.random.default_rng(seed)
    shapes = [(case.rows, case.length, heads, case.head_size) for heads in (case.heads, case.kv_heads, case.kv_heads, case.heads)]
    query, key, value, cotangent = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    return query * case.head_size**-0.5, key, value, jnp.asarray(case.segment_ids(seed)), cotangent


def _reads(segment_ids: Int[np.ndarray, "r t"]) -> int:
    """Pairs of a token and one that it reads: of its own segment, up to itself."""
    same = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (segment_ids > 0)[:, None, :]
    return int(np.tril(same).sum())


def _largest_difference(found: Any, expected: Any) -> float:
    """Of output and gradients, at tokens that are no padding: the two may differ there."""
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in zip(found, expected, strict=True))
