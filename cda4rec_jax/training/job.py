"""The whole training job: from a data source to a run directory that needs nothing else."""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from cda4rec_jax.data import Interactions, load_prepared, prepare
from cda4rec_jax.data.interactions import MIN_EVENTS
from cda4rec_jax.data.packing import PackingConfig
from cda4rec_jax.data.text import TfidfSvd
from cda4rec_jax.data.text_vectors import TextVectors, load_text_vectors
from cda4rec_jax.errors import UserError
from cda4rec_jax.messages import EgressLevel
from cda4rec_jax.pipeline.calibration import ROUNDS, measure_times
from cda4rec_jax.pipeline.corpus import Corpus, build_corpus, corpus_with_text
from cda4rec_jax.pipeline.exposure import measure_exposure
from cda4rec_jax.pipeline.system import SystemConfig
from cda4rec_jax.privacy.attacks.history_recovery import check_size
from cda4rec_jax.retrieval import build_index, choose_index
from cda4rec_jax.runs import FINISHED, RunDirectory, provenance
from cda4rec_jax.runs.artifacts import (
    JOINT,
    SASREC,
    load_corpus,
    load_trained,
    save_corpus,
    save_measured_times,
    save_weights,
)
from cda4rec_jax.runs.checkpoints import check_path
from cda4rec_jax.runs.processes import any_process, first_does, is_first
from cda4rec_jax.training.batches import MIN_EVENTS_KEPT, withheld_events
from cda4rec_jax.training.config import TrainConfig
from cda4rec_jax.training.loop import Progress, Trainer
from cda4rec_jax.training.mesh import rows_multiple
from cda4rec_jax.training.planner_only import OUTCOMES, TRAINING
from cda4rec_jax.training.planner_run import check_is_trained, finish_policy
from cda4rec_jax.training.step import StepConfig

