"""From what distribution sampled losses draw their negatives, and what its logarithm is."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, PRNGKeyArray

from cda4rec_jax.array_typing import Array
from cda4rec_jax.errors import UserError

MOST_EVENTS = 2**31 - 1  # whose numbers a device holds in 32 bits


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class ItemShares:
    """``q_i = (n_i + 1) / sum_j (n_j + 1)``, with n the training events of an item: the unigram distribution.

    The nearer the draws are to what the model thinks, the less the normaliser varies (Bengio and Senecal, 2008,
    doi 10.1109/TNN.2007.912312), and of what needs no model and no context this is nearest. It is also the distribution of in-batch
    negatives (Yi et al., RecSys 2019, doi 10.1145/3298689.3346996). The 1 lets draws reach items without a training event: a
    correction is right only for draws that reach all.
    Shares are whole numbers, so that a draw among a hundred million events is as exact as one among ten.
    """

    cumulative: Int[Array, "i"]  # sum of n_j + 1 up to each item; 0 for padding

    @classmethod
    def of(cls, train_counts: Int[np.ndarray, "i"]) -> "ItemShares":
        """From the training events of every item, with padding in row 0.

        Raises:
            UserError: more events and items than 2**31 - 1.
        """
        cumulative = np.concatenate([[0], np.cumsum(np.asarray(train_counts[1:], np.int64) + 1)])
        if cumulative[-1] > MOST_EVENTS:
            raise UserError(
                f"a sampled loss numbers {cumulative[-1]:,} training events and items, and can number {MOST_EVENTS:,}: take --loss full"
            )
        return cls(cumulative=jnp.asarray(cumulative, jnp.int32))

    def draw(self, key: PRNGKeyArray, count: int) -> Int[Array, "k"]:
        """Items drawn with replacement; time and memory grow with their number, not with that of all items."""
        # A key of the training loop makes other bits on other devices; these are the same wherever its one word is.
        place = jax.random.randint(jax.random.key(jax.random.bits(key)), (count,), 0, self.cumulative[-1])
        return jnp.searchsorted(self.cumulative, place, side="right").astype(jnp.int32)

    def log_share(self, items: Int[Array, "..."]) -> Float[Array, "..."]:
        """``log q`` of each item; 0 of padding."""
        own = self.cumulative[items] - self.cumulative[jnp.maximum(items - 1, 0)]
        total = self.cumulative[-1].astype(jnp.float32)
        return jnp.where(items > 0, jnp.log(jnp.maximum(own, 1).astype(jnp.float32) / total), 0.0)
