"""Every implementation that runs here: ``python -m cda4rec_jax.kernels.rank_candidates.bench``. ``cda4rec bench rank`` has the peers.

By the method of ``cda4rec_jax.timing``, from NumPy to NumPy. An exclamation mark stands behind a null that is outside of .95 to 1.05 after
three attempts: the machine was too busy, run again.
"""

import jax
import numpy as np

from cda4rec_jax.kernels.rank_candidates import KnownHistory, ServedRanker
from cda4rec_jax.kernels.rank_candidates.cases import WORKLOAD_CASES, Case, random_inputs, random_weights
from cda4rec_jax.kernels.rank_candidates.native import native_problem
from cda4rec_jax.timing import Contestant, measure

NUM_REQUESTS = 16  # that take turns


def contestants(case: Case) -> list[Contestant]:
    """The full pass and one step by each implementation."""
    weights, requests = random_weights(case), [random_inputs(case, seed) for seed in range(NUM_REQUESTS)]

    def whole(ranker: ServedRanker, number: int) -> np.ndarray:
        one = requests[number % NUM_REQUESTS]
        return ranker(one.tokens, one.vectors, one.vector_scales, one.features)[0]

    def step(ranker: ServedRanker, known: list[KnownHistory], number: int) -> np.ndarray:
        place, one = number % NUM_REQUESTS, requests[number % NUM_REQUESTS]
        scores, grown = ranker(one.tokens[-1:], one.vectors, one.vector_scales, one.features, known=known[place])
        known[place] = KnownHistory(grown.entries, known[place].length)  # so that the next turn adds the same token again
        return scores

    found = []
    for implementation in ("xla", "native") if native_problem() is None else ("xla",):
        ranker = ServedRanker(weights, implementation=implementation)
        known = [ranker(one.tokens[:-1], one.vectors, one.vector_scales, one.features)[1] for one in requests]
        for name, run in (
            (implementation, whole),
            (f"{implementation}, a step", lambda *given, k=known: step(given[0], k, given[1])),
        ):
            np.testing.assert_allclose(run(ranker, 0), whole(ranker, 0), rtol=1e-4, atol=1e-4)
            found.append(Contestant(name=name, call=lambda number, run=run, ranker=ranker: float(len(run(ranker, number)) > 0)))
    return found


def main() -> None:
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, float32, numpy to numpy")
    for case in WORKLOAD_CASES:
        all_of_them = contestants(case)
        names = [one.name for one in all_of_them]
        found = measure(all_of_them, [(name, "xla") for name in names if name != "xla"])
        null = ", ".join(f"{name} {value:.3f}" for name, value in found.nulls.items()) + ("" if found.accepted else "!")
        print(f"\n{case.name}: {case.layers} x {case.width}, {case.tokens} tokens, {case.candidates} candidates; null: {null}")
        for name, rate in found.rates.items():
            print(f"{name:16} {1e6 / rate.median:9.1f} us")


if __name__ == "__main__":
    main()
