"""What is known of items: tables that the data gives once, and vectors that follow the weights."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8, UInt16

from cda4rec_jax.agents.cloud import CloudAgent
from cda4rec_jax.agents.device import DeviceAgent
from cda4rec_jax.array_typing import Array, ItemVectors
from cda4rec_jax.array_typing import ItemCategories as CategoryShares
from cda4rec_jax.data.statistics import ItemCategories, ItemStatistics
from cda4rec_jax.data.text import ItemWords
from cda4rec_jax.messages import Evidence
from cda4rec_jax.nn import dequantise_rows, quantise_rows


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class ItemTables:
    """Tables of the training data by item_index; they do not depend on any weight."""

    categories: CategoryShares  # each row sums to 1 (or 0): an event's weight in each category
    category_ids: UInt8[Array, "i q"]
    words: UInt16[Array, "i w"]
    word_weights: UInt8[Array, "i w"]
    text: Float[Array, "i z"]
    previous_items: Int[Array, "i m"]
    previous_weights: UInt8[Array, "i m"]
    cooccurring_items: Int[Array, "i m"]
    cooccurring_weights: UInt8[Array, "i m"]
    log_popularity: Float[Array, "i"]
    train_counts: Int[Array, "i"]
    resident_items: Int[Array, "r"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Residents:
    """The resident items, which every device holds: they say nothing about its user. Their tables follow a row of padding."""

    items: Int[Array, "r"]  # the most popular one first
    in_order: Int[Array, "r"]  # the same items, the lowest index first, ...
    rows_in_order: Int[Array, "r"]  # ... and the row of each
    vectors: Float[Array, "padded d"]  # of the cloud's index, rounded to 8 bits
    own_vectors: Float[Array, "padded e"]  # of the device agent, as in the records
    share: Float[Array, ""]  # of all training events

    def rows_of(self, items: Int[Array, "..."]) -> Int[Array, "..."]:
        """Row of each item in the tables of resident items; 0 where it is none of them."""
        places = jnp.minimum(jnp.searchsorted(self.in_order, items), len(self.in_order) - 1)
        return jnp.where(self.in_order[places] == items, self.rows_in_order[places], 0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """All items as the cloud holds them: index vectors, and the records that may travel to a device."""

    vectors: ItemVectors
    evidence: Evidence
    categories: CategoryShares
    residents: Residents

    @property
    def num_items(self) -> int:
        return self.vectors.shape[0] - 1


def item_tables(
    statistics: ItemStatistics, categories: ItemCategories, words: ItemWords, text: np.ndarray, num_resident: int
) -> ItemTables:
    """Tables from the statistics of the training events and from item text; the ``num_resident`` most popular items are resident."""
    normalised = categories.multi_hot / np.maximum(categories.multi_hot.sum(axis=1, keepdims=True), 1.0)
    by_count = np.argsort(-statistics.train_counts[1:], kind="stable")[:num_resident] + 1
    unit_text = text / np.maximum(np.linalg.norm(text, axis=1, keepdims=True), 1e-6)
    return ItemTables(
        categories=jnp.asarray(normalised, jnp.float32),
        category_ids=jnp.asarray(categories.ids),
        words=jnp.asarray(words.ids),
        word_weights=jnp.asarray(words.weights),
        text=jnp.asarray(unit_text, jnp.float32),
        previous_items=jnp.asarray(statistics.previous_items),
        previous_weights=jnp.asarray(statistics.previous_weights),
        cooccurring_items=jnp.asarray(statistics.cooccurring_items),
        cooccurring_weights=jnp.asarray(statistics.cooccurring_weights),
        log_popularity=jnp.asarray(statistics.log_popularity, jnp.float32),
        train_counts=jnp.asarray(statistics.train_counts, jnp.int32),
        resident_items=jnp.asarray(by_count, jnp.int32),
    )


def build_catalogue(cloud: CloudAgent, device: DeviceAgent, tables: ItemTables) -> Catalogue:
    """The catalogue under the current weights; what a device may see is rounded to int8 here, once."""
    vectors = cloud.items.vectors()
    device_vectors, vector_scales = quantise_rows(device.item_vectors(vectors))
    text, text_scales = quantise_rows(tables.text)
    padded, order = jnp.pad(tables.resident_items, (1, 0)), jnp.argsort(tables.resident_items)
    evidence = Evidence(
        vectors=device_vectors,
        vector_scales=vector_scales,
        text=text,
        text_scales=text_scales,
        previous_items=tables.previous_items,
        previous_weights=tables.previous_weights,
        cooccurring_items=tables.cooccurring_items,
        cooccurring_weights=tables.cooccurring_weights,
        categories=tables.category_ids,
        words=tables.words,
        word_weights=tables.word_weights,
        log_popularity=tables.log_popularity,
    )
    return Catalogue(
        vectors=vectors,
        evidence=evidence,
        categories=tables.categories,
        residents=Residents(
            items=tables.resident_items,
            in_order=tables.resident_items[order],
            rows_in_order=1 + order,
            vectors=dequantise_rows(*quantise_rows(vectors[padded])),
            own_vectors=dequantise_rows(device_vectors[padded], vector_scales[padded]),
            share=tables.train_counts[tables.resident_items].sum() / jnp.maximum(tables.train_counts.sum(), 1),
        ),
    )
