"""Item-item evidence, popularity and category tables.

Counts come from the events that the caller passes and from nothing else: pass training events only. The joint step needs them
twice, once without the withheld events (so that the features of a withheld position are as honest as those of a test event) and
once with all training events (for evaluation and serving).

Weights are stored as one byte each (``nn.quantise_weights``).
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float32, Int, Int32, Int64, UInt8
from scipy.sparse import coo_array, csr_array

from cda4rec_jax.nn import quantise_weights

MAX_GAP = 3  # steps between two events that still count as "followed"; a pair at gap g counts 1/g
# Events added to every count of a denominator. Without it the rows hold 2% (ML-1M) to 9% (Amazon Beauty) fewer of the true next
# items' predecessors.
SHRINKAGE = 20
_UNITS_PER_EVENT = 6  # counts are kept in sixths, so that the sums of 1, 1/2 and 1/3 are exact
_MAX_BLOCK_ENTRIES = 1 << 23  # entries of one block of the co-occurrence matrix, about 100 MB


@dataclass(frozen=True, kw_only=True)
class ItemStatistics:
    """Tables by item_index; row 0 is padding and all zero.

    Neighbours stand heaviest first, equal weights by item_index; 0 is none. No item is its own neighbour.

    ``previous_items[c]`` are the items that c followed: ``weight(j, c) = f(j, c) / sqrt((n(j) + 20)(n(c) + 20))``, where f sums
    1, 1/2 and 1/3 for every time that c came 1, 2 and 3 events after j, and n counts events; cut at 1, which only repeated
    events can exceed. ``cooccurring_items[c]`` are the items of the same histories: the cosine
    ``u(j, c) / sqrt((u(j) + 20)(u(c) + 20))``, where u counts users. The 20 keeps pairs of rare items, which met once by
    chance, from taking the row.
    """

    train_counts: Int64[np.ndarray, "i"]
    log_popularity: Float32[np.ndarray, "i"]  # log(1 + train_counts), divided by its maximum
    previous_items: Int32[np.ndarray, "i m"]
    previous_weights: UInt8[np.ndarray, "i m"]
    cooccurring_items: Int32[np.ndarray, "i m"]
    cooccurring_weights: UInt8[np.ndarray, "i m"]


@dataclass(frozen=True, kw_only=True)
class ItemCategories:
    """Categories of items. ``multi_hot`` and ``ids`` say the same; rows 0 are padding and all zero."""

    names: tuple[str, ...]  # column g of multi_hot
    multi_hot: Float32[np.ndarray, "i g"]
    ids: UInt8[np.ndarray, "i q"]  # column of multi_hot + 1, ascending; 0 is none


def item_statistics(
    offsets: Int[np.ndarray, "users_plus_1"], items: Int[np.ndarray, "events"], num_items: int, *, num_neighbours: int = 24
) -> ItemStatistics:
    """Tables of the given histories.

    Args:
      offsets: user u owns ``items[offsets[u]:offsets[u + 1]]``, oldest first; the first is 0 and the last ``len(items)``.
      items: item indices, 1 to ``num_items``.
      num_items: size of the catalogue without padding; tables have one row more.
      num_neighbours: m, neighbours kept of each item.

    Raises:
      ValueError: offsets do not cover the items, an item_index lies outside 1..num_items, or num_neighbours is below 1.
    """
    if num_neighbours < 1:
        raise ValueError(f"num_neighbours must be at least 1, got {num_neighbours}")
    _check_histories(offsets, items, num_items)
    users = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    counts = np.bincount(items, minlength=num_items + 1).astype(np.int64)
    seen = coo_array((np.ones(len(items), np.int32), (users, items)), shape=(len(offsets) - 1, num_items + 1)).tocsr()
    seen.data[:] = 1
    seen_counts = np.asarray(seen.sum(axis=0)).ravel()
    followed = [(0, _followed_counts(users, items, num_items))]
    previous_items, previous_weights = _top_neighbours(followed, counts, num_neighbours, unit=1 / _UNITS_PER_EVENT)
    together = _cooccurrence_blocks(seen, seen_counts)
    cooccurring_items, cooccurring_weights = _top_neighbours(together, seen_counts, num_neighbours, unit=1.0)
    log_counts = np.log1p(counts)
    return ItemStatistics(
        train_counts=counts,
        # log 2 is the maximum's floor: without it a table without events would divide by zero.
        log_popularity=(log_counts / max(log_counts.max(), np.log(2))).astype(np.float32),
        previous_items=previous_items,
        previous_weights=previous_weights,
        cooccurring_items=cooccurring_items,
        cooccurring_weights=cooccurring_weights,
    )


def item_categories(categories: Sequence[tuple[str, ...]], *, max_categories: int = 128, max_per_item: int = 6) -> ItemCategories:
    """Category tables of items, given one tuple of names per item (``categories[0]`` belongs to item_index 1).

    Categories on more than 90% of the items tell nothing and are dropped; of the others the ``max_categories`` on most items
    stay, equal ones by name. An item with more than ``max_per_item`` of these keeps those on the fewest items, which say most
    about it.

    Raises:
      ValueError: max_categories is outside 1..255 (an id must fit a byte), or max_per_item is below 1.
    """
    if not 1 <= max_categories <= 255 or max_per_item < 1:
        raise ValueError(f"max_categories must be in 1..255 and max_per_item at least 1, got {max_categories}, {max_per_item}")
    counts = Counter(name for names in categories for name in set(names))
    telling = [name for name, count in counts.items() if count <= 0.9 * len(categories)]
    names = tuple(sorted(telling, key=lambda name: (-counts[name], name))[:max_categories])
    column = {name: index for index, name in enumerate(names)}
    multi_hot = np.zeros((len(categories) + 1, len(names)), np.float32)
    ids = np.zeros((len(categories) + 1, max_per_item), np.uint8)
    for row, item_names in enumerate(categories, start=1):
        # Columns are sorted by falling count, so the largest ones are the rarest.
        kept = sorted({column[name] for name in item_names if name in column})[-max_per_item:]
        multi_hot[row, kept] = 1.0
        ids[row, : len(kept)] = np.asarray(kept, np.uint8) + 1
    return ItemCategories(names=names, multi_hot=multi_hot, ids=ids)


def _check_histories(offsets: np.ndarray, items: np.ndarray, num_items: int) -> None:
    if len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != len(items) or np.any(np.diff(offsets) < 0):
        raise ValueError(f"offsets must rise from 0 to the number of events, {len(items)}")
    if len(items) and (items.min() < 1 or items.max() > num_items):
        raise ValueError(f"items must lie in 1..{num_items}, got {items.min()}..{items.max()}")


def _followed_counts(users: np.ndarray, items: np.ndarray, num_items: int) -> csr_array:
    """Row c, column j: how often c followed j, in sixths."""
    earlier, later, units = [], [], []
    for gap in range(1, MAX_GAP + 1):
        same_user = users[gap:] == users[:-gap]
        earlier.append(items[:-gap][same_user])
        later.append(items[gap:][same_user])
        units.append(np.full(int(same_user.sum()), _UNITS_PER_EVENT // gap, np.int32))
    entries = (np.concatenate(units), (np.concatenate(later), np.concatenate(earlier)))
    return coo_array(entries, shape=(num_items + 1, num_items + 1)).tocsr()


def _cooccurrence_blocks(seen: csr_array, counts: np.ndarray) -> Iterator[tuple[int, csr_array]]:
    """(first row, rows) of the matrix that counts the users who saw both items, in blocks of bounded memory."""
    by_item = csr_array(seen.T)
    # An item has at most as many neighbours as its users have events.
    bounds = np.minimum(by_item @ np.diff(seen.indptr).astype(np.int64), len(counts))
    blocks = np.cumsum(bounds) // _MAX_BLOCK_ENTRIES
    starts = np.flatnonzero(np.diff(blocks, prepend=-1))
    for start, stop in pairwise([*starts.tolist(), len(counts)]):
        yield start, csr_array(by_item[start:stop] @ seen)


def _top_neighbours(
    blocks: Iterable[tuple[int, csr_array]], counts: np.ndarray, num_neighbours: int, *, unit: float
) -> tuple[np.ndarray, np.ndarray]:
    """Of each row c the heaviest columns j by ``unit rows[c, j] / sqrt((counts[j] + 20)(counts[c] + 20))``, and their bytes."""
    items = np.zeros((len(counts), num_neighbours), np.int32)
    weights = np.zeros((len(counts), num_neighbours))
    roots = np.sqrt(counts + SHRINKAGE)
    for first, rows in blocks:
        rows.sort_indices()
        for row, (start, stop) in enumerate(pairwise(np.asarray(rows.indptr)), start=first):
            columns = rows.indices[start:stop]
            values = unit * rows.data[start:stop] / (roots[columns] * roots[row])
            values[columns == row] = 0
            if len(values) > num_neighbours:
                heavy = values >= np.partition(values, -num_neighbours)[-num_neighbours]
                columns, values = columns[heavy], values[heavy]
            # The columns ascend and the sort is stable, hence equal weights stand by item_index.
            order = np.argsort(-values, kind="stable")[:num_neighbours]
            kept = order[values[order] > 0]
            items[row, : len(kept)] = columns[kept]
            weights[row, : len(kept)] = values[kept]
    return items, quantise_weights(weights)
