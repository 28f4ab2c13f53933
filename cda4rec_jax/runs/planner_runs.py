"""Runs that have the agents of another one, and a planner of their own."""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from cda4rec_jax.errors import UserError
from cda4rec_jax.pipeline.system import SystemConfig
from cda4rec_jax.planner import LearnedPlanner
from cda4rec_jax.runs.artifacts import JOINT, TrainedSystem, load_trained, save_weights
from cda4rec_jax.runs.directory import RunDirectory
from cda4rec_jax.runs.provenance import provenance

_COPIED = ("data", "index", "text.npz", "statistics.npz", "exposure.json", "planner.json", "cost_profile.json")


def load_for_planner_run(path: Path | str, out: Path | str, overwrite: bool) -> tuple[TrainedSystem, Path]:
    """The finished run at ``path``, and where a run with its agents can be written.

    Raises:
        UserError: no finished run, one without a planner, ``out`` is that run or holds another without ``overwrite``.
    """
    given = RunDirectory.open(path)
    if given.kind != JOINT:
        raise UserError(f"{given.path} is a run of kind {given.kind!r}, which has no planner: name a joint run")
    out = given.apart(out)
    RunDirectory.check_destination(out, overwrite)
    return load_trained(given.path), out


def write_planner_run(
    trained: TrainedSystem,
    out: Path,
    config: SystemConfig,
    planner: LearnedPlanner,
    origin: Mapping[str, Any],
    records: Mapping[str, Any],
    *,
    training: Mapping[str, Any],
    overwrite: bool,
    metrics: Iterable[Mapping[str, Any]] = (),
) -> RunDirectory:
    """A run that needs nothing else, with the data, agents, index, costs and scales of the run ``trained``, which stays as it is.

    Args:
        trained: whose agents.
        out: where to, of ``load_for_planner_run``.
        config: that of the agents, with the class of this planner.
        planner: in service from now on.
        origin: how it came about, beside the run that it is of; ``profile`` is the costs that it plans by.
        records: JSON files to keep, by name.
        training: what is told of a finished run: the ``seconds`` that it took, at least.
        overwrite: replace the run that ``out`` holds.
        metrics: rows of the log.
    """
    given = trained.run
    kinds = {"run": dict, "system": dict, "source": str, "text": dict}
    configs = {name: given.read_config(name, kind) for name, kind in kinds.items()}
    configs |= {"system": config, "run": {**configs["run"], "system": config}, "planner": {"run": str(given.path), **origin}}
    run = RunDirectory.create(out, configs, JOINT, overwrite)
    for name in _COPIED:
        copy = shutil.copytree if (given.path / name).is_dir() else shutil.copy
        copy(given.path / name, run.path / name)
    save_weights(run, weights_with(trained, planner))
    for name, value in records.items():
        run.write_json(name, value)
    run.write_json("provenance", provenance(dataset_fingerprint=trained.corpus.interactions.fingerprint))
    for row in metrics:
        run.append_metric(row)
    run.write_json("training", training)
    return run


def weights_with(trained: TrainedSystem, planner: Any) -> Any:
    """The weights of a system, with this planner in the place of its own."""
    system = nnx.merge(trained.graph, trained.weights)
    system.policy = planner
    return jax.tree.map(np.asarray, nnx.state(system))
