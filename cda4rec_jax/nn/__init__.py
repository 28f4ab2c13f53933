"""Blocks that both agents share."""

from cda4rec_jax.nn.decoder import Decoder, DecoderConfig
from cda4rec_jax.nn.dropout import dropout
from cda4rec_jax.nn.item_table import Frozen, ItemTable, ItemTableConfig
from cda4rec_jax.nn.quantise import dequantise_rows, dequantise_weights, quantise_rows, quantise_weights
from cda4rec_jax.nn.sequence import embed, embed_and_decode, last_hidden

__all__ = [
    "Decoder",
    "DecoderConfig",
    "Frozen",
    "ItemTable",
    "ItemTableConfig",
    "dequantise_rows",
    "dequantise_weights",
    "dropout",
    "embed",
    "embed_and_decode",
    "last_hidden",
    "quantise_rows",
    "quantise_weights",
]
