"""A trained system as a run keeps it: enough to evaluate and to recommend, and nothing else is needed."""

import logging
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cda4rec_jax.data.prepared import load_prepared
from cda4rec_jax.data.statistics import ItemStatistics
from cda4rec_jax.pipeline.catalogue import Catalogue, ItemTables
from cda4rec_jax.pipeline.corpus import Corpus
from cda4rec_jax.pipeline.decisions import PlanningWorld, payload_sizes
from cda4rec_jax.pipeline.population import Population
from cda4rec_jax.pipeline.system import System, SystemConfig
from cda4rec_jax.planner import MeasuredTimes, WeightScales, Workload, deployment_profile, measured_profile
from cda4rec_jax.processor import cpu_model
from cda4rec_jax.runs.directory import RunDirectory
from cda4rec_jax.runs.provenance import provenance

JOINT, SASREC = "joint", "sasrec"
_WEIGHTS = "final"
_COST_PROFILE = "cost_profile"
_PLANNER = "planner"  # the file of what a planner learns by, and the configuration of one that was trained alone
_logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class TrainedSystem:
    """Weights, tables and data of one run, in memory."""

    run: RunDirectory
    config: SystemConfig
    corpus: Corpus
    graph: nnx.GraphDef
    weights: Any  # the state that `graph` merges
    tables: ItemTables  # from all training events

    @cached_property
    def population(self) -> Population:
        """Compiled functions over the users of this run."""
        return Population(self.graph, self.config, self.tables, self.corpus)

    @cached_property
    def catalogue(self) -> Catalogue:
        """The catalogue under the run's weights."""
        return self.population.catalogue(self.weights)

    @cached_property
    def system(self) -> System:
        """The modules themselves."""
        return nnx.merge(self.graph, self.weights)

    @property
    def measured_times(self) -> MeasuredTimes:
        """The newest that ``save_measured_times`` has stored. Times of another processor are told once, as a warning."""
        stored = self.run.read_json(_COST_PROFILE)
        measured_on, here = stored.get("provenance", {}).get("cpu_model"), cpu_model()
        if measured_on not in (None, here):  # version 0.1 did not say
            _warn_of_other_processor(self.run.path, measured_on, here)
        return MeasuredTimes.from_json(stored["times"])

    @property
    def planner_profile(self) -> str:
        """Name of the costs that the planner was trained with: what ``train_planner_run`` stored, or those of joint training."""
        return self.run.read_config(_PLANNER, dict)["profile"] if self.run.has_config(_PLANNER) else "deployment"

    def world(self, profile: str | None = None) -> PlanningWorld:
        """Costs, exposure and scales to plan by.

        ``profile`` is "deployment" (modelled) or "measured" (``measured_times``); None takes ``planner_profile``, as service does.
        """
        planner = self.run.read_json(_PLANNER)
        workload = Workload(resident_items=len(self.tables.resident_items))
        is_measured = (profile or self.planner_profile) == "measured"
        costs = measured_profile(self.measured_times) if is_measured else deployment_profile(workload)
        return PlanningWorld(
            profile=costs,
            exposure_by_level=jnp.asarray(self.run.read_json("exposure")["exposure"], jnp.float32),
            sizes=payload_sizes(self.catalogue, self.config.history_length),
            scales=WeightScales.of(**planner["scales"]),
            space=self.config.space,
        )


@cache  # once for a run, however often its times are read
def _warn_of_other_processor(run: Path, measured_on: str, here: str) -> None:
    _logger.warning(
        "the measured times of %s are those of another processor (%s, and this is %s) until `cda4rec calibrate` measures them here",
        run,
        measured_on,
        here,
    )


def save_weights(run: RunDirectory, weights: Any) -> None:
    """Keep the final weights."""
    run.save_weights(_WEIGHTS, weights)


def save_measured_times(run: RunDirectory, times: MeasuredTimes, *, of: str, rounds: int, dataset_fingerprint: str) -> None:
    """Keep measured times as those that count, with their origin; what counted before moves to ``earlier``, newest first.

    Args:
        run: where to.
        times: of its models on this machine.
        of: what was timed: bare functions or whole requests.
        rounds: values behind each median, at least.
        dataset_fingerprint: of the run's data.
    """
    earlier = []
    if run.has(f"{_COST_PROFILE}.json"):
        stored = run.read_json(_COST_PROFILE)
        earlier = [{name: value for name, value in stored.items() if name != "earlier"}, *stored.get("earlier", [])]
    origin = {"of": of, "rounds": rounds, "provenance": provenance(dataset_fingerprint=dataset_fingerprint)}
    run.write_json(_COST_PROFILE, {"times": times, **origin, "earlier": earlier})


def save_corpus(run: RunDirectory, corpus: Corpus, statistics: ItemStatistics) -> None:
    """Keep item text features and item statistics beside the prepared data."""
    run.save_arrays("text", {"text": corpus.text})
    run.save_arrays("statistics", dict(vars(statistics)))


def load_corpus(run: RunDirectory) -> Corpus:
    """Data and text features of a run."""
    return Corpus(interactions=load_prepared(run.data_folder), text=run.load_arrays("text")["text"], ids_only=run.kind == SASREC)


def load_trained(path: Path | str) -> TrainedSystem:
    """A finished run.

    Raises:
        UserError: no run, a run of another version, or one whose training has not finished.
    """
    run = RunDirectory.open(path)
    config = run.read_config("system", SystemConfig)
    corpus = load_corpus(run)
    tables = corpus.tables(ItemStatistics(**run.load_arrays("statistics")), config.resident_items)
    shapes = nnx.eval_shape(
        lambda: System(config, jnp.zeros(corpus.text.shape, jnp.float32), corpus.prefix_size, rngs=nnx.Rngs(0))
    )
    graph, abstract = nnx.split(shapes)
    weights = run.load_weights(_WEIGHTS, abstract)
    return TrainedSystem(
        run=run, config=config, corpus=corpus, graph=graph, weights=jax.tree.map(np.asarray, weights), tables=tables
    )
