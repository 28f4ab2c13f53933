"""What ``test_mesh.py`` checks on eight devices, in a process of its own: prints one JSON object.

``python eight_devices.py TINY_RUN TINY_BASELINE FOLDER``, both runs of one device, and a folder to write to.
"""

import gc
import json
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cda4rec_jax.errors import UserError
from cda4rec_jax.runs import RunDirectory
from cda4rec_jax.runs.artifacts import load_corpus
from cda4rec_jax.training import Interrupted, Progress, RunConfig, StepConfig, Trainer, step, train_run
from cda4rec_jax.training.mesh import make_mesh

MESHES = ("data=8", "items=8", "data=4,items=2")


def make_trainer(finished: Path, folder: Path, mesh: str | None) -> Trainer:
    """A trainer at the start of what the finished run trained."""
    run = RunDirectory.open(finished)
    config = run.read_config("run", RunConfig)
    exposure = tuple(run.read_json("exposure")["exposure"]) if run.has("exposure.json") else None
    new = RunDirectory.create(folder, {}, run.kind)
    of_step = StepConfig(system=config.system, train=config.train)
    devices = None if mesh is None else make_mesh(mesh)
    return Trainer(load_corpus(run), of_step, config.packing, exposure, new, mesh=devices)


def joint_steps(trainer: Trainer, count: int) -> list[dict[str, float]]:
    rows = []
    for number in range(count):
        trainer.state, values = trainer._joint(
            trainer.state, trainer.layout.place_batch(trainer.source[number]), *trainer._constants
        )
        rows.append({name: float(value) for name, value in values.items()})
    return rows


def weights(trainer: Trainer) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(trainer.weights())])


def shards(trainer: Trainer) -> dict[str, list[int]]:
    """Shape of the part that one device holds, of the leaves that are divided."""
    leaves, _ = jax.tree_util.tree_flatten_with_path((trainer.state, trainer._constants))
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    parts = {name: leaf.addressable_shards[0].data.shape for name, leaf in named.items()}
    return {name: list(shape) for name, shape in parts.items() if shape != named[name].shape}


def few_steps(baseline: Path, folder: Path) -> dict[str, Any]:
    """Three steps of SASRec on every mesh, beside one device."""
    one = make_trainer(baseline, folder / "one", None)
    expected = joint_steps(one, 3)
    found: dict[str, Any] = {"one": [row["loss"] for row in expected]}
    for mesh in MESHES:
        trainer = make_trainer(baseline, folder / mesh, mesh)
        losses = [row["loss"] for row in joint_steps(trainer, 3)]
        apart = float(np.max(np.abs(weights(trainer) - weights(one))))
        found[mesh] = {"losses": losses, "weights_apart": apart, "shards": shards(trainer)}
        if mesh == "items=8":
            batch = trainer.layout.place_batch(trainer.source[0])
            program = trainer._joint.lower(trainer.state, batch, *trainer._constants).compile().as_text()
            found["collectives"] = re.findall(r" (all-[a-z]+|reduce-scatter|collective-permute)(?:-start)?\(", program)
    return found


def deciders(tiny: Path, folder: Path) -> dict[str, float]:
    """The joint step until it is logged first."""
    trainer = make_trainer(tiny, folder, "data=4,items=2")
    rows = joint_steps(trainer, 10)
    observation = trainer.layout.place_batch(trainer._keep_observations().batch(0, 8))
    # The planner-only step has nothing that the joint one has not: it is lowered, not compiled, which would take as long again.
    frozen, _, world = trainer._constants
    trainer._decide.lower(trainer.state, observation, frozen, world, trainer.layout.place(np.int32(0)))
    return rows[-1]


def stop_at(step: int) -> Callable[[Progress], None]:
    """Presses Ctrl-C as soon as a step is logged."""

    def watch(progress: Progress) -> None:
        if progress.values and progress.step == step:
            signal.raise_signal(signal.SIGINT)

    return watch


def resumed(baseline: Path, folder: Path) -> dict[str, Any]:
    """The whole training job on eight devices, then on two, then on one; how often each traced the step."""
    config = RunDirectory.open(baseline).read_config("run", RunConfig)
    traces = []
    joint_step = step.joint_step

    def counting(*arguments: Any, **options: Any) -> Any:
        traces[-1] += 1
        return joint_step(*arguments, **options)

    step.joint_step = counting
    stops = (("data=4,items=2", 10), ("items=2", 40), (None, 0))  # the second stop is in the second epoch
    for number, (mesh, last) in enumerate(stops):
        traces.append(0)
        try:
            devices = None if mesh is None else make_mesh(mesh)
            data = str(baseline / "data")
            train_run(data, config, folder, resume=number > 0, mesh=devices, watch=stop_at(last))
        except Interrupted:
            continue
    step.joint_step = joint_step
    rows = RunDirectory.open(folder).metrics()
    finished = RunDirectory.open(folder).load_weights("final")
    return {"metrics": rows, "traces": traces, "ids": [list(finished[name].shape) for name in finished if "items/ids" in name]}


def refused() -> str:
    try:
        make_mesh("data=9")
    except UserError as error:
        return str(error)
    return ""


def main(tiny: Path, baseline: Path, folder: Path) -> None:
    """Run everything."""
    gc.set_threshold(20_000, 20, 20)  # as in conftest.py; every trainer traces its own step
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    found = {
        "few_steps": few_steps(baseline, folder),
        "resumed": resumed(baseline, folder / "resumed"),
        "deciders": deciders(tiny, folder / "deciders"),
        "refused": refused(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
