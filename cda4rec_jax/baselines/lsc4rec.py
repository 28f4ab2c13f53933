"""A fusion in the manner of LSC4Rec (arXiv 2501.05647): the cloud sends a list, a small model on the device ranks it again.

The cloud model reads item text where the corpus has any. Both models are trained apart, and the weights of their scores are fixed: the
ones that rank best on validation, the same for every user and request. That is what a planner and a trained fusion head must beat.
Of the paper, training the small model on lists of the cloud and deciding when to ask for a new list are left out.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from cda4rec_jax.array_typing import Array
from cda4rec_jax.baselines.fit import SequenceRecommender, fit_sequences, validation_users
from cda4rec_jax.baselines.protocol import Watch, catalogue_ranks, unwatched
from cda4rec_jax.baselines.sequences import (
    TransformerConfig,
    decoder_model,
    full_cross_entropy,
    next_item_scores,
    packing,
    without_profiles,
)
from cda4rec_jax.data.splits import Split
from cda4rec_jax.messages import HistoryBatch
from cda4rec_jax.metrics import ndcg
from cda4rec_jax.pipeline.corpus import Corpus
from cda4rec_jax.training import Progress


@dataclass(frozen=True, kw_only=True)
class LSC4RecConfig:
    """The two models, and how their scores are put together."""

    cloud: TransformerConfig = field(default_factory=partial(TransformerConfig, width=128, mlp_hidden=128))
    device: TransformerConfig = field(
        default_factory=partial(TransformerConfig, width=32, mlp_hidden=32, num_layers=1, dropout_rate=0.2)
    )
    cloud_text_scale: float = 0.5  # entries of projected text at the start, in units of width**-0.5; 0 reads ids alone
    num_candidates: int = 100
    weight_steps: int = 10  # weights tried between the device alone (0) and the cloud alone (1)


@dataclass(frozen=True, kw_only=True, eq=False)
class LSC4Rec:
    """``cloud_weight * z(cloud) + (1 - cloud_weight) * z(device)`` on the cloud's best items, -inf on all others."""

    cloud: SequenceRecommender
    device: SequenceRecommender
    num_candidates: int
    cloud_weight: float

    @property
    def history_length(self) -> int:
        """Newest events that one of the two reads."""
        return max(self.cloud.history_length, self.device.history_length)

    @property
    def num_parameters(self) -> int:
        """Those of both models, and the weight."""
        return self.cloud.num_parameters + self.device.num_parameters + 1

    def score(self, history: HistoryBatch) -> Float[Array, "b i"]:
        """Both models on one history; see ``fuse``."""
        return fuse(self.cloud.score(history), self.device.score(history), self.cloud_weight, num_candidates=self.num_candidates)


@partial(jax.jit, static_argnames="num_candidates")
def fuse(
    cloud_scores: Float[Array, "b i"],
    device_scores: Float[Array, "b i"],
    cloud_weight: float | Float[Array, ""],
    *,
    num_candidates: int,
) -> Float[Array, "b i"]:
    """Weighted scores of the ``num_candidates`` best items of the cloud, each standardised over the list; -inf elsewhere."""
    best, items = jax.lax.top_k(cloud_scores.at[:, 0].set(-jnp.inf), num_candidates)
    others = jnp.take_along_axis(device_scores, items, axis=1)
    fused = cloud_weight * _standardised(best) + (1.0 - cloud_weight) * _standardised(others)
    rows = jnp.arange(len(items))[:, None]
    return jnp.full(cloud_scores.shape, -jnp.inf).at[rows, items].set(fused)


def fit_lsc4rec(corpus: Corpus, config: LSC4RecConfig = LSC4RecConfig(), watch: Watch = unwatched) -> LSC4Rec:
    """Train both models with the loss over the whole catalogue, then choose the weight by validation ndcg@10."""
    num_candidates = min(config.num_candidates, corpus.interactions.num_items)
    cloud = _fit_one(corpus, config.cloud, config.cloud_text_scale, _in_phase(watch, "cloud"))
    device = _fit_one(corpus, config.device, 0.0, _in_phase(watch, "device"))
    users = validation_users(corpus, config.cloud.fit)
    positions = corpus.target_positions(Split.VALIDATION)[users]

    def quality(weight: float) -> float:
        fused = LSC4Rec(cloud=cloud, device=device, num_candidates=num_candidates, cloud_weight=weight)
        return float(np.mean(ndcg(catalogue_ranks(fused, corpus, users, positions), 10)))

    weights = np.linspace(0.0, 1.0, config.weight_steps + 1).tolist()
    return LSC4Rec(cloud=cloud, device=device, num_candidates=num_candidates, cloud_weight=max(weights, key=quality))


def _fit_one(corpus: Corpus, config: TransformerConfig, text_scale: float, watch: Watch) -> SequenceRecommender:
    model = decoder_model(corpus, config, text_scale=text_scale)
    score = partial(next_item_scores, history_length=config.history_length)
    return fit_sequences(without_profiles(corpus), model, full_cross_entropy, score, packing(config), config.fit, watch)


def _in_phase(watch: Watch, phase: str) -> Callable[[Progress], None]:
    return lambda progress: watch(replace(progress, phase=phase))


def _standardised(scores: Float[Array, "b c"]) -> Float[Array, "b c"]:
    centred = scores - jnp.mean(scores, axis=1, keepdims=True)
    return centred / jnp.maximum(jnp.std(scores, axis=1, keepdims=True), 1e-6)
