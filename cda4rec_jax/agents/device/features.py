"""Features of a candidate, computed on the device from its private history and from the rows that came with the candidates.

Every feature of a candidate depends on that candidate, the user and the best-scored candidate alone, never on how many candidates came:
the first 20 of 500 have the features that they would have had alone.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from cda4rec_jax.array_typing import Array, CandidateFeatures, Histories, Lengths, NeighbourWeights
from cda4rec_jax.messages import WORD_BUCKETS, Candidates, EgressLevel, Evidence
from cda4rec_jax.nn import dequantise_rows, dequantise_weights

CLOUD_FEATURES = (
    "cloud_score",  # semantic score below that of the best candidate
    "cloud_log_rank",
    "cloud_present",
    "cloud_log_age",  # log(1 + events since the semantic embedding was made)
    "cloud_score_by_age",
    "level_profile",
    "level_recent",
    "level_full",
    "popularity",
)
STRUCTURED_FEATURES = (
    "structured_present",
    "device_score",
    "text_last",  # cosine with the last item
    "text_short",  # ... with the history decayed by .6 an event
    "text_long",  # ... by .95
    "followed_last",  # directed counts from the last item
    "followed_recent",  # ... from the last events, decayed by .6
    "followed_last_rare",  # the same counts as a lift: a pair of rare items says more
    "followed_recent_rare",
    "cooccurring_short",  # item-kNN: cosines with the items of the history, decayed by .6 an event
    "cooccurring_long",  # ... by .95
    "category_short",
    "category_long",
    "words_last",  # cosine of the words of the title with those of the last item
    "words_short",  # ... summed over the history, decayed by .6 an event
    "words_long",  # ... mean over the history, decayed by .95
    "history_size",
)
FEATURES = CLOUD_FEATURES + STRUCTURED_FEATURES
# What is known of the request: one value for all of its candidates. What a feature of a candidate is worth depends on these.
REQUEST_FEATURES = ("cloud_log_age", "level_profile", "level_recent", "level_full", "structured_present", "history_size")
SEMANTIC_FEATURES = tuple(name for name in CLOUD_FEATURES if name != "popularity")  # absent without a semantic score
SHORT_DECAY, LONG_DECAY = 0.6, 0.95
DEVICE_SCORE_SCALE = 0.5
_LOG_OF_MAX_RANK = 6.2  # log(500)
_CATEGORY_CODES = 256  # categories travel as one byte


def cloud_features(
    candidates: Candidates, popularity: Float[Array, "b c"], *, age_events: Float[Array, "b"], level: Lengths
) -> Float[Array, "b c f"]:
    """What is known without structured user modelling, in the order of ``CLOUD_FEATURES``."""
    present = candidates.present
    score = (candidates.scores - candidates.scores[:, :1]) * present / 2.0
    log_rank = jnp.log1p(candidates.ranks) / _LOG_OF_MAX_RANK * present
    log_age = jnp.log1p(age_events)[:, None] * present
    levels = [(level == chosen).astype(jnp.float32)[:, None] * present for chosen in (1, 2, EgressLevel.FULL.value)]
    return jnp.stack([score, log_rank, present, log_age, score * log_age, *levels, popularity], axis=-1)


def structured_features(
    history: Histories,
    lengths: Lengths,
    history_evidence: Evidence,
    device_state: Float[Array, "b e"],
    evidence: Evidence,
    num_items: int,
) -> Float[Array, "b c f"]:
    """What structured user modelling adds, in the order of ``STRUCTURED_FEATURES``.

    Args:
        history: newest events, oldest first; ``lengths`` of them are real.
        history_evidence: records of these items, leading axes [b, l].
        device_state: output of the device decoder.
        evidence: records of the candidates, leading axes [b, c].
        num_items: catalogue size; bounds the scratch space in which neighbours are looked up.
    """
    age = lengths[:, None] - 1 - jnp.arange(history.shape[1])[None, :]
    real = (age >= 0).astype(jnp.float32)
    short, long = real * SHORT_DECAY ** jnp.maximum(age, 0), real * LONG_DECAY ** jnp.maximum(age, 0)
    last = (age == 0).astype(jnp.float32)

    vectors = dequantise_rows(evidence.vectors, evidence.vector_scales)
    device_score = jnp.einsum("be,bce->bc", device_state, vectors)
    device_score = DEVICE_SCORE_SCALE * (device_score - device_score[:, :1])

    history_text = dequantise_rows(history_evidence.text, history_evidence.text_scales)
    tastes = jnp.einsum("wbl,blz->bwz", jnp.stack([last, short, long]), history_text)
    tastes = tastes / jnp.maximum(jnp.linalg.norm(tastes, axis=-1, keepdims=True), 1e-6)
    similar = _for_each_user(_similarity, tastes, evidence.text, evidence.text_scales)

    rare = _rarity(history_evidence.log_popularity)
    before = jnp.stack([last, short, last * rare, short * rare], -1)
    followed = _lookup(history, before, evidence.previous_items, evidence.previous_weights, num_items + 1)
    followed = followed.at[..., 2:].multiply(_rarity(evidence.log_popularity)[..., None])
    beside = jnp.stack([short, long], -1)
    together = _lookup(history, beside, evidence.cooccurring_items, evidence.cooccurring_weights, num_items + 1)

    shares = beside / jnp.maximum(beside.sum(1, keepdims=True), 1.0)
    words = _shared_words(history_evidence, jnp.concatenate([last[..., None], short[..., None], shares[..., 1:]], -1), evidence)
    category_share = _for_each_user(_category_share, history_evidence.categories, shares, evidence.categories)
    shape = device_score.shape
    size = jnp.broadcast_to((jnp.log1p(lengths.astype(jnp.float32)) / 5.0)[:, None], shape)
    # The strengths of pairs spread over orders of magnitude; the root brings sums to about 0-1.
    counts = [jnp.sqrt(followed), jnp.sqrt(together)]
    groups = [jnp.stack([jnp.ones(shape), device_score], axis=-1), 2.0 * similar, *counts, category_share, words]
    return jnp.concatenate([*groups, size[..., None]], axis=-1)


def candidate_features(cloud: Float[Array, "b c g"], structured: Float[Array, "b c h"] | None) -> CandidateFeatures:
    """All features, with zeros where structured user modelling was skipped."""
    if structured is None:
        structured = jnp.zeros((*cloud.shape[:2], len(STRUCTURED_FEATURES)))
    return jnp.concatenate([cloud, structured], axis=-1)


def without_structure(features: CandidateFeatures) -> CandidateFeatures:
    """The features as they are where structured user modelling was skipped."""
    return with_zeros(features, STRUCTURED_FEATURES)


def without_semantics(features: CandidateFeatures) -> CandidateFeatures:
    """The features as they are where there is no semantic score."""
    return with_zeros(features, SEMANTIC_FEATURES)


def with_zeros(features: CandidateFeatures, names: tuple[str, ...]) -> CandidateFeatures:
    """The features with 0 in those of these names."""
    return features * jnp.asarray([name not in names for name in FEATURES], features.dtype)[None, None, :]


def _rarity(log_popularity: Array) -> Array:
    """About the inverse root of an item's number of events, in units of an item with a sixth of the largest logarithm."""
    return jnp.exp(0.5 - 3.0 * log_popularity)


