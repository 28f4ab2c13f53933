"""The item table: a frozen text vector and a learned id embedding for every item."""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jaxtyping import PRNGKeyArray

from cda4rec_jax.array_typing import ItemText, ItemVectors
from cda4rec_jax.nn.dropout import dropout


class Frozen(nnx.Variable):
    """An array that belongs to a model and is never trained."""


@dataclass(frozen=True, kw_only=True)
class ItemTableConfig:
    """Scales of the two parts of an item vector at the start of training, in units of ``width**-0.5``."""

    id_scale: float = 1.0
    text_scale: float = 2.5  # text starts ahead of the ids: it doubles the speed of convergence
    text_dropout_rate: float = 0.1


class ItemTable(nnx.Module):
    """``e_i = v_i + W z_i`` on the input and the output side; row 0 is padding and all zero.

    A cold item has only text (its id embedding is drawn small and never trained) and still works. The same table is the retrieval
    index of a maximum inner product search.
    """

    def __init__(self, config: ItemTableConfig, text: ItemText, width: int, *, rngs: nnx.Rngs):
        num_rows, num_features = text.shape
        scale = width**-0.5
        self.text_dropout_rate = config.text_dropout_rate
        self.text = Frozen(text)
        self.ids = nnx.Param(config.id_scale * scale * nnx.initializers.normal(1.0)(rngs.params(), (num_rows, width)))
        # Rows of `text` have unit norm on average, so rows of `text @ projection` get entries of size text_scale * scale.
        self.projection = nnx.Param(
            config.text_scale * scale * nnx.initializers.normal(1.0)(rngs.params(), (num_features, width))
        )

    def vectors(self, key: PRNGKeyArray | None = None) -> ItemVectors:
        """All item vectors; a ``key`` turns dropout of text features on."""
        text = dropout(self.text[...], self.text_dropout_rate, key)
        vectors = self.ids[...] + text @ self.projection[...]
        return vectors * (jnp.arange(vectors.shape[0]) > 0)[:, None]
