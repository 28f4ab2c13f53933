"""ScaNN's method in JAX, for accelerators: a learned partition, anisotropically quantised scores, exact scores of the best."""

import json
import math
import zipfile
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, UInt8

from cda4rec_jax.errors import UserError
from cda4rec_jax.retrieval.anisotropic import BLOCK, CENTRES, code_scores, directions_of, encode, learn_codebooks, parallel_weight
from cda4rec_jax.retrieval.exact import filtered_search, padded_excluded
from cda4rec_jax.retrieval.index import Found, Queries, Vectors, check_config, checked_queries
from cda4rec_jax.retrieval.partition import capacity_for, lay_out, learn_centroids, nearest_leaf, split_leaves
from cda4rec_jax.retrieval.rows import ItemRows, read_meta, read_rows, replacing_index, unreadable, write_rows

MOST_SCORES = 2**20  # quantised scores that exist at a time: enough to fill an accelerator, few enough for the caches of a CPU
SELECTION_RECALL = 0.99  # of the approximate selection of the items that are scored exactly
_PARTITION = "partition.npz"
_CONFIG = "partitioned.json"


@dataclass(frozen=True, kw_only=True)
class PartitionedConfig:
    """How a partitioned index trades recall for time. It has about as many leaves as the square root of the number of items."""

    exact_items: int = 65536  # up to so many items all are scored exactly: on a CPU that was measured faster up to 100,000
    leaf_share: float = 0.25  # share of the leaves that is searched
    reorder_factor: int = 6  # exactly rescored items for each one that is asked for
    min_reorder: int = 256
    quantisation_threshold: float = 0.2  # T of the anisotropic loss, as the authors recommend
    slack: float = 1.25  # places of a leaf for each item that it has in the mean
    training_items: int = 65536  # from which centroids and codebooks are learned, drawn by the seed
    iterations: int = 10  # of k-means, and of each half of learning the codebooks
    encoding_sweeps: int = 3
    approximate_selection: bool = False  # choose items to rescore by `approx_max_k`, which only a TPU has an instruction for
    rebuild_share: float = 0.1  # of all rows: when more were upserted since the last build, upsert builds again
    seed: int = 0

    def __post_init__(self):
        limits = (
            ("exact_items", self.exact_items >= 0, "at least 0"),
            ("leaf_share", 0 < self.leaf_share <= 1, "above 0 and at most 1"),
            ("reorder_factor", self.reorder_factor >= 1, "at least 1"),
            ("min_reorder", self.min_reorder >= 1, "at least 1"),
            ("quantisation_threshold", 0 < self.quantisation_threshold < 1, "between 0 and 1"),
            ("slack", self.slack >= 1, "at least 1"),
            ("training_items", self.training_items >= 1, "at least 1"),
            ("iterations", self.iterations >= 0, "at least 0"),
            ("encoding_sweeps", self.encoding_sweeps >= 0, "at least 0"),
            ("rebuild_share", self.rebuild_share >= 0, "at least 0"),
            ("seed", self.seed >= 0, "at least 0"),
        )
        check_config(self, limits)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Partition:
    """Every item in one place of one leaf; leaves have equally many places, and item 0 stands in those that are free."""

    centroids: Float[Array, "leaves d"]
    codebooks: Float[Array, "blocks centres 2"]
    codes: UInt8[Array, "leaves bytes capacity"]  # of what an item is besides its centroid
    items: Int[Array, "leaves capacity"]

    @property
    def num_leaves(self) -> int:
        return self.items.shape[0]


