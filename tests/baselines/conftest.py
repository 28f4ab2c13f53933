"""A synthetic world that every baseline learns in seconds, and hand-made worlds.

The package is imported where it is used: pytest reads this file before the suite's own set-up when only this folder is run.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from cda4rec_jax.pipeline.corpus import Corpus


@pytest.fixture(scope="session")
def corpus() -> "Corpus":
    from cda4rec_jax.data import read_interactions
    from cda4rec_jax.data.text import TfidfSvd
    from cda4rec_jax.pipeline.corpus import build_corpus

    return build_corpus(read_interactions("synthetic:users=120,items=100"), TfidfSvd(dimensions=8))


@pytest.fixture(scope="session")
def corpus_of() -> Callable[[list[list[int]], int], "Corpus"]:
    """``corpus_of(histories, num_items)``: the last event of each history is the test target, the one before the validation target."""
    from cda4rec_jax.data import Interactions
    from cda4rec_jax.pipeline.corpus import Corpus

    def make(histories: list[list[int]], num_items: int) -> Corpus:
        lengths = [len(history) for history in histories]
        interactions = Interactions(
            name="made",
            user_ids=tuple(f"u{j}" for j in range(len(histories))),
            item_ids=tuple(f"i{j}" for j in range(num_items)),
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            items=np.concatenate(histories).astype(np.int32),
            timestamps=np.concatenate([np.arange(length) for length in lengths]).astype(np.float64),
            has_timestamps=False,
            titles=("",) * num_items,
            categories=((),) * num_items,
            user_attributes={},
        )
        return Corpus(interactions=interactions, text=np.zeros((num_items + 1, 1), np.float32), ids_only=True)

    return make
