"""Requests of sampled users in drawn contexts, served for real: what a file of traces is recorded from."""

from collections.abc import Callable, Sequence

import numpy as np

from cda4rec_jax.messages import Trace
from cda4rec_jax.runtime.recommend.recommender import Recommender

MAX_DRAW = 2**31 - 1


def record_traces(
    recommender: Recommender, num_requests: int, seed: int, progress: Callable[[int, int], None] = lambda done, total: None
) -> Sequence[Trace]:
    """Serve ``num_requests`` requests and return their traces, which a recommender with a ``TraceLog`` also keeps.

    ``seed`` draws the users, nobody twice before everybody once, and which of their contexts v1 they meet. Every link does what it
    is drawn to do, failures included.
    """
    rng, user_ids = np.random.default_rng(seed), recommender.user_ids
    rounds = -(-num_requests // len(user_ids))
    users = np.concatenate([rng.permutation(len(user_ids)) for _ in range(rounds)])[:num_requests]
    draws = rng.integers(0, MAX_DRAW, num_requests)
    traces = []
    for user, draw in zip(users.tolist(), draws.tolist(), strict=True):
        traces.append(recommender.serve_drawn(user_ids[user], draw))
        progress(len(traces), num_requests)
    return traces
