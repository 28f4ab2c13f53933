"""The terms of the joint loss, and other losses over the catalogue, as pure functions.

Item 0 is padding: it is no class, no negative, and a token that has it as target counts nothing. The three cross-entropies are those of
``kernels/linear_cross_entropy``, which never has logits of all tokens in memory, and take label smoothing.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int, PRNGKeyArray

from cda4rec_jax.array_typing import Array, ItemVectors, PackedInts, PlanMask, PlanValues
from cda4rec_jax.errors import UserError
from cda4rec_jax.kernels.linear_cross_entropy import linear_cross_entropy
from cda4rec_jax.pipeline.decisions import Requests
from cda4rec_jax.planner import (
    Objective,
    choice_weights,
    context_features,
    entropy,
    expected_utility,
    masked_softmax,
    realised_utility,
)


def catalogue_loss(
    hidden: Float[Array, "r t d"],
    item_vectors: ItemVectors,
    targets: PackedInts,
    chunk_size: int | None,
    label_smoothing: float = 0.0,
    *,
    num_targets: Float[Array, ""] | None = None,
    num_items: int | None = None,
    mesh: Mesh | None = None,
) -> Float[Array, ""]:
    """Mean next-item cross-entropy over the full catalogue at the positions with a target; 0 where there is none.

    Args:
        chunk_size: tokens whose logits exist at a time; None leaves it to ``linear_cross_entropy``, where the loss is made.
        label_smoothing: share of the label that goes from the target to all items (Szegedy et al., arXiv 1512.00567).
        num_targets: what to divide the sum by; None counts the targets. A part of a batch passes the number of the whole.
        num_items: number of items where more rows of padding follow them; None takes all rows but the first.
        mesh: devices to split tokens and items over, see ``linear_cross_entropy``.
    """
    options = {"chunk_size": chunk_size, "label_smoothing": label_smoothing, "num_items": num_items, "mesh": mesh}
    return _mean_over_targets(hidden, item_vectors, targets, num_targets, options)


def sampled_softmax_loss(
    hidden: Float[Array, "r t d"],
    item_vectors: ItemVectors,
    targets: PackedInts,
    negatives: Int[Array, "k"],
    log_probabilities: Float[Array, "k"],
    chunk_size: int | None,
    label_smoothing: float = 0.0,
    *,
    num_targets: Float[Array, ""] | None = None,
    num_items: int | None = None,
    mesh: Mesh | None = None,
) -> Float[Array, ""]:
    """As ``catalogue_loss``, with a normaliser that is estimated from sampled negatives.

    ``-log(exp(s_+) / (exp(s_+) + sum_j exp(s_j - log(k q_j))))`` over the negatives j that are not the target, with s the dot products.
    Subtracting the log of the expected number of draws (Bengio and Senecal, 2008; for retrieval Yi et al., RecSys 2019,
    doi 10.1145/3298689.3346996) makes the normaliser right on average for any q that reaches every item, so that loss and gradient
    go to those of the full cross-entropy as k grows. The target is no draw, so it is not corrected (arXiv 2507.09331).

    Args:
        negatives: k item indices drawn with replacement, shared by all tokens.
        log_probabilities: ``log q`` of each of these draws.
        chunk_size, label_smoothing, num_targets, num_items, mesh: as in ``catalogue_loss``; all items take part in smoothing.
    """
    options = {"chunk_size": chunk_size, "label_smoothing": label_smoothing, "num_items": num_items, "mesh": mesh}
    options |= {"sampled": negatives, "log_counts": log_probabilities + jnp.log(len(negatives))}
    return _mean_over_targets(hidden, item_vectors, targets, num_targets, options)


def in_batch_loss(
    hidden: Float[Array, "r t d"],
    item_vectors: ItemVectors,
    targets: PackedInts,
    log_probabilities: Float[Array, "r t"],
    chunk_size: int | None,
    label_smoothing: float = 0.0,
    *,
    num_targets: Float[Array, ""] | None = None,
    num_items: int | None = None,
    mesh: Mesh | None = None,
) -> Float[Array, ""]:
    """As ``catalogue_loss``, with a normaliser that is estimated from the other targets of the batch.

    The T positions with a target are taken as T independent draws from the items' shares q of all interactions. An item that came up
    several times is one negative, corrected by the log of the probability ``1 - (1 - q)^T`` that it came up at all (Horvitz and
    Thompson, 1952), which is ``log(T q)`` of Yi et al. (RecSys 2019, doi 10.1145/3298689.3346996) for a rare item; the target itself is
    left out.

    Args:
        log_probabilities: ``log q`` of each position's target.
        chunk_size, label_smoothing, num_targets, num_items, mesh: as in ``catalogue_loss``; all items take part in smoothing.
    """
    flat = targets.reshape(-1)
    order = jnp.argsort(flat)
    ordered = flat[order]
    distinct = jnp.where(jnp.diff(ordered, prepend=0) != 0, ordered, 0)
    log_rest = jnp.log1p(-jnp.exp(jnp.minimum(log_probabilities.reshape(-1)[order], -1e-6)))  # finite also where q is 1
    log_inclusion = jnp.log(-jnp.expm1(jnp.sum(flat > 0) * log_rest))
    options = {"chunk_size": chunk_size, "label_smoothing": label_smoothing, "num_items": num_items, "mesh": mesh}
    options |= {"sampled": distinct, "log_counts": jnp.where(distinct > 0, log_inclusion, 0.0)}
    return _mean_over_targets(hidden, item_vectors, targets, num_targets, options)


def _mean_over_targets(
    hidden: Array, item_vectors: Array, targets: Array, num_targets: Array | None, options: dict[str, Any]
) -> Float[Array, ""]:
    flat, tokens = targets.reshape(-1), hidden.reshape(-1, hidden.shape[-1])
    weights = (flat > 0).astype(jnp.float32)
    total = linear_cross_entropy(tokens, item_vectors, flat, weights, **options)
    return total / jnp.maximum(jnp.sum(weights) if num_targets is None else num_targets, 1.0)


def gbce_loss(
    hidden: Float[Array, "t d"],
    item_vectors: ItemVectors,
    targets: Int[Array, "t"],
    weights: Float[Array, "t"],
    negatives: Int[Array, "*t k"],
    calibration: float,
) -> Float[Array, ""]:
    """Generalised binary cross-entropy of gSASRec, weighted mean over tokens; 0 without any weight.

    ``-(beta log sigma(s_+) + sum_j log(1 - sigma(s_j))) / (k + 1)`` with ``beta = alpha (t (1 - 1 / alpha) + 1 / alpha)`` and
    ``alpha = k / (items - 1)`` (Petrov and Macdonald, arXiv 2308.07192). The paper transforms the positive logit into
    ``log(1 / (sigma(s_+)^-beta - 1))``, whose log sigmoid is ``beta log sigma(s_+)``. A negative that is the target counts nothing.

    It has the [t, k] logits in memory: its one caller, gSASRec, draws anew for each row, so that k is some hundreds beside the tokens of
    one row. There is no label to smooth, since beta, not a distribution over the items, says what the target weighs.

    Args:
        hidden: output of the decoder, one row for each token.
        item_vectors: row 0 is padding.
        targets: item index of the next item.
        weights: weight of each token.
        negatives: k item indices drawn uniformly, shared by all tokens [k] or for each token [t, k].
        calibration: t of the paper. 0 is binary cross-entropy, whose scores are too sure of themselves under sampling; 1 is calibrated.

    Raises:
        UserError: fewer than two items, no negative, or a calibration outside [0, 1].
    """
    num_items, num_negatives = item_vectors.shape[0] - 1, negatives.shape[-1]
    if num_items < 2 or num_negatives < 1 or not 0.0 <= calibration <= 1.0:
        raise UserError(
            f"got {num_items} items, {num_negatives} negatives and calibration {calibration}; expected at least 2, at least 1, and 0 to 1."
        )
    alpha = min(num_negatives / (num_items - 1), 1.0)
    beta = alpha * (calibration * (1.0 - 1.0 / alpha) + 1.0 / alpha)
    allowed = (_per_token(negatives) != targets[:, None]) & (_per_token(negatives) > 0)
    rejected = jnp.where(allowed, jax.nn.log_sigmoid(-_negative_logits(hidden, item_vectors, negatives)), 0.0)
    accepted = beta * jax.nn.log_sigmoid(_target_logits(hidden, item_vectors, targets))
    return _weighted_mean(-(accepted + jnp.sum(rejected, axis=1)) / (num_negatives + 1), targets, weights)


def _negative_logits(
    hidden: Float[Array, "t d"], item_vectors: ItemVectors, negatives: Int[Array, "*t k"]
) -> Float[Array, "t k"]:
    if negatives.ndim == 1:
        return hidden @ item_vectors[negatives].T
    return jnp.einsum("td,tkd->tk", hidden, item_vectors[negatives])


def _target_logits(hidden: Float[Array, "t d"], item_vectors: ItemVectors, targets: Int[Array, "t"]) -> Float[Array, "t"]:
    return jnp.sum(hidden * item_vectors[targets], axis=1)


def _per_token(draws: Array) -> Array:
    return draws[None] if draws.ndim == 1 else draws


def _weighted_mean(losses: Float[Array, "t"], targets: Int[Array, "t"], weights: Float[Array, "t"]) -> Float[Array, ""]:
    weights = jnp.where(targets > 0, weights, 0.0)
    total = jnp.sum(weights)
    return jnp.sum(weights * losses) / jnp.where(total > 0, total, 1.0)


def fusion_loss(
    losses: PlanValues, present: Bool[Array, "b p"], probabilities: PlanValues, practice: Float[Array, ""]
) -> Float[Array, ""]:
    """``sum_p rho(p) L(p)``, mean over users, with ``rho = (1 - practice) / P + practice * stop_gradient(pi)``.

    The head practises the plans that are used, and no plan starves. A retrieval miss counts nothing.
    """
    uniform = jnp.full(losses.shape, 1.0 / losses.shape[1])
    rho = (1.0 - practice) * uniform + practice * jax.lax.stop_gradient(probabilities)
    weights = rho * present
    return jnp.sum(weights * losses) / jnp.maximum(jnp.sum(weights), 1e-6)


def planner_loss(
    weights: PlanValues,
    utilities: PlanValues,
    mask: PlanMask,
    quality_gap: Float[Array, ""],
) -> Float[Array, ""]:
    """``- E_pi[U] / dQ``, mean over requests; dividing by dQ makes learning rates mean the same on every dataset."""
    return -jnp.mean(expected_utility(weights, utilities, mask) / quality_gap)


def quality_loss(predicted: PlanValues, quality: PlanValues, mask: PlanMask, quality_gap: Float[Array, ""]) -> Float[Array, ""]:
    """Mean squared error of the predicted plan quality over allowed plans, in units of dQ."""
    error = jnp.where(mask, (predicted - jax.lax.stop_gradient(quality)) / quality_gap, 0.0)
    return jnp.sum(jnp.square(error)) / jnp.sum(mask)


def decision_loss(
    planner: Any,
    requests: Requests,
    quality: PlanValues,
    quality_gap: Float[Array, ""],
    objective: Objective,
    *,
    quality_regression: float,
    entropy_weight: Float[Array, ""] | float,
    key: PRNGKeyArray,
) -> tuple[Float[Array, ""], dict[str, Array], PlanValues]:
    """What training a planner minimises on ``b`` requests, the same wherever it is trained.

    EXACT and GUMBEL: ``- E_pi[U] / dQ - beta H(pi) + quality_regression * error``, where E_pi is exact or a straight-through sample,
    and the error is that of ``quality_loss``. REGRESSION: the error alone, so that the planner is the argmax of predicted utility.

    Args:
        planner: a ``LearnedPlanner``; without a ``quality`` of its own it has no error.
        requests: their realised costs and failures make U, with the ``quality`` of every plan.
        key: of the sample.

    Returns:
        The loss; its terms with the expected utility; the probabilities of the plans.
    """
    context, mask = requests.context, requests.mask
    logits = planner.logits(context, requests.predicted, mask)
    probabilities = masked_softmax(logits, mask)
    utilities = realised_utility(quality, requests.realised, context, failed=requests.failed, mask=mask)
    terms = {"utility": jnp.mean(expected_utility(probabilities, utilities, mask))}
    total, error_weight = jnp.zeros(()), 1.0
    if objective is not Objective.REGRESSION:
        weights = choice_weights(logits, mask, objective, key=key)
        terms["planner_loss"] = planner_loss(weights, utilities, mask, quality_gap)
        total = terms["planner_loss"] - entropy_weight * jnp.mean(entropy(probabilities))
        error_weight = quality_regression
    predicted = planner.quality(context_features(context)) if error_weight > 0 else None
    if predicted is not None:
        terms["quality_loss"] = quality_loss(predicted, quality, mask, quality_gap)
        total = total + error_weight * terms["quality_loss"]
    return total, terms, probabilities