@partial(jax.jit, static_argnames=("k", "leaves_searched", "reorder", "approximate_selection"))
def search_partition(
    partition: Partition,
    vectors: Float[Array, "i d"],
    queries: Float[Array, "b d"],
    k: int,
    allowed: Bool[Array, "i"] | None = None,
    excluded: Int[Array, "b s"] | None = None,
    *,
    leaves_searched: int,
    reorder: int,
    approximate_selection: bool = False,
) -> tuple[Int[Array, "b k"], Float[Array, "b k"]]:
    """The best ``k`` of the ``reorder`` items with the best quantised scores in the ``leaves_searched`` leaves of the best centroids.

    An item's quantised score is ``q . c + q . r~``, of its leaf's centroid and of its code. Scores that are returned are exact. Where
    fewer than ``k`` items remain, the rest is item 0 with a score of -inf. All shapes are static: one program for all queries of a batch.

    Args:
      partition: Where items are.
      vectors: What they are exactly, by item.
      queries: One vector for each user.
      k: Items to find, at most ``reorder``.
      allowed: False at items that no query may find.
      excluded: Items that the query of this row must not find, 0 where there is none; as many more should be reordered.
      leaves_searched: At most all leaves.
      reorder: At most all places of the leaves searched.
      approximate_selection: Choose the items to score exactly by ``jax.lax.approx_max_k``.
    """
    usable = partition.items > 0 if allowed is None else (partition.items > 0) & allowed[partition.items]
    select = partial(jax.lax.approx_max_k, recall_target=SELECTION_RECALL) if approximate_selection else jax.lax.top_k

    def search_one(row: tuple[Float[Array, "d"], Int[Array, "s"] | None]) -> tuple[Int[Array, "k"], Float[Array, "k"]]:
        query, unwanted = row
        of_centroids, leaves = jax.lax.top_k(partition.centroids @ query, leaves_searched)
        scores = of_centroids[:, None] + code_scores(partition.codebooks, partition.codes[leaves], query)
        best, places = select(jnp.where(usable[leaves], scores, -jnp.inf).reshape(-1), reorder)
        found = partition.items[leaves].reshape(-1)[places]
        keep = best > -jnp.inf
        if unwanted is not None:
            keep &= jnp.all(found[:, None] != unwanted[None], axis=1)
        exact = jnp.dot(vectors[found], query, precision=jax.lax.Precision.HIGHEST)
        best, order = jax.lax.top_k(jnp.where(keep, exact, -jnp.inf), k)
        return jnp.where(best > -jnp.inf, found[order], 0), best

    at_a_time = max(1, MOST_SCORES // (leaves_searched * partition.items.shape[1]))
    return jax.lax.map(search_one, (queries, excluded), batch_size=at_a_time)


class PartitionedIndex:
    """Index that searches the leaves of the best centroids by quantised scores, in one compiled program on any backend.

    Up to ``exact_items`` items, and for a query that has fewer than ``k`` items left in its leaves, all items are scored exactly; so a
    search finds ``k`` items wherever there are so many. An upserted item moves into the leaf of the nearest centroid that has a free place.
    """

    implementation = "partitioned"

    def __init__(
        self, rows: ItemRows, partition: Partition | None, config: PartitionedConfig, changed: Int[np.ndarray, "n"] | None = None
    ) -> None:
        self._config = config
        self._adopt(rows, partition, np.zeros(0, np.int64) if changed is None else changed)

    @classmethod
    def build(cls, item_vectors: Vectors, config: PartitionedConfig | None = None) -> "PartitionedIndex":
        """Index of ``item_vectors``, where row 0 is padding; UserError if there is no item or a value is not finite."""
        config, rows = config or PartitionedConfig(), ItemRows.of(item_vectors)
        return cls(rows, _partition_of(rows, config), config)

    @property
    def num_items(self) -> int:
        return self._rows.num_items

    @property
    def num_leaves(self) -> int:
        """Leaves of the partition; 0 where all items are scored exactly."""
        return 0 if self._partition is None else self._partition.num_leaves

    @property
    def leaves_searched(self) -> int:
        """Leaves that a search looks into."""
        return math.ceil(self._config.leaf_share * self.num_leaves)

    def with_leaf_share(self, leaf_share: float) -> "PartitionedIndex":
        """The same partition, of which another share is searched."""
        return PartitionedIndex(self._rows, self._partition, replace(self._config, leaf_share=leaf_share), self._changed)

    def num_reordered(self, k: int) -> int:
        """Items that a search for ``k`` scores exactly, where nothing is excluded."""
        return max(self._config.min_reorder, self._config.reorder_factor * k)

    def search(
        self,
        queries: Queries,
        k: int,
        *,
        allowed: Bool[np.ndarray, "i"] | None = None,
        excluded: Int[np.ndarray, "b s"] | None = None,
    ) -> Found:
        """See ``Index.search``."""
        rows = jnp.asarray(checked_queries(queries, k, self._rows, allowed, excluded))
        unwanted = padded_excluded(excluded)
        usable = self._rows.usable(allowed)
        places = 0 if self._partition is None else self.leaves_searched * self._partition.items.shape[1]
        reorder = min(places, self.num_reordered(k) + (0 if unwanted is None else unwanted.shape[1]))
        if self._partition is None or reorder < k or len(rows) == 0:
            items, scores = filtered_search(self._table, rows, k, usable, unwanted)
            return np.asarray(items), np.asarray(scores)
        items, scores = search_partition(
            self._partition,
            self._table,
            rows,
            k,
            allowed,
            unwanted,
            leaves_searched=self.leaves_searched,
            reorder=reorder,
            approximate_selection=self._config.approximate_selection,
        )
        items, scores = np.array(items), np.array(scores)
        short = np.flatnonzero(scores[:, -1] == -np.inf)
        if short.size:
            some = np.resize(short, 1 << (len(short) - 1).bit_length())  # powers of two, so that few programs are compiled
            left_out = None if unwanted is None else unwanted[some]
            items[some], scores[some] = filtered_search(self._table, rows[some], k, usable, left_out)
        return items, scores

    def upsert(self, items: Int[np.ndarray, "n"], vectors: Vectors) -> None:
        """See ``Index.upsert``. Builds again when more than ``rebuild_share`` of the rows have changed since the last build."""
        rows = self._rows.upserted(items, vectors)
        changed, partition = np.union1d(self._changed, np.asarray(items)).astype(np.int64), None
        if self._partition is not None and len(changed) <= self._config.rebuild_share * len(rows.vectors):
            partition = _placed(self._partition, np.asarray(items), rows.vectors, self._config)
        if partition is None:
            partition, changed = _partition_of(rows, self._config), changed[:0]
        self._adopt(rows, partition, changed)

    def delete(self, items: Int[np.ndarray, "n"]) -> None:
        """See ``Index.delete``. Frees the places of these items."""
        self._rows = self._rows.without(items)
        if self._partition is not None:
            self._partition = replace(self._partition, items=jnp.asarray(_freed(self._partition, np.asarray(items))))

    def save(self, directory: Path) -> None:
        """See ``Index.save``."""
        with replacing_index(directory) as folder:
            write_rows(folder, self.implementation, self._rows)
            (folder / _CONFIG).write_text(json.dumps(asdict(self._config), indent=2) + "\n")
            if self._partition is None:
                (directory / _PARTITION).unlink(missing_ok=True)
            else:
                np.savez(folder / _PARTITION, changed=self._changed, **vars(self._partition))

    @classmethod
    def load(cls, directory: Path) -> "PartitionedIndex":
        """See ``Index.load``; UserError where the folder was written by another implementation."""
        implementation, _ = read_meta(directory)
        if implementation != cls.implementation:
            raise UserError(f"{directory} holds an index of implementation {implementation!r}; expected 'partitioned'.")
        rows, path = read_rows(directory), directory / _CONFIG
        try:
            config = PartitionedConfig(**json.loads(path.read_text()))
            path = directory / _PARTITION
            if rows.num_items <= config.exact_items and not path.exists():
                return cls(rows, None, config)
            with (
                path.open("rb") as file,
                np.load(file, allow_pickle=False) as arrays,
            ):  # given a path, it leaves a damaged file open
                found = dict(arrays)
            changed = found.pop("changed")
            partition = Partition(**{name: jnp.asarray(values) for name, values in found.items()})
            _check(partition, rows)
        except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, UserError) as error:
            raise unreadable(path, error) from error
        return cls(rows, partition, config, changed)

    def _adopt(self, rows: ItemRows, partition: Partition | None, changed: Int[np.ndarray, "n"]) -> None:
        self._rows, self._partition, self._table = rows, partition, jnp.asarray(rows.vectors)
        self._changed = changed  # items upserted since the last build


