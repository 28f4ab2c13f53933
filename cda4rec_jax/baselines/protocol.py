"""What every baseline is, and the one way in which all of them are ranked."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Float, Int

from cda4rec_jax.array_typing import Array
from cda4rec_jax.messages import HistoryBatch
from cda4rec_jax.pipeline.corpus import Corpus
from cda4rec_jax.pipeline.full_ranking import checked_ranks, in_batches, ranks_of_unseen
from cda4rec_jax.pipeline.population import BATCH_USERS
from cda4rec_jax.training import Progress

Watch = Callable[[Progress], None]


def unwatched(progress: Progress) -> None:
    """For callers who need no account of progress."""
    del progress


@runtime_checkable
class Recommender(Protocol):
    """A fitted baseline."""

    @property
    def history_length(self) -> int:
        """Newest events of a user that it reads."""
        ...

    @property
    def num_parameters(self) -> int:
        """Numbers that it learned from the data."""
        ...

    def score(self, history: HistoryBatch) -> Float[Array, "b i"]:
        """Score of every item (column 0 is padding and means nothing) as each user's next one; -inf where it is no candidate.

        Reads ``items`` and ``lengths`` of the histories, of at least ``history_length`` stored events, and nothing else.
        """
        ...


def catalogue_ranks(
    recommender: Recommender, corpus: Corpus, users: Int[np.ndarray, "n"], positions: Int[np.ndarray, "n"]
) -> Int[np.ndarray, "n"]:
    """Rank of each target among all items that its user has not seen: ``1 + #{j != target: s_j >= s_target}``.

    The rule is that of ``pipeline.full_ranking``: every tie counts against the target, and so a target whose score is -inf is last; one
    that its user has seen is removed with all that is seen, and has ``MISS_RANK``.

    Args:
        users, positions: one target event each, as in ``Corpus.histories``; its user's earlier events are the history.

    Raises:
        UserError: a score is NaN, as after training that diverged.
    """
    found = []
    for index in in_batches(len(users), BATCH_USERS):
        history = corpus.histories(users[index], positions[index], recommender.history_length)
        ranks = np.asarray(_ranks(recommender.score(history), history.seen, history.targets))
        found.append(ranks[: len(np.unique(index))])
    return checked_ranks(np.concatenate(found) if found else np.zeros(0, np.int32))


_ranks = jax.jit(ranks_of_unseen)
