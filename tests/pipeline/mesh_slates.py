"""What ``test_retrieve_and_rank.py`` compares, in a process of its own: prints one JSON object, the answer to each case.

``python mesh_slates.py MESH/PLAN ... [--job COORDINATOR NUMBER]``: MESH is ``one`` for one device, or ``pmap``; PLAN ``index`` searches a
divided index instead. The job is one process of two.
"""

import argparse
import gc
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cda4rec_jax.cli.process import join_processes
from cda4rec_jax.data.splits import Split
from cda4rec_jax.messages import HistoryBatch
from cda4rec_jax.pipeline.catalogue import Catalogue
from cda4rec_jax.pipeline.outcomes import outcomes
from cda4rec_jax.pipeline.retrieve_and_rank import retrieve_and_rank
from cda4rec_jax.retrieval import ExactIndex, ShardedIndex
from cda4rec_jax.runs.artifacts import TrainedSystem, load_trained
from cda4rec_jax.training.mesh import make_mesh

CHECKPOINT = Path(__file__).resolve().parents[2] / "checkpoints" / "synthetic-tiny"
NUM_USERS, K = 19, 10  # so many users divide over no mesh


def asked(trained: TrainedSystem) -> HistoryBatch:
    """The users of every case."""
    users = np.arange(NUM_USERS)
    return trained.corpus.histories(users, trained.corpus.target_positions(Split.TEST)[users], trained.config.stored_events)


def by_pmap(trained: TrainedSystem, plan: str) -> np.ndarray:
    """The items of ``plan`` that ``pipeline.outcomes`` promises: every device has the whole catalogue, and some of the users."""
    devices, index = jax.device_count(), trained.config.space.index(plan)

    def items(weights: Any, catalogue: Catalogue, history: HistoryBatch) -> jax.Array:
        system, nothing = nnx.merge(trained.graph, weights), jnp.zeros_like(history.lengths)
        cache = (nothing, nothing.astype(jnp.float32))
        found = outcomes(system.cloud, system.device, catalogue, history, *cache, trained.config, K)
        assert found.slates is not None
        return found.slates[:, index]

    rows = np.minimum(np.arange(-(-NUM_USERS // devices) * devices), NUM_USERS - 1)
    per_device = jax.tree.map(lambda leaf: leaf[rows].reshape(devices, -1, *leaf.shape[1:]), asked(trained))
    found = jax.pmap(items, in_axes=(None, None, 0))(trained.weights, trained.catalogue, per_device)
    return np.asarray(found).reshape(-1, K)[:NUM_USERS]


def searched(trained: TrainedSystem, mesh: str) -> tuple[np.ndarray, np.ndarray]:
    """What an index finds with both filters on."""
    vectors = np.asarray(trained.catalogue.vectors)
    index = ExactIndex.build(vectors) if mesh == "one" else ShardedIndex.build(vectors, make_mesh(mesh))
    allowed, excluded = np.arange(len(vectors)) % 3 > 0, asked(trained).seen
    return index.search(2 * vectors[1 : 1 + NUM_USERS], 2 * K, allowed=allowed, excluded=excluded)


def answer(trained: TrainedSystem, mesh: str, plan: str) -> dict[str, Any]:
    """Items, and scores where there are any."""
    if mesh == "pmap":
        return {"items": by_pmap(trained, plan).tolist()}
    if plan == "index":
        items, scores = searched(trained, mesh)
        return {"items": items.tolist(), "scores": scores.tolist()}
    options = {"plan": plan, "k": K, "mesh": None if mesh == "one" else make_mesh(mesh)}
    slate = retrieve_and_rank(trained.system, trained.catalogue, asked(trained), trained.config, **options)
    return {"items": slate.items.tolist(), "scores": slate.scores.tolist()}


def main() -> None:
    """Answer every case."""
    gc.set_threshold(20_000, 20, 20)  # as in conftest.py; every case traces a program of its own
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--job", nargs=2)
    given = parser.parse_args()
    if given.job:
        join_processes(given.job[0], 2, int(given.job[1]))
    trained = load_trained(CHECKPOINT)
    print(json.dumps({case: answer(trained, *case.split("/")) for case in given.cases}))


if __name__ == "__main__":
    main()
