"""The device agent reads the full private history and the attributes, and gives the device user state."""

from dataclasses import dataclass

import jax
from flax import nnx
from jax import Array
from jaxtyping import Float, PRNGKeyArray

from cda4rec_jax.agents.device.ranking import FusionHead
from cda4rec_jax.array_typing import ItemVectors
from cda4rec_jax.messages import SequenceBatch
from cda4rec_jax.nn import Decoder, DecoderConfig, embed_and_decode


@dataclass(frozen=True, kw_only=True)
class DeviceConfig:
    """The decoder of the device agent and its fusion head."""

    decoder: DecoderConfig
    history_length: int  # events that the decoder reads
    head_hidden: int = 32


class DeviceAgent(nnx.Module):
    """A small decoder over projected item vectors, and the head that scores candidates.

    The item table is the cloud's: the device reads it through ``stop_gradient``, so that only the cloud's loss shapes it.
    """

    def __init__(self, config: DeviceConfig, cloud_width: int, prefix_size: int, *, rngs: nnx.Rngs):
        width = config.decoder.width
        self.projection = nnx.Param(nnx.initializers.normal(cloud_width**-0.5)(rngs.params(), (cloud_width, width)))
        self.prefix = nnx.Param(nnx.initializers.normal(0.1)(rngs.params(), (prefix_size, width)))
        self.decoder = Decoder(config.decoder, rngs=rngs)
        self.head = FusionHead(config.head_hidden, rngs=rngs)

    def item_vectors(self, cloud_vectors: ItemVectors) -> Float[Array, "i e"]:
        """Item vectors in the width of the device."""
        return jax.lax.stop_gradient(cloud_vectors) @ self.projection[...]

    def __call__(
        self, batch: SequenceBatch, item_vectors: Float[Array, "i e"], key: PRNGKeyArray | None = None
    ) -> Float[Array, "r t e"]:
        """Hidden states of all tokens; dropout is on where there is a ``key``."""
        return embed_and_decode(self.decoder, self.prefix[...], batch, item_vectors, key)
