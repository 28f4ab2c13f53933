"""A dataset with everything that models read of it: interactions, item text, categories, attributes, statistics."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float

from cda4rec_jax.data.histories import attribute_columns, history_batch
from cda4rec_jax.data.interactions import Interactions
from cda4rec_jax.data.packing import Histories
from cda4rec_jax.data.profiles import prefix_size
from cda4rec_jax.data.splits import Split, prefix_lengths, train_lengths
from cda4rec_jax.data.statistics import ItemCategories, ItemStatistics, item_categories, item_statistics
from cda4rec_jax.data.text import ItemWords, TextProvider, item_texts, item_words
from cda4rec_jax.messages import HistoryBatch
from cda4rec_jax.pipeline.catalogue import ItemTables, item_tables


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """What training, evaluation and recommending share."""

    interactions: Interactions
    text: Float[np.ndarray, "i z"]  # row 0 is padding
    ids_only: bool = False  # hide categories and attributes, as a baseline on ids wants it

    @cached_property
    def categories(self) -> ItemCategories:
        return item_categories(((),) * self.interactions.num_items if self.ids_only else self.interactions.categories)

    @cached_property
    def words(self) -> ItemWords:
        return item_words(("",) * self.interactions.num_items if self.ids_only else self.interactions.titles)

    @cached_property
    def attributes(self) -> tuple[Float[np.ndarray, "users a"], tuple[str, ...]]:
        """One column per (attribute, value), and their names."""
        return attribute_columns({} if self.ids_only else self.interactions.user_attributes, self.interactions.num_users)

    @property
    def prefix_size(self) -> int:
        return prefix_size(len(self.categories.names), len(self.attributes[1]))

    @cached_property
    def longest_history(self) -> int:
        return int(np.diff(self.interactions.offsets).max())

    def statistics(self, held_out: np.ndarray | None = None) -> ItemStatistics:
        """Item statistics of the training events, less the last ``held_out[u]`` of each user."""
        lengths = train_lengths(self.interactions) - (0 if held_out is None else held_out)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
        items = self.interactions.items[place + np.repeat(self.interactions.offsets[:-1], lengths)]
        return item_statistics(offsets, items, self.interactions.num_items)

    def tables(self, statistics: ItemStatistics, num_resident: int) -> ItemTables:
        """Tables of all items; devices hold the records of the ``num_resident`` most popular ones."""
        return item_tables(statistics, self.categories, self.words, self.text, num_resident)

    def training_histories(self, held_out: np.ndarray | None = None) -> Histories:
        """Training events for packing; the last ``held_out[u]`` of each user are no targets."""
        return Histories(
            offsets=self.interactions.offsets,
            items=self.interactions.items,
            lengths=train_lengths(self.interactions) - (0 if held_out is None else held_out),
            item_categories=self.categories.multi_hot,
            attributes=self.attributes[0],
        )

    def histories(self, users: np.ndarray, positions: np.ndarray, stored_events: int) -> HistoryBatch:
        """Private pasts of ``users`` before the events at ``positions``; one shape whatever the users."""
        return history_batch(
            self.interactions,
            self.attributes[0],
            users,
            positions,
            stored_events=stored_events,
            seen_width=self.longest_history,
        )

    def target_positions(self, split: Split) -> np.ndarray:
        """Position of each user's validation or test target."""
        return prefix_lengths(self.interactions, split)


def build_corpus(interactions: Interactions, provider: TextProvider) -> Corpus:
    """A corpus whose item text comes from ``provider``: title and categories of each item."""
    return corpus_with_text(interactions, provider.encode(item_texts(interactions.titles, interactions.categories)))


def corpus_with_text(interactions: Interactions, text: Float[np.ndarray, "items z"]) -> Corpus:
    """A corpus whose items have these text vectors, one row per item."""
    return Corpus(interactions=interactions, text=np.concatenate([np.zeros((1, text.shape[1]), np.float32), text]))