_PHASES = {OUTCOMES: "outcomes", TRAINING: "policy"}  # in which a policy is trained alone


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that a training job is told."""

    system: SystemConfig
    packing: PackingConfig
    train: TrainConfig
    text_dimensions: int  # of TF-IDF + SVD; 0 trains without text vectors (and SASRec on ids alone)
    k_core: int = 5
    text_file: str | None = None  # vectors that `cda4rec encode` wrote, instead of TF-IDF + SVD

    @property
    def kind(self) -> str:
        return SASREC if self.system.device is None else JOINT


def train_run(
    source: str,
    config: RunConfig,
    out: Path | str,
    *,
    resume: bool = False,
    overwrite: bool = False,
    mesh: Mesh | None = None,
    watch: Callable[[Progress], None] = lambda progress: None,
    tell: Callable[[str], None] = lambda line: None,
) -> RunDirectory:
    """Prepare, train, measure and save.

    The data is read before anything is written to ``out``, so a bad source neither leaves a run behind nor costs an old one. Every
    process of a job calls this with the same arguments, and sees the same ``out``.

    Args:
        source: anything that ``read_source`` reads; ignored with ``resume``.
        config: ignored with ``resume``, which goes on with the configuration and the data of the run.
        out: the run directory.
        resume: continue the run in ``out`` from its last checkpoint.
        overwrite: replace the run that ``out`` holds.
        mesh: devices to train on, see ``training.mesh``; None takes one. A run may be resumed on any other.
        watch: hears of the progress of training.
        tell: hears one line about each other stage.

    Raises:
        UserError: bad data, a planner that is not trained, a text file that is bad or of other items, an existing run without ``resume``
            or ``overwrite``, an unwritable directory, a batch that the mesh cannot divide.
        Interrupted: Ctrl-C; all is saved.
    """
    out = Path(out).expanduser()
    run = _reopened(out) if resume else None
    config = config if run is None else run.read_config("run", RunConfig)
    rows_multiple(mesh, config.train.rows_per_batch, config.train.accumulation_steps)
    if run is None:
        first_does(lambda: _start(source, config, out, overwrite, tell))
        run = RunDirectory.open(out)
    elif run.has(FINISHED):
        tell(f"training of {run.path} is finished already")
        return run
    corpus = first_does(lambda: _corpus(config, run)) or load_corpus(run)
    exposure = None
    if config.kind == JOINT:
        first_does(lambda: _measure_exposure(corpus, config, run))
        exposure = _exposure(run, tell)
    step = StepConfig(system=config.system, train=config.train)
    trainer = Trainer(corpus, step, config.packing, exposure, run, watch, mesh)
    tell(
        f"{corpus.interactions.num_users:,} users, {corpus.interactions.num_items:,} items, "
        f"{trainer.source.targets_per_epoch:,} targets an epoch, {trainer.num_steps:,} steps; compiling the first takes a while"
    )
    weights, seconds = trainer.fit(resume=resume), trainer.position.elapsed_s
    if config.kind == JOINT and config.train.refit_trunks:
        again = _refit(corpus, step, config.packing, run, watch, mesh)
        weights, seconds = trainer.weights_with(again), seconds + again.position.elapsed_s
    _conclude(run, trainer, corpus, weights, seconds, watch, tell)
    return run


def _refit(
    corpus: Corpus,
    step: StepConfig,
    packing: PackingConfig,
    run: RunDirectory,
    watch: Callable[[Progress], None],
    mesh: Mesh | None,
) -> Trainer:
    """Trunks that are trained again from their start, on all training events, in a folder of their own.

    The deciders have learned from trunks that had not seen the withheld events, as trunks at test time have not seen the targets. So
    deciders stay and trunks are replaced, as in stacking (Wolpert, 1992).
    """
    folder = run.path / "refit"
    # The first process looks, and all hear of it: another one may look when the folder has just been made.
    resume = any_process(is_first() and (folder / "config.json").exists())[0]
    if not resume:
        first_does(lambda: RunDirectory.create(folder, {}, run.kind))
    trainer = Trainer(corpus, step, packing, None, RunDirectory.open(folder), watch, mesh, withhold=False)
    trainer.fit(resume=resume)
    return trainer


def refit_deciders(
    path: Path | str,
    out: Path | str,
    *,
    system: SystemConfig | None = None,
    practice_steps: int = 0,
    overwrite: bool = False,
    watch: Callable[[Progress], None] = lambda progress: None,
    tell: Callable[[str], None] = lambda line: None,
) -> RunDirectory:
    """A run with the data and the trunks of a finished joint run, whose fusion head and policy are trained from their start.

    No gradient of a decider ever reaches a trunk, so these are the trunks that training them on their own would have given.

    Args:
        path: the finished run.
        out: the new run; not that of ``path``.
        system: as that of the run but for ``without_features``; None takes the run's.
        practice_steps: steps like those that deciders take beside the trunks, before those of the planner-only phase.
        overwrite: replace the run that ``out`` holds.

    Raises:
        UserError: no such run, a run without deciders, trunks that do not fit ``system``, ``out`` is that run or holds another
            without ``overwrite``.
    """
    given = RunDirectory.open(path)
    if given.kind != JOINT:
        raise UserError(f"{given.path} is a run of kind {given.kind!r}, which has no deciders: name a joint run")
    config = given.read_config("run", RunConfig)
    config = replace(config, system=system or config.system)
    configs = {"run": config, "system": config.system, "source": given.path, "text": given.read_config("text", dict)}
    run = RunDirectory.create(given.apart(out), configs, JOINT, overwrite)
    for name in ("data", "weights/trunk", *(["refit"] if config.train.refit_trunks else [])):
        shutil.copytree(given.path / name, run.path / name)
    for name in ("text.npz", "statistics.npz", "exposure.json"):
        shutil.copy(given.path / name, run.path / name)
    corpus = load_corpus(run)
    exposure = tuple(run.read_json("exposure")["exposure"])
    step = StepConfig(system=config.system, train=config.train)
    trainer = Trainer(corpus, step, config.packing, exposure, run, watch)
    started = time.monotonic()
    weights = trainer.fit_deciders(practice_steps)
    if config.train.refit_trunks:
        weights = trainer.weights_with(_refit(corpus, step, config.packing, run, watch, None))
    _conclude(run, trainer, corpus, weights, time.monotonic() - started, watch, tell)
    return run


def _conclude(
    run: RunDirectory,
    trainer: Trainer,
    corpus: Corpus,
    weights: Any,
    seconds: float,
    watch: Callable[[Progress], None],
    tell: Callable[[str], None],
) -> None:
    """Save what a finished run has, and let its policy finish before the agents that it has."""
    save_weights(run, weights)
    if trainer.world is not None:
        run.write_json("planner", {"scales": {name: float(value) for name, value in vars(trainer.world.scales).items()}})
        train = trainer.config.train
        if train.policy_steps:
            started = time.monotonic()

            def report(stage: str, done: int, total: int) -> None:
                watch(Progress(phase=_PHASES[stage], step=done, num_steps=total))

            finish_policy(run, train, trainer.num_steps + train.final_steps, report, tell)
            seconds += time.monotonic() - started
        _finish(run, tell)
    run.write_json("provenance", provenance(dataset_fingerprint=corpus.interactions.fingerprint))
    run.write_json("training", {"seconds": seconds, "best_step": trainer.position.best_step})


def _reopened(out: Path) -> RunDirectory:
    if not (out / "config.json").exists():
        raise UserError(f"{out} holds no run to resume; start one without --resume")
    run = RunDirectory.open(out)
    check_path(run.path)
    if not run.data_folder.is_dir():
        raise UserError(f"{out} was stopped before it had its data; start again without --resume, with --overwrite")
    return run


def _start(source: str, config: RunConfig, out: Path, overwrite: bool, tell: Callable[[str], None]) -> None:
    """A new run that has its data, prepared beside it first."""
    out = out.resolve()
    RunDirectory.check_destination(out, overwrite)
    if config.system.planner is not None:
        check_is_trained(config.system.planner.load())
    vectors = _text_vectors(config)
    staged = out.with_name(f".{out.name}.data-{os.getpid()}")
    try:
        report = prepare(source, staged, k_core=config.k_core)
        *read, wrote = replace(report, out=str(out / "data")).lines()
        for line in read:
            tell(line)
        interactions, corpus = load_prepared(staged), None
        if config.kind == JOINT:
            check_size(interactions.num_users, interactions.num_items)
            _check_withheld(interactions, config.train)
        if vectors is not None:
            corpus = corpus_with_text(interactions, vectors.rows(interactions))
        configs = {"run": config, "system": config.system, "source": source, "text": _text_origin(config, vectors)}
        run = RunDirectory.create(out, configs, config.kind, overwrite)
        if corpus is not None:
            save_corpus(run, corpus, corpus.statistics())  # before the data, without which a run is not resumed
        staged.rename(run.data_folder)
        tell(wrote)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _check_withheld(interactions: Interactions, train: TrainConfig) -> None:
    """Raise UserError where fusion head and planner would have no event to learn on."""
    if not len(withheld_events(interactions, train.withheld_share, train.withheld_events, train.seed)):
        raise UserError(
            f"{interactions.name} has no event that can be withheld from the agents for fusion head and planner to learn on: expected "
            f"users with {MIN_EVENTS + MIN_EVENTS_KEPT} events or more among {train.withheld_share:.0%} of its {interactions.num_users:,} "
            "users. Take longer histories or more users, or train the baseline alone with --preset sasrec"
        )


def _text_vectors(config: RunConfig) -> TextVectors | None:
    if config.text_file is None:
        return None
    if not config.text_dimensions:
        raise UserError(f"this preset trains on ids alone and would not read {config.text_file}: leave the text file out")
    return load_text_vectors(Path(config.text_file).expanduser())


def _text_origin(config: RunConfig, vectors: TextVectors | None) -> dict[str, str]:
    """What made the text vectors of a run."""
    if vectors is not None:
        return {"provider": vectors.provider, "model_fingerprint": vectors.model_fingerprint}
    return {"provider": TfidfSvd(dimensions=config.text_dimensions).name if config.text_dimensions else "none"}


def _corpus(config: RunConfig, run: RunDirectory) -> Corpus:
    if run.has("statistics.npz"):
        return load_corpus(run)
    interactions = load_prepared(run.data_folder)
    if config.text_dimensions:
        corpus = build_corpus(interactions, TfidfSvd(dimensions=config.text_dimensions))
    else:
        text = np.zeros((interactions.num_items + 1, 1), np.float32)
        corpus = Corpus(interactions=interactions, text=text, ids_only=config.kind == SASREC)
    save_corpus(run, corpus, corpus.statistics())
    return corpus


def _measure_exposure(corpus: Corpus, config: RunConfig, run: RunDirectory) -> None:
    if not run.has("exposure.json"):
        run.write_json("exposure", measure_exposure(corpus, config.system))


def _exposure(run: RunDirectory, tell: Callable[[str], None]) -> tuple[float, ...]:
    measured = run.read_json("exposure")
    shares = ", ".join(
        f"{level.name.lower()} {value:.3f}" for level, value in zip(EgressLevel, measured["exposure"], strict=True)
    )
    tell(f"exposure by level (history-recovery attack): {shares}")
    return tuple(measured["exposure"])


def _finish(run: RunDirectory, tell: Callable[[str], None]) -> None:
    """Index and measured times of the trained system."""
    trained = load_trained(run.path)  # by all processes together, as all that Orbax does
    if not is_first():
        return
    choice = choose_index(trained.corpus.interactions.num_items)
    tell(f"index: {choice.reason}")
    index = build_index(np.asarray(trained.catalogue.vectors), choice)
    index.save(run.index_folder)
    times = measure_times(trained.system, trained.catalogue, trained.corpus, trained.config, index)
    fingerprint = trained.corpus.interactions.fingerprint
    save_measured_times(run, times, of="bare functions", rounds=ROUNDS, dataset_fingerprint=fingerprint)
