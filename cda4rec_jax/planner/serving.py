"""A planner at serving speed: one request in as one NumPy vector, the chosen plan and all scores out as one NumPy vector.

Mask, predicted costs and the planner are traced as they are (``plan_space.allowed``, ``costs.plan_costs``, ``Planner.logits``), with
weights and profile as constants, so that there is one definition of each. What makes it fast is how it is called: a dispatch takes
longer than the arithmetic, so a request is one array with one dispatch, and one request runs as a single kernel on a CPU.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.xla_metadata import set_xla_metadata
from jaxtyping import Float, Int

from cda4rec_jax.array_typing import Array, PlanLogits, PlanMask
from cda4rec_jax.messages import Context, DeviceTier, EgressLevel, Link
from cda4rec_jax.planner.cost_profiles import CostProfile
from cda4rec_jax.planner.costs import PayloadSizes, plan_costs
from cda4rec_jax.planner.plan_space import STANDARD, PlanSpace, allowed
from cda4rec_jax.planner.policy import Planner, choose, permitted

CONTEXT_FIELDS = tuple(field.name for field in dataclasses.fields(Context))
ENUM_SIZES = {"cache_level": len(EgressLevel), "tier": len(DeviceTier), "link": len(Link), "consent": len(EgressLevel)}
BLOCK = 4096  # requests that are decided at once: their tables stay in the cache of a core
SMALLEST_BLOCK = 64

Packed = Float[Array, "b field"]


def pack(context: Context) -> Packed:
    """``b`` contexts as rows of float32 in the order of ``CONTEXT_FIELDS``, enums as their numbers; jittable."""
    return jnp.stack([jnp.asarray(getattr(context, name), jnp.float32) for name in CONTEXT_FIELDS], axis=1)


def unpack(packed: Packed) -> Context:
    """The contexts that ``pack`` packed; jittable. An enum that is not a number becomes 0, which for consent is NOTHING."""
    columns = {name: packed[:, column] for column, name in enumerate(CONTEXT_FIELDS)}
    return Context(**{name: values.astype(jnp.int32) if name in ENUM_SIZES else values for name, values in columns.items()})


class Served(NamedTuple):
    """The decision of one request."""

    plan_index: int
    scores: Float[np.ndarray, "p"]  # the planner's logits; -inf where a plan cannot be chosen


class ServedPlanner:
    """A planner with its mask and predicted costs, compiled for one machine. Safe to share between threads.

    A call takes one packed request and gives its decision. Small programs run faster where ``jax_cpu_enable_async_dispatch`` is off,
    as ``cda4rec`` sets it for its process; that is the process's choice, and results are the same.

    Args:
        planner: a policy, or anything that scores plans; later changes of its weights are not seen.
        profile: what sub-tasks cost.
        exposure_by_level: exposure of each EgressLevel; entry NOTHING is 0.
        sizes: bytes of what travels.
        space: the plans that there are.
    """

    def __init__(
        self,
        planner: Planner,
        profile: CostProfile,
        exposure_by_level: Float[Array, "level"],
        sizes: PayloadSizes,
        space: PlanSpace = STANDARD,
    ) -> None:
        plan, self._last_resort = _frozen(planner), space.last_resort

        def answers(packed: Packed) -> tuple[PlanLogits, PlanMask]:
            context = unpack(packed)
            mask = allowed(context, space)
            return plan().logits(context, plan_costs(profile, context, exposure_by_level, sizes, space=space), mask), mask

        self._one = single_kernel(lambda request: permitted(*answers(request[None, :]))[0])
        self._scores = jax.jit(lambda packed: permitted(*answers(packed)))
        self._choices = jax.jit(lambda packed: choose(*answers(packed), space))

    def __call__(self, request: Float[np.ndarray, "field"]) -> Served:
        """Decide one request, a row of ``pack``."""
        scores = np.asarray(self._one(request))
        # NumPy finds the largest of a few numbers in less time than a reduction takes in the kernel.
        best = int(scores.argmax())
        return Served(best if scores[best] > -np.inf else self._last_resort, scores)

    def scores(self, packed: Float[np.ndarray, "b field"]) -> Float[np.ndarray, "b p"]:
        """Scores of many requests."""
        return _in_blocks(self._scores, packed)

    def choices(self, packed: Float[np.ndarray, "b field"]) -> Int[np.ndarray, "b"]:
        """Chosen plans of many requests."""
        return _in_blocks(self._choices, packed)


def _frozen(planner: Planner) -> Callable[[], Planner]:
    """The planner of this moment: a module's weights are copied, since training may go on to change them."""
    if not isinstance(planner, nnx.Module):
        return lambda: planner
    graph, state = nnx.split(planner)
    kept = jax.tree.map(np.array, state)
    return lambda: nnx.merge(graph, jax.tree.map(jnp.asarray, kept))


def single_kernel(function: Callable[[Array], Array]) -> Callable[[Any], jax.Array]:
    """``function``, jitted; as one kernel on a CPU, where XLA would hand its 25 small operations from thread to thread.

    XLA calls that a small call, and marks loops with it that are too short for threads. A backend that does not know the mark
    compiles what it would compile without it.
    """
    inner = jax.jit(function)

    def called(request: Array) -> Array:
        with set_xla_metadata(xla_cpu_small_call="true", inlineable="false"):
            return inner(request)

    return jax.jit(called)


def _in_blocks(function: Callable[[Any], jax.Array], packed: Float[np.ndarray, "b field"]) -> Any:
    """Rows by blocks of ``BLOCK``, the last one padded to a power of two: few shapes to compile for."""
    size = len(packed)
    if size == 0:
        return np.asarray(function(np.zeros((SMALLEST_BLOCK, packed.shape[1]), np.float32)))[:0]
    found = [function(_padded(packed[start : start + BLOCK])) for start in range(0, size, BLOCK)]
    return np.concatenate([np.asarray(block) for block in found])[:size]


def _padded(rows: Float[np.ndarray, "b field"]) -> Float[np.ndarray, "c field"]:
    wanted = max(SMALLEST_BLOCK, 1 << (len(rows) - 1).bit_length())
    return rows if wanted == len(rows) else np.pad(rows, ((0, wanted - len(rows)), (0, 0)))
