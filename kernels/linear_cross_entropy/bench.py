"""Loss and gradients against materialised logits, and what others of its implementations do; see ``kernels.workloads``."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from cda4rec_jax.kernels.linear_cross_entropy import linear_cross_entropy
from cda4rec_jax.kernels.linear_cross_entropy.cases import ACCELERATOR_CASES, WORKLOAD_CASES, Case
from cda4rec_jax.kernels.workloads import PLAIN, Workload
from cda4rec_jax.processor import has_matrix_unit

NUM_BATCHES = 4
MOST_PLAIN_LOGITS = 2**31  # above, plain JAX would not fit into an accelerator's memory: the chunked version is the baseline
OURS = "linear_cross_entropy"


def plain_loss(
    items: Float[Array, "i d"], hidden: Float[Array, "t d"], targets: Int[Array, "t"], weights: Float[Array, "t"]
) -> Float[Array, ""]:
    """What one would write: all logits, and their log-softmax."""
    logits = jnp.matmul(hidden, items.T.astype(hidden.dtype), preferred_element_type=jnp.float32).at[:, 0].set(-jnp.inf)
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    return jnp.sum(weights * (jax.nn.logsumexp(logits, axis=1) - chosen))


def workloads(backend: str) -> Iterator[Workload]:
    """Training steps of our presets on a CPU, and large catalogues in 16 bits elsewhere."""
    for case in WORKLOAD_CASES if backend == "cpu" else ACCELERATOR_CASES:
        yield workload(case, backend)


def workload(case: Case, backend: str) -> Workload:
    """One case with the implementations of a backend; forward and backward."""
    rng = np.random.default_rng(0)
    items = jnp.asarray(rng.normal(size=(case.num_items, case.width)) * case.width**-0.5, jnp.float32)
    batches = [_batch(case, rng) for _ in range(NUM_BATCHES)]
    names = {"gpu": (None, "xla", "triton"), "cpu": (None, "xla")}.get(backend, (None,))
    losses: dict[str, Callable[..., Array]] = {
        name or OURS: _operands_in_order(partial(linear_cross_entropy, implementation=name)) for name in names
    }
    if backend == "cpu" and has_matrix_unit():
        losses[f"{OURS}, operands split"] = _operands_in_order(_split)
    has_plain = case.tokens * case.num_items <= MOST_PLAIN_LOGITS
    if has_plain:
        losses = {PLAIN: plain_loss} | losses
    size = jnp.dtype(case.dtype).itemsize
    return Workload(
        kernel="linear_cross_entropy",
        name=case.name,
        shapes=f"{case.tokens:,} tokens, {case.num_items - 1:,} items, width {case.width}, {case.dtype}, forward and backward",
        constants=(items,),
        batches=batches,
        programs={name: jax.value_and_grad(loss, argnums=(0, 1)) for name, loss in losses.items()},
        baseline=PLAIN if has_plain else "xla",
        flops=6.0 * case.tokens * case.num_items * case.width,
        bytes_moved=2.0 * case.width * (case.tokens * size + case.num_items * 4.0),
        dtype=case.dtype,
        difference=_relative_difference,
        tolerance=1e-4 if case.dtype == "float32" else 0.05,
    )


def _split(*operands: Array) -> Array:
    """As training on a CPU with a matrix unit has it by default; other programs of one run keep all bits."""
    with jax.default_matmul_precision("high"):
        return linear_cross_entropy(*operands)


def _operands_in_order(loss: Callable[..., Array]) -> Callable[..., Array]:
    return lambda items, hidden, targets, weights: loss(hidden, items, targets, weights)


def _batch(case: Case, rng: np.random.Generator) -> tuple[Array, ...]:
    hidden = jnp.asarray(rng.normal(size=(case.tokens, case.width)), case.dtype)
    targets = jnp.asarray(rng.integers(1, case.num_items, case.tokens), jnp.int32)
    return hidden, targets, jnp.full((case.tokens,), 1.0 / case.tokens, jnp.float32)


def _relative_difference(found: Any, expected: Any) -> float:
    """The largest of loss and gradients, relative to the largest entry of each."""
    off = [
        np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).max() / np.abs(np.asarray(b, np.float32)).max()
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    ]
    return float(max(off))
