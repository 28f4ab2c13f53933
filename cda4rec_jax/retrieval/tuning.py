"""Finding the ScaNN index that reaches a recall target in the least time, on held-out queries.

What needs no new build is searched first: for each build, and each number of items to score exactly, bisection finds the fewest leaves that
reach the target on one half of the queries; the fastest of these points must reach it on the other half too. Builds then compete in
turns, by ``cda4rec_jax.timing``; at most two are in memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int

from cda4rec_jax.errors import UserError
from cda4rec_jax.retrieval.exact import ExactIndex
from cda4rec_jax.retrieval.index import Index, Queries, Vectors, mean_recall
from cda4rec_jax.retrieval.scann import Measured, ScannConfig, ScannIndex
from cda4rec_jax.timing import Contestant, TimingConfig, measure

TIMING = TimingConfig(rounds=5, block_seconds=0.1, warm_up_turns=4, attempts=1)
LEAST_QUERIES = 32
_QUICK = TimingConfig(rounds=3, block_seconds=0.03, warm_up_turns=2, attempts=1)  # among the points of one build
_REORDER_FACTORS = (1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)
_LEAST_GAIN = 0.1  # share of leaves that more exact scores must save to go on
_LARGEST_FLAT = 65_536  # items; above, a partition has won every time
_CHUNK = 256  # queries that exact search answers at a time


class RecallNotReached(UserError):
    """No search of what was built reached the target; ``recall`` is the most that was reached."""

    def __init__(self, k: int, target: float, recall: float) -> None:
        super().__init__(
            f"recall@{k} of {target:g} was not reached: {recall:.4f} is the most, on both halves of the held-out queries. Ask for less, "
            "give candidates that are built with more leaves or a finer quantisation, or use build_index(vectors, 'exact'), whose recall "
            "is 1."
        )
        self.recall = recall


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Queries that no item vector was made from, and their exact answers."""

    queries: Float[np.ndarray, "n d"]
    exact: Int[np.ndarray, "n k"]

    @classmethod
    def of(cls, item_vectors: Vectors, queries: Queries, k: int) -> "HeldOut":
        """UserError on fewer than 32 queries, and on what an index refuses."""
        rows = np.ascontiguousarray(queries, np.float32)
        if len(rows) < LEAST_QUERIES:
            raise UserError(f"got {len(rows)} held-out queries to tune on; expected at least {LEAST_QUERIES}, better 1,000.")
        index = ExactIndex.build(item_vectors)
        chunks = [rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK)]
        return cls(queries=rows, exact=np.concatenate([index.search(chunk, k)[0] for chunk in chunks]))

    @property
    def k(self) -> int:
        """Items that are asked for."""
        return self.exact.shape[1]

    def halves(self) -> tuple["HeldOut", "HeldOut"]:
        """Even and odd rows: those that choose, and those that confirm (and by refusing choose, too)."""
        even, odd = (HeldOut(queries=self.queries[part::2], exact=self.exact[part::2]) for part in (0, 1))
        return even, odd

    def recall(self, index: Index) -> float:
        """Mean share of the exact k items that the index finds."""
        found, _ = index.search(self.queries, self.k)
        return mean_recall(found, self.exact)


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The fastest index that reached the target, and what became of every build."""

    index: ScannIndex  # its config builds another like it, and tells what was measured of this one
    trials: tuple[str, ...]  # a line for each build, in the order of the candidates


def candidates_for(num_items: int, config: ScannConfig | None = None) -> tuple[ScannConfig, ...]:
    """What is worth building: no partition (small catalogues only), about root n leaves, half and twice as many, SOAR, autopilot."""
    config = config or ScannConfig()
    if num_items <= config.brute_force_items:
        return (config,)
    tree = replace(config, tree_items=0)
    flat = (replace(config, tree_items=num_items),) if num_items <= _LARGEST_FLAT else ()
    leaves = tuple(replace(tree, leaves_per_root=each) for each in (1.0, 0.5, 2.0))
    return (*flat, *leaves, replace(tree, soar_lambda=1.5), replace(tree, autopilot=True))


def tune_scann(
    item_vectors: Vectors,
    queries: Queries,
    k: int,
    *,
    recall: float = 0.95,
    batch: int = 256,
    candidates: Sequence[ScannConfig] | None = None,
    timing: TimingConfig = TIMING,
    progress: Callable[[str], object] = lambda line: None,
) -> Tuned:
    """The index of ``item_vectors`` that finds a share of ``recall`` of the exact top ``k`` in the least time for a batch.

    Recall is the mean over queries. Two builds of ScaNN differ a little: what is reported was measured on the index that comes back.

    Args:
        item_vectors: row 0 is padding.
        queries: held-out queries, of the kind that will be served.
        k: items to find.
        recall: the least recall, above 0 and at most 1.
        batch: queries of one call, whose time is made least; 1 for serving one at a time.
        candidates: what to build; ``candidates_for`` by default. ``leaf_share`` and what is scored exactly are found for each.
        timing: of the contest between builds.
        progress: hears a line for each build.

    Raises:
      UserError: No candidate reaches the target; fewer than 32 queries; a bad recall, batch or k; ScaNN is not installed.
    """
    held_out = HeldOut.of(item_vectors, queries, k)
    chosen = candidates_for(item_vectors.shape[0] - 1) if candidates is None else candidates
    best, trials, most = None, [], 0.0
    for number, candidate in enumerate(chosen, start=1):
        built = ScannIndex.build(item_vectors, candidate)
        title = f"build {number} of {len(chosen)}, {_described(built)}"
        try:
            tuned = tune_search(built, held_out, recall=recall, batch=batch, timing=timing)
        except RecallNotReached as problem:
            most = max(most, problem.recall)
            trials.append(f"{title}: recall@{k} at most {problem.recall:.4f}")
        else:
            won = best is None or _faster(tuned, best, held_out, batch, timing)
            best = tuned if won else best
            trials.append(f"{title}: {_outcome(tuned)}{'; the fastest so far' if won else ''}")
        progress(trials[-1])
    if best is None:
        raise RecallNotReached(k, recall, most)
    return Tuned(index=best, trials=tuple(trials))


def tune_search(index: ScannIndex, held_out: HeldOut, *, recall: float, batch: int, timing: TimingConfig = TIMING) -> ScannIndex:
    """The same build, searched in the fastest way that reaches ``recall`` on both halves of the queries; its config holds ``Measured``.

    Where the confirming half falls short, the goal of the other half rises by what was missing, up to the widest search. What comes back
    is the first that the confirming half does not refuse, so the recall in ``Measured``, which is taken on that half, is biased upwards;
    queries that had no part in tuning tell the recall without bias.

    Raises:
      UserError: The target cannot be reached with this build (``RecallNotReached``), or recall or batch are no such numbers.
    """
    if not 0.0 < recall <= 1.0 or batch < 1:
        raise UserError(
            f"got recall {recall:g} and batch {batch}; expected a recall above 0 and at most 1, and a batch of at least 1."
        )
    choosing, confirming = held_out.halves()
    goal = recall
    while points := _cheapest(index, choosing, goal):
        fastest = _fastest(points, held_out, batch)
        found = confirming.recall(fastest)
        if found >= recall:
            return _with_measured(fastest, held_out, found, batch, timing)
        goal = choosing.recall(fastest) + recall - found  # above what this point has, so that it is not proposed again
    widest = _at(index, index.num_leaves, _most_exact(index, held_out.k), held_out.k) if index.reorders else index
    most = min(choosing.recall(widest), confirming.recall(widest))
    if most >= recall:
        return _with_measured(widest, held_out, confirming.recall(widest), batch, timing)
    raise RecallNotReached(held_out.k, recall, most)


def _most_exact(index: ScannIndex, k: int) -> int:
    return min(index.num_items, round(_REORDER_FACTORS[-1] * k))


def _at(index: ScannIndex, leaves: int, exact_scores: int, k: int) -> ScannIndex:
    """Searched over so many leaves, and with so many items scored exactly for ``k``."""
    share = leaves / index.num_leaves if index.num_leaves else 1.0
    return index.searched_with(
        replace(index.config, leaf_share=share, reorder_factor=exact_scores / k, min_reorder=exact_scores, measured=None)
    )


def _cheapest(index: ScannIndex, half: HeldOut, goal: float) -> list[ScannIndex]:
    """Ways to search that reach the goal, none of which has both more leaves and more exact scores than another; empty if none does."""
    k, most = half.k, _most_exact(index, half.k)

    def reaches(leaves: int, exact_scores: int) -> bool:
        return half.recall(_at(index, leaves, exact_scores, k)) >= goal

    if not index.reorders:
        return [index] if half.recall(index) >= goal else []
    if not reaches(index.num_leaves, most):
        return []
    if not index.num_leaves:
        return [_at(index, 0, _least(k, most, lambda exact_scores: reaches(0, exact_scores)), k)]
    points, leaves = [], index.num_leaves
    for exact_scores in dict.fromkeys(min(most, round(factor * k)) for factor in _REORDER_FACTORS):
        if not reaches(leaves, exact_scores):
            continue
        before, leaves = leaves, _least(1, leaves, lambda fewer, exact_scores=exact_scores: reaches(fewer, exact_scores))
        if points and leaves > (1.0 - _LEAST_GAIN) * before:
            break
        points.append(_at(index, leaves, exact_scores, k))
    return points


def _least(low: int, high: int, reaches: Callable[[int], bool]) -> int:
    """The least number that reaches, by bisection; ``high`` does."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle + 1, high)
    return high


