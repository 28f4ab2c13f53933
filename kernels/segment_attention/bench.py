"""Forward and backward pass against plain attention: ``python -m cda4rec_jax.kernels.segment_attention.bench``.

By the method of ``cda4rec_jax.timing``. An exclamation mark stands behind a null that is outside of .95 to 1.05 after three attempts: the
machine was too busy, run again.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int, PRNGKeyArray

from cda4rec_jax.kernels.segment_attention import segment_attention
from cda4rec_jax.kernels.segment_attention.cases import WORKLOAD_CASES, Case
from cda4rec_jax.timing import Contestant, measure

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


def compiled(attention: Callable[..., Array], inputs: tuple[Array, ...]) -> jax.stages.Compiled:
    """Output and gradients of ``attention`` for the cotangent that is the last input."""

    def both_passes(query: Array, key: Array, value: Array, segment_ids: Array, cotangent: Array) -> tuple[Array, ...]:
        out, pull_back = jax.vjp(lambda *operands: attention(*operands, segment_ids), query, key, value)
        return out, *pull_back(cotangent)

    return jax.jit(both_passes).lower(*inputs).compile()


def make_inputs(case: Case, seed: int) -> tuple[Array, ...]:
    rng = np.random.default_rng(seed)
    shapes = [(case.rows, case.length, heads, case.head_size) for heads in (case.heads, case.kv_heads, case.kv_heads, case.heads)]
    query, key, value, cotangent = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    return query * case.head_size**-0.5, key, value, jnp.asarray(case.segment_ids(seed)), cotangent


def contestant(name: str, program: jax.stages.Compiled, batches: list[tuple[Array, ...]]) -> Contestant:
    """One call is one pass forward and back, on the next batch."""

    def call(number: int) -> float:
        jax.block_until_ready(program(*batches[number % len(batches)]))
        return 1.0

    return Contestant(name=name, call=call)


def measured(case: Case, dropout_rate: float) -> str:
    """One line of the table."""
    first = make_inputs(case, 0)
    num_batches = max(2, INPUT_BYTES // sum(array.nbytes for array in first))
    batches = [first, *(make_inputs(case, seed) for seed in range(1, num_batches))]
    dropout_key = jax.random.key(0, impl="unsafe_rbg")  # the generator of the training loop
    options = {"dropout_rate": dropout_rate, "dropout_key": dropout_key}
    plain, kernel = (compiled(partial(attention, **options), first) for attention in (plain_attention, segment_attention))
    found = measure([contestant("kernel", kernel, batches), contestant("plain", plain, batches)], [("kernel", "plain")])
    ratio, null = found.ratio("kernel", "plain"), found.nulls["kernel"]
    analyses = (program.memory_analysis() for program in (plain, kernel))
    megabytes = [math.nan if analysis is None else analysis.temp_size_in_bytes / 2**20 for analysis in analyses]
    plain_ms, kernel_ms = (1e3 / found.rates[name].median for name in ("plain", "kernel"))
    return (
        f"{case.name:22} {dropout_rate:7.1f} {plain_ms:9.2f} {kernel_ms:9.2f} {ratio.median:7.2f} [{ratio.p10:.2f}, {ratio.p90:.2f}]"
        f" {null:6.2f}{' ' if found.accepted else '!'} {megabytes[0]:8.1f} {megabytes[1]:9.1f}"
    )


def main() -> None:
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {device.platform} {device.device_kind}, forward and backward, float32")
    print(f"{'case':22} dropout  plain ms kernel ms   ratio [10%, 90%]     null  plain MB kernel MB")
    for case in WORKLOAD_CASES:
        for dropout_rate in (0.0, 0.5):
            print(measured(case, dropout_rate), flush=True)


if __name__ == "__main__":
    main()