@jax.default_matmul_precision("highest")  # accelerators would round to bfloat16, and put items into wrong leaves
def _partition_of(rows: ItemRows, config: PartitionedConfig) -> Partition | None:
    """A new partition of all items that exist; None where they are so few that all are scored exactly."""
    if rows.num_items <= config.exact_items:
        return None
    items = np.flatnonzero(rows.present)
    vectors = rows.vectors[items]
    num_leaves = math.isqrt(len(items))
    key = jax.random.key(config.seed)
    sample = np.random.default_rng(config.seed).permutation(len(items))[: config.training_items]
    centroids = learn_centroids(jnp.asarray(vectors[sample]), min(num_leaves, len(sample)), config.iterations, key)
    leaf_of = np.asarray(nearest_leaf(jnp.asarray(vectors), centroids))
    capacity = capacity_for(len(items), num_leaves, config.slack)
    leaf_of, means = split_leaves(vectors, leaf_of, np.asarray(centroids), capacity)
    residuals, directions = vectors - means[leaf_of], np.asarray(directions_of(jnp.asarray(vectors)))
    weight = parallel_weight(config.quantisation_threshold, vectors.shape[1])
    codebooks = learn_codebooks(residuals[sample], directions[sample], weight, config.iterations, key)
    codes = np.asarray(encode(codebooks, residuals, directions, weight, config.encoding_sweeps))
    places = lay_out(np.arange(1, len(items) + 1), leaf_of, len(means), capacity)  # from 1 on: 0 is a free place
    return Partition(
        centroids=jnp.asarray(means),
        codebooks=codebooks,
        codes=jnp.asarray(np.pad(codes, ((1, 0), (0, 0)))[places].transpose(0, 2, 1)),
        items=jnp.asarray(np.pad(items, (1, 0))[places].astype(np.int32)),
    )