def _contestant(name: str, index: ScannIndex, queries: Float[np.ndarray, "n d"], k: int, batch: int) -> Contestant:
    """Counts queries; batches rotate, and go round at the end."""
    num_parts = -(-len(queries) // batch)
    parts = [
        np.ascontiguousarray(queries[np.arange(part * batch, (part + 1) * batch) % len(queries)]) for part in range(num_parts)
    ]

    def call(number: int) -> float:
        index.search(parts[number % num_parts], k)
        return float(batch)

    return Contestant(name=name, call=call)


def _fastest(points: Sequence[ScannIndex], held_out: HeldOut, batch: int) -> ScannIndex:
    names = [str(number) for number in range(len(points))]
    contestants = [
        _contestant(name, point, held_out.queries, held_out.k, batch) for name, point in zip(names, points, strict=True)
    ]
    if len(points) == 1:
        return points[0]
    found = measure(contestants, [(name, names[0]) for name in names[1:]], _QUICK)
    ratios = [1.0, *(found.ratio(name, names[0]).median for name in names[1:])]
    return points[int(np.argmax(ratios))]


def _faster(tuned: ScannIndex, best: ScannIndex, held_out: HeldOut, batch: int, timing: TimingConfig) -> bool:
    sides = [_contestant(name, index, held_out.queries, held_out.k, batch) for name, index in (("new", tuned), ("best", best))]
    return measure(sides, [("new", "best")], timing).ratio("new", "best").median > 1.0


def _with_measured(index: ScannIndex, held_out: HeldOut, recall: float, batch: int, timing: TimingConfig) -> ScannIndex:
    sides = [_contestant(name, index, held_out.queries, held_out.k, size) for name, size in (("batch", batch), ("single", 1))]
    rates = measure(sides, [("batch", "single")], timing).rates
    measured = Measured(
        num_items=index.num_items,
        num_queries=len(held_out.queries) // 2,
        k=held_out.k,
        recall=recall,
        batch=batch,
        batch_ms=1e3 * batch / rates["batch"].median,
        single_ms=1e3 / rates["single"].median,
        threads=index.threads,
    )
    return index.searched_with(replace(index.config, measured=measured))


def setting_of(index: ScannIndex) -> str:
    """How it was built and is searched, in words."""
    return ", ".join(part for part in (_described(index), _searched(index)) if part)


def _described(index: ScannIndex) -> str:
    config, leaves = index.config, index.num_leaves
    how = [f"{leaves} leaves" if leaves else "no partition"]
    how += ["autopilot"] if config.autopilot else []
    how += [f"SOAR {config.soar_lambda:g}"] if config.soar_lambda is not None and leaves and not config.autopilot else []
    return ", ".join(how)


def _searched(index: ScannIndex) -> str:
    leaves = [f"{max(1, round(index.config.leaf_share * index.num_leaves))} leaves searched"] if index.num_leaves else []
    exact = [f"{index.config.min_reorder} items scored exactly"] if index.reorders else []
    return ", ".join(leaves + exact)


def _outcome(index: ScannIndex) -> str:
    measured = index.config.measured
    assert measured is not None
    found = (
        f"recall@{measured.k} {measured.recall:.4f}, {measured.batch_ms:.2f} ms for {measured.batch} queries, "
        f"{measured.single_ms:.3f} ms for one, {measured.threads} threads"
    )
    return ", ".join(part for part in (_searched(index), found) if part)
