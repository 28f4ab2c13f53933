"""The cloud agent reads one prefix vector and the released item tokens, and gives the semantic user embedding."""

from dataclasses import dataclass

from flax import nnx
from jax import Array
from jaxtyping import Float, PRNGKeyArray

from cda4rec_jax.array_typing import ItemText, ItemVectors
from cda4rec_jax.messages import SequenceBatch
from cda4rec_jax.nn import Decoder, DecoderConfig, ItemTable, ItemTableConfig, embed_and_decode


@dataclass(frozen=True, kw_only=True)
class CloudConfig:
    """The item table and the decoder of the cloud agent."""

    decoder: DecoderConfig
    item_table: ItemTableConfig = ItemTableConfig()
    history_length: int  # item tokens at FULL


class CloudAgent(nnx.Module):
    """Owns the item table; hidden states and item vectors share one space, so that ``hidden . e_i`` scores item i."""

    def __init__(self, config: CloudConfig, text: ItemText, prefix_size: int, *, rngs: nnx.Rngs):
        width = config.decoder.width
        self.items = ItemTable(config.item_table, text, width, rngs=rngs)
        self.prefix = nnx.Param(nnx.initializers.normal(0.1)(rngs.params(), (prefix_size, width)))
        self.decoder = Decoder(config.decoder, rngs=rngs)

    def __call__(self, batch: SequenceBatch, item_vectors: ItemVectors, key: PRNGKeyArray | None = None) -> Float[Array, "r t d"]:
        """Hidden states of all tokens; dropout is on where there is a ``key``."""
        return embed_and_decode(self.decoder, self.prefix[...], batch, item_vectors, key)