def _lookup(
    keys: Int[Array, "b l"],
    weights: Float[Array, "b l w"],
    rows: Int[Array, "b c m"],
    row_weights: NeighbourWeights,
    num_keys: int,
) -> Float[Array, "b c w"]:
    """``sum over j and m of weights[j] * strength[m] * (keys[j] == rows[m])`` for each candidate; key 0 is none.

    Each weight is written at its key in a scratch row, and read at the keys of the candidates.
    """

    def one(own: Array, weight: Array, asked: Array, strengths: Array) -> Array:
        scratch = jnp.zeros((num_keys, weight.shape[-1])).at[own].add(weight).at[0].set(0.0)
        return jnp.einsum("cmw,cm->cw", scratch[asked], strengths)

    return _for_each_user(one, keys, weights, rows, dequantise_weights(row_weights))


def _shared_words(own: Evidence, weights: Float[Array, "b l w"], candidates: Evidence) -> Float[Array, "b c w"]:
    """Cosines of a candidate's title with the titles of the history, summed with ``weights``."""
    users, width = weights.shape[0], weights.shape[-1]
    of_words = weights[:, :, None, :] * dequantise_weights(own.word_weights)[..., None]
    keys = own.words.astype(jnp.int32).reshape(users, -1)
    asked = candidates.words.astype(jnp.int32)
    return _lookup(keys, of_words.reshape(users, -1, width), asked, candidates.word_weights, WORD_BUCKETS)


def _similarity(tastes: Array, text: Array, scales: Array) -> Array:
    """Inner products [c, w] of one user's tastes [w, z] with the text of the candidates [c, z], int8."""
    return (text.astype(jnp.float32) @ tastes.T) * scales[:, None]


def _category_share(history_categories: Array, shares: Array, categories: Array) -> Array:
    """Share of the history in each of a candidate's categories, mean over the places for them; category 0 is none and has none."""
    owner = jnp.broadcast_to(shares[:, None, :], (*history_categories.shape, shares.shape[-1]))
    totals = jnp.zeros((_CATEGORY_CODES, shares.shape[-1])).at[history_categories].add(owner).at[0].set(0.0)
    return totals[categories].mean(axis=1)


def _for_each_user(function: Callable[..., Array], *columns: Array) -> Array:
    """``vmap`` over users, except that a CPU takes one user after the other: its caches hold one user's scratch, not all (10x)."""

    def one_by_one(*given: Array) -> Array:
        return jax.lax.map(lambda row: function(*row), given)

    return jax.lax.platform_dependent(*columns, cpu=one_by_one, default=jax.vmap(function))
