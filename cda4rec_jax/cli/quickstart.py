"""Everything once: train, train the baseline, evaluate, recommend, compare retrieval; with the seconds of every stage."""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import numpy as np
from rich.console import Console

from cda4rec_jax.cli.arguments import Level, Link
from cda4rec_jax.cli.console import StagesView, in_shell
from cda4rec_jax.cli.train import train
from cda4rec_jax.data import Split
from cda4rec_jax.evaluation import evaluate_run
from cda4rec_jax.messages import EgressLevel
from cda4rec_jax.pipeline.request import RequestFunctions
from cda4rec_jax.presets import preset, sasrec
from cda4rec_jax.retrieval import Comparison, ExactIndex, Index, compare, load_index
from cda4rec_jax.runs import RunDirectory
from cda4rec_jax.runs.artifacts import TrainedSystem, load_trained
from cda4rec_jax.runtime.recommend import Recommender
from cda4rec_jax.training import RunConfig

REQUESTS: tuple[tuple[Link, Level], ...] = (("wifi", "full"), ("3g", "recent"), ("offline", "full"))
RECALL_USERS, RECALL_K = 200, 100


def quickstart(data: str, out: Path, console: Console) -> None:
    """Run all stages and say where the run is.

    Args:
        data: what to train on, any source that ``read_source`` reads; its preset is the one that has its name, or one that fits its size.
        out: run directory; a number is appended where it is taken, so that no run is ever lost. The baseline goes to ``sasrec``
            inside of it.
        console: what to print to.
    """
    out, seconds = unused(out), {}
    baseline = out / "sasrec"
    with _stage(console, "Training both agents and the planner", seconds):
        config = preset("auto", data)
        train(data, config, out, console)
    with _stage(console, "Training SASRec, the baseline, for at most as long", seconds):
        train(str(out / "data"), _for_as_long(config, out), baseline, console)
    with _stage(console, "Evaluating on the held-out last event of every user", seconds):
        with StagesView(console) as view:
            report = evaluate_run(out, baseline=baseline, progress=view.progress)
        report.print(console)
    with _stage(console, "Recommending to three users", seconds):
        trained = load_trained(out)
        users = trained.corpus.interactions.user_ids
        with Recommender(trained) as recommender:
            for (link, consent), user in zip(REQUESTS, (users[0], users[len(users) // 2], users[-1]), strict=True):
                recommender.recommend(user, link=link, consent=consent).print(console)
    with _stage(console, "Comparing retrieval with exact search", seconds):
        console.print(_retrieval_line(trained), highlight=False, soft_wrap=True)
    total = sum(seconds.values())
    stages = ", ".join(f"{stage.lower()} {taken:.0f} s" for stage, taken in seconds.items())
    console.print(f"\n{total:.0f} s in all: {stages}.", highlight=False, soft_wrap=True)
    console.print(f"The run directory is {out}. Go on with, for example:", highlight=False, markup=False, soft_wrap=True)
    command = in_shell("cda4rec recommend --run", out, "--user", users[1], "--link", "3g")
    console.print(f"  {command}", highlight=False, markup=False, soft_wrap=True)


def unused(path: Path) -> Path:
    """The path, or the first of ``path-2``, ``path-3``, ... that does not exist or is an empty folder."""
    for number in count(1):
        candidate = path if number == 1 else path.with_name(f"{path.name}-{number}")
        if not candidate.exists() or (candidate.is_dir() and not any(candidate.iterdir())):
            return candidate
    raise AssertionError("count() has no end")


def compare_retrieval(trained: TrainedSystem, index: Index, k: int) -> Comparison:
    """The index of a run against exact search, for the semantic embeddings of users at the validation split."""
    functions = RequestFunctions(trained.system, trained.catalogue, trained.config, index)
    positions = trained.corpus.target_positions(Split.VALIDATION)
    queries = []
    for user in np.arange(len(positions))[:RECALL_USERS, None]:
        history = trained.corpus.histories(user, positions[user], trained.config.stored_events)
        queries.append(np.asarray(functions.semantic(functions.abstract(history, EgressLevel.FULL, 0))))
    return compare(index, ExactIndex.build(trained.catalogue.vectors), np.concatenate(queries), k)


def _for_as_long(config: RunConfig, out: Path) -> RunConfig:
    """SASRec of the same sizes, with the wall time that joint training took."""
    seconds = RunDirectory.open(out).read_json("training")["seconds"]
    baseline = sasrec(config)
    return dataclasses.replace(baseline, train=dataclasses.replace(baseline.train, max_seconds=seconds))


def _retrieval_line(trained: TrainedSystem) -> str:
    index = load_index(trained.run.index_folder)
    if index.implementation == "exact":
        return f"The index of this run is exact search over {index.num_items:,} items, for the reason that training told."
    found = compare_retrieval(trained, index, min(RECALL_K, index.num_items))
    return (
        f"{index.implementation} over {index.num_items:,} items: recall@{found.k} {found.recall:.3f} against exact search, median of "
        f"{found.num_queries} single queries {found.index_ms:.3f} ms; exact search {found.exact_ms:.3f} ms"
    )


@contextmanager
def _stage(console: Console, title: str, seconds: dict[str, float]) -> Iterator[None]:
    console.rule(title, align="left")
    start = time.monotonic()
    yield
    seconds[title.split(",")[0]] = time.monotonic() - start
