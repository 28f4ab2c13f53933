"""Single planners over drawn requests: what each chooses in every context, and what that brings, request by request."""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from cda4rec_jax.array_typing import Array, PlanValues
from cda4rec_jax.evaluation.answers import BLOCK_USERS, Logits, happened
from cda4rec_jax.pipeline.decisions import Requests
from cda4rec_jax.pipeline.full_ranking import in_batches
from cda4rec_jax.pipeline.planners import PlugIn
from cda4rec_jax.pipeline.population import PlanRecords
from cda4rec_jax.planner import choose as choose_plan
from cda4rec_jax.planner import realised_utility

Choices = UInt8[np.ndarray, "draws n"]
Quantities = dict[str, Float[np.ndarray, "draws n"]]


def choose(records: PlanRecords, logits: Logits) -> Choices:
    """The plan with the highest of a planner's ``logits`` in every context of every user."""
    return _by_blocks(partial(_by_logits, logits=logits), records)["choices"]


def choose_by_quality(records: PlanRecords, quality: Float[Array, "#n p"]) -> Choices:
    """The plan that plug-in takes with this ``quality``: one row for all users, or one for each (a context oracle)."""
    rows = np.broadcast_to(np.asarray(quality, np.float32), records.quality.shape)
    return _by_blocks(_by_quality, records, rows)["choices"]


def choose_in_hindsight(records: PlanRecords) -> Choices:
    """The plan with the highest realised utility: an upper bound that no planner can reach."""
    return _by_blocks(_by_outcome, records, records.quality)["choices"]


def brings(records: PlanRecords, choices: Mapping[str, Choices]) -> dict[str, Quantities]:
    """What each planner's ``choices`` bring in every request, by planner and name of the quantity (those of ``happened``)."""
    stacked = np.stack(list(choices.values()))
    found = _by_blocks(_happened, records, records.quality, records.ranks, np.moveaxis(stacked, -1, 0))
    return {name: {quantity: values[row] for quantity, values in found.items()} for row, name in enumerate(choices)}


def _by_blocks(function: Callable[..., Mapping[str, Array]], records: PlanRecords, *by_user: np.ndarray) -> dict[str, np.ndarray]:
    """``function(requests, *by_user)`` over blocks of users, so that memory is bounded; its results end with the users' axis."""
    num_users, blocks = len(records.users), []
    for index in in_batches(num_users, min(BLOCK_USERS, num_users)):
        size = len(np.unique(index))
        requests = jax.tree.map(lambda leaf, index=index: leaf[:, index], records.requests)
        found = function(requests, *(values[index] for values in by_user))
        blocks.append({name: np.asarray(values)[..., :size] for name, values in found.items()})
    return {name: np.concatenate([block[name] for block in blocks], axis=-1) for name in blocks[0]}


@partial(jax.jit, static_argnames="logits")
def _by_logits(requests: Requests, *, logits: Logits) -> dict[str, Array]:
    flat = _flat(requests)
    return {"choices": _best(logits(flat.context, flat.predicted, flat.mask), requests)}


@jax.jit
def _by_quality(requests: Requests, quality: PlanValues) -> dict[str, Array]:
    flat = _flat(requests)
    believed = PlugIn(quality=jnp.tile(quality, (len(requests.failed), 1)))
    return {"choices": _best(believed.logits(flat.context, flat.predicted, flat.mask), requests)}


@jax.jit
def _by_outcome(requests: Requests, quality: PlanValues) -> dict[str, Array]:
    flat = _flat(requests)
    given = jnp.tile(quality, (len(requests.failed), 1))
    gained = realised_utility(given, flat.realised, flat.context, failed=flat.failed, mask=flat.mask)
    return {"choices": _best(jnp.where(flat.mask, gained, -jnp.inf), requests)}


@jax.jit
def _happened(requests: Requests, quality: PlanValues, ranks: Array, choices: Array) -> dict[str, Array]:
    draws, num_users = requests.failed.shape
    flat = jnp.moveaxis(choices, 0, -1).astype(jnp.int32).reshape(-1, draws * num_users)
    found = happened(_flat(requests), jnp.tile(quality, (draws, 1)), jnp.tile(ranks, (draws, 1)), flat)
    return {name: values.reshape(-1, draws, num_users) for name, values in found.items()}


def _flat(requests: Requests) -> Requests:
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), requests)


def _best(scores: PlanValues, requests: Requests) -> Array:
    mask = requests.mask.reshape(scores.shape)
    return choose_plan(scores, mask, requests.predicted.space).astype(jnp.uint8).reshape(requests.failed.shape)