def _freed(partition: Partition, items: Int[np.ndarray, "n"]) -> Int[np.ndarray, "leaves capacity"]:
    """The items by place, without these."""
    table = np.asarray(partition.items)
    return np.where(np.isin(table, items), 0, table)


def _placed(
    partition: Partition, items: Int[np.ndarray, "n"], vectors: Float[np.ndarray, "i d"], config: PartitionedConfig
) -> Partition | None:
    """With these items where their new vectors belong: the nearest leaf that has room. None where there is no room."""
    table, codes, centroids = _freed(partition, items), np.array(partition.codes), np.asarray(partition.centroids)
    room = (table == 0).sum(axis=1)
    if room.sum() < len(items):
        return None
    new, leaves = vectors[items], np.zeros(len(items), np.int64)
    for number, vector in enumerate(new):
        distances = np.square(centroids - vector).sum(axis=1)
        leaves[number] = np.argmin(np.where(room > 0, distances, np.inf))
        room[leaves[number]] -= 1
    weight = parallel_weight(config.quantisation_threshold, vectors.shape[1])
    directions = directions_of(jnp.asarray(new))
    new_codes = np.asarray(
        encode(partition.codebooks, jnp.asarray(new - centroids[leaves]), directions, weight, config.encoding_sweeps)
    )
    for item, leaf, code in zip(items, leaves, new_codes, strict=True):
        place = np.flatnonzero(table[leaf] == 0)[0]
        table[leaf, place], codes[leaf, :, place] = item, code
    return replace(partition, items=jnp.asarray(table), codes=jnp.asarray(codes))


def _check(partition: Partition, rows: ItemRows) -> None:
    """UserError unless the parts fit each other and every item that exists has exactly one place."""
    leaves, capacity = partition.items.shape
    blocks, width = partition.codebooks.shape[0], rows.vectors.shape[1]
    expected = {
        "centroids": (leaves, width),
        "codebooks": (-(-width // BLOCK), CENTRES, BLOCK),
        "codes": (leaves, -(-blocks // 2), capacity),
    }
    for name, shape in expected.items():
        if getattr(partition, name).shape != shape:
            raise UserError(f"{name} have shape {getattr(partition, name).shape}, expected {shape}")
    placed = np.sort(np.asarray(partition.items), axis=None)
    if not np.array_equal(placed[placed > 0], np.flatnonzero(rows.present)):
        raise UserError("its items are not those of the index")
