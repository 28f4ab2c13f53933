"""Training from data to saved weights: joint steps with early stopping, then the planner-only steps, with exact resume."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from cda4rec_jax.data.packing import PackingConfig
from cda4rec_jax.data.splits import Split
from cda4rec_jax.errors import UserError
from cda4rec_jax.metrics import hit_rate, ndcg
from cda4rec_jax.pipeline.corpus import Corpus
from cda4rec_jax.pipeline.decisions import PlanningWorld, payload_sizes
from cda4rec_jax.pipeline.planners import mean_quality, possible_plans
from cda4rec_jax.pipeline.population import Population
from cda4rec_jax.pipeline.system import System
from cda4rec_jax.planner import WeightScales, Workload, check_scores, deployment_profile
from cda4rec_jax.runs import RunDirectory
from cda4rec_jax.runs.processes import any_process, from_first
from cda4rec_jax.training.batches import TrainingSource, batch_iterator, withheld_events
from cda4rec_jax.training.mesh import Layout, rows_multiple
from cda4rec_jax.training.observations import KeptObservations
from cda4rec_jax.training.sampling import ItemShares
from cda4rec_jax.training.step import StepConfig, TrainState, jitted_steps, optimizers, split_system

LOG_EVERY_STEPS = 10
SCALE_EVENTS = 1024  # withheld events from which weight scales and mean plan qualities are measured


class Interrupted(Exception):
    """Training was stopped by the user; everything is saved."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One report of the loop to whoever watches."""

    phase: str  # "joint", "observing", "practice" (deciders alone), "planner", "refit", "outcomes" or "policy" (alone)
    step: int
    num_steps: int
    values: dict[str, float] = field(default_factory=dict)
    validation: dict[str, float] | None = None


@dataclass(kw_only=True)
class _Position:
    """What a checkpoint stores beside arrays."""

    phase: str = "joint"
    iterator: Any = None
    best_ndcg: float = -1.0
    best_step: int = -1
    worse: int = 0
    elapsed_s: float = 0.0
    scales: dict[str, float] | None = None
    moments: dict[str, list[float]] | None = None  # of the fusion head's features


class Trainer:
    """Trains one system on one corpus inside one run directory, on one device or over a mesh.

    With ``withhold=False`` it trains the trunks alone, on all training events.

    In a job of several processes each makes the whole batches itself, which are a pure function of (seed, step), and evaluates on its
    own first device; the first process's numbers decide.
    """

    def __init__(
        self,
        corpus: Corpus,
        config: StepConfig,
        packing: PackingConfig,
        exposure: tuple[float, ...] | None,
        run: RunDirectory,
        watch: Callable[[Progress], None] = lambda progress: None,
        mesh: Mesh | None = None,
        *,
        withhold: bool = True,
    ):
        self.config, self.run, self.watch = config, run, watch
        self._trunk_phase = "joint" if withhold else "refit"
        train, joint = config.train, config.system.device is not None
        self.layout = Layout(mesh, num_rows=corpus.text.shape[0])
        share = train.withheld_share if withhold else 0.0
        withheld = withheld_events(corpus.interactions, share, train.withheld_events, train.seed) if joint else None
        self.source = TrainingSource(
            corpus,
            packing,
            rows_per_batch=train.rows_per_batch,
            epochs=train.epochs,
            seed=train.seed,
            withheld=withheld,
            withheld_per_step=train.withheld_per_step,
            decider_interval=train.decider_interval,
            stored_events=config.system.stored_events,
            rows_multiple=rows_multiple(mesh, train.rows_per_batch, train.accumulation_steps),
        )
        self._withheld = withheld
        # While the deciders learn, tables must not know the withheld events; they would give the targets away.
        self.tables = corpus.tables(
            corpus.statistics(None if withheld is None else withheld.counts), config.system.resident_items
        )
        self._shares = None if train.loss == "full" else ItemShares.of(np.asarray(self.tables.train_counts))
        self.num_steps = len(self.source)
        system = System(config.system, jnp.asarray(corpus.text), corpus.prefix_size, rngs=nnx.Rngs(train.seed))
        self.graph, trunk, deciders, self.frozen = split_system(system)
        self.graph_of_all = nnx.split(system)[0]
        self.population = Population(
            self.graph_of_all, config.system, self.tables, corpus, contexts=config.contexts, links=config.links
        )
        users = np.random.default_rng(train.seed).permutation(corpus.interactions.num_users)
        self._validation_users = np.sort(users[: train.validation_users])
        self._positions = corpus.target_positions(Split.VALIDATION)
        start = self._start(trunk, deciders)
        self._shapes = jax.eval_shape(lambda: start)  # without the padding of a mesh
        self.state = self.layout.place(start)
        self._joint, self._decide = jitted_steps(self.graph, config, self.num_steps, self.layout, self.state)
        self._world = None if exposure is None else self._planning_world(exposure)
        self._place_constants()
        self.position = _Position()
        self._stop = threading.Event()

    def _start(self, trunk: Any, deciders: Any) -> TrainState:
        trunk_optimizer, decider_optimizer = optimizers(self.config.train, self.num_steps)
        key = jax.random.key(self.config.train.seed, impl="unsafe_rbg")

        @jax.jit
        def beside(trunk: Any, deciders: Any) -> dict[str, Any]:
            return {
                "average": jax.tree.map(jnp.copy, trunk),
                "trunk_optimizer": trunk_optimizer.init(trunk),
                "decider_optimizer": decider_optimizer.init(deciders),
            }

        return TrainState(
            step=jnp.zeros((), jnp.int32),
            key_data=jax.random.key_data(key),
            trunk=trunk,
            deciders=deciders,
            **beside(trunk, deciders),
        )

    def _planning_world(self, exposure: tuple[float, ...]) -> PlanningWorld:
        """The world before anything is measured of quality: the deployment that is modelled, and provisional scales."""
        return PlanningWorld(
            profile=deployment_profile(Workload(resident_items=len(self.tables.resident_items))),
            exposure_by_level=jnp.asarray(exposure, jnp.float32),
            sizes=payload_sizes(self.population.catalogue(self.weights()), self.config.system.history_length),
            scales=WeightScales.of(quality_gap=0.05, latency_gap_ms=100.0, energy_gap_mj=100.0, exposure_gap=0.5),
            space=self.config.system.space,
        )

    def weights(self) -> Any:
        """All weights (averaged trunks, deciders, frozen) as one state that ``graph_of_all`` merges, on one device."""
        average, deciders = self.layout.local((self.state.average, self.state.deciders))
        return nnx.state(nnx.merge(self.graph, average, deciders, self.frozen))

    def weights_with(self, trunks: "Trainer") -> Any:
        """``weights`` with the trunks of another trainer of this system."""
        average, deciders = trunks.layout.local(trunks.state.average), self.layout.local(self.state.deciders)
        return nnx.state(nnx.merge(self.graph, average, deciders, self.frozen))

    def _place_constants(self) -> None:
        """Bring what the steps read and never change to where they want it."""
        self._constants = self.layout.place((self.frozen, self.tables, self._world))
        self._placed_shares = self.layout.place(self._shares)

    def fit(self, *, resume: bool = False) -> Any:
        """Train to the end and return the weights.

        Raises:
            Interrupted: after Ctrl-C; the run continues with ``resume``.
        """
        if resume:
            self._restore()
        with self._catching_interrupts():
            if self.position.phase == "joint":
                self._joint_phase()
            if self._world is not None:
                self._apply_scales()
                if int(self.state.step) < self.config.train.final_steps:
                    self._planner_phase()
        return self.weights()

    def fit_deciders(self, practice_steps: int) -> Any:
        """Deciders from their start on the finished trunks of ``run``; return the weights. It starts anew where it is stopped.

        They get the requests and contexts of as many steps as they would have practised beside the trunks, and then the planner-only
        phase.
        """
        self._finish_joint()
        self._apply_scales()
        train, kept = self.config.train, self._keep_observations()
        steps = range(0, practice_steps, train.decider_interval)
        for done, step in enumerate(steps, start=1):
            observation = self.layout.place_batch(kept.batch(done - 1, train.withheld_per_step))
            when = self.layout.place((jnp.asarray(step, jnp.int32), jnp.asarray(step / practice_steps, jnp.float32)))
            frozen, _, world = self._constants
            self.state, values = self._decide(self.state, observation, frozen, world, *when)
            self._log("practice", done, len(steps), values)
        self.state = TrainState(**{**vars(self.state), "step": jnp.zeros((), jnp.int32)})
        self._planner_phase(kept)
        return self.weights()

    def _joint_phase(self) -> None:
        train = self.config.train
        iterator = batch_iterator(self.source)
        if self.position.iterator is not None:
            iterator.set_state(self.position.iterator)
        every = max(1, round(self.source.steps_per_epoch / train.evaluations_per_epoch))
        started, saved = time.monotonic() - self.position.elapsed_s, time.monotonic()
        latest: dict[str, jax.Array] = {}  # deciders report on their own steps only
        for step in range(int(self.state.step), self.num_steps):
            batch, (frozen, tables, world) = next(iterator), self._constants
            given = (frozen, None, None) if batch.withheld is None else (frozen, tables, world)
            self.state, values = self._joint(self.state, self.layout.place_batch(batch), *given, self._placed_shares)
            latest |= values
            self._log(self._trunk_phase, step + 1, self.num_steps, latest)
            self.position.iterator = iterator.get_state()
            self.position.elapsed_s = time.monotonic() - started
            late, stop, due = self._agreed(
                step + 1,
                bool(train.max_seconds) and self.position.elapsed_s > train.max_seconds,
                self._stop.is_set(),
                time.monotonic() - saved > 60 * train.checkpoint_minutes,
            )
            if (step + 1) % every == 0 or step + 1 == self.num_steps or late:
                self._evaluate(step + 1)
                if self.position.worse >= train.patience or late:
                    break
            if stop or due:
                self._save(stop)
                saved = time.monotonic()
        self._finish_joint()

    def _agreed(self, step: int, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether any process has set it; asked only where the loop waits for its devices anyway, to log."""
        if jax.process_count() > 1 and step % LOG_EVERY_STEPS:
            return (False,) * len(flags)
        return any_process(*flags)

    def _evaluate(self, step: int) -> None:
        """Validation of the cloud agent on its own; keeps the best weights and counts the evaluations that were worse."""
        ranks = self.population.full_ranks(self.weights(), self._validation_users, self._positions[self._validation_users])
        quality, hits = from_first([float(np.mean(ndcg(ranks, 10))), float(np.mean(hit_rate(ranks, 10)))])
        validation = {"ndcg@10": quality, "hit_rate@10": hits}
        self.run.append_metric({"step": step, "phase": "validation", **validation, "elapsed_s": self.position.elapsed_s})
        self.watch(Progress(phase=self._trunk_phase, step=step, num_steps=self.num_steps, validation=validation))
        if quality > self.position.best_ndcg:
            self.position.best_ndcg, self.position.best_step, self.position.worse = quality, step, 0
            self.run.save_weights("trunk", self.layout.local(self.state.average))
        else:
            self.position.worse += 1
        start = self.config.train.planner_start_share * self.num_steps
        if self._world is not None and self.position.scales is None and step >= start:
            self._measure_scales()

    def _finish_joint(self) -> None:
        """Go on with the best trunks; deciders adapt to them in the planner-only phase."""
        best = self.run.load_weights("trunk", self._shapes.average if self.layout.mesh else self.state.average)
        placed = self.layout.place({"average": best, "step": jnp.zeros((), jnp.int32)})
        self.state = TrainState(**{**vars(self.state), **placed})
        if self._world is not None:
            self._measure_scales()
        self.position.phase = "planner"
        self._save(*any_process(self._stop.is_set()))

    def _keep_observations(self) -> KeptObservations:
        """What the deciders see of withheld positions through the final trunks."""
        assert self._world is not None and self._withheld is not None
        train = self.config.train
        drawn = np.random.default_rng([train.seed, 37]).permutation(len(self._withheld))[: train.final_events]
        kept = np.sort(drawn)

        def tell(done: int, total: int) -> None:
            self.watch(Progress(phase="observing", step=done, num_steps=total))

        return KeptObservations(
            self.population,
            self.weights(),
            self._withheld.users[kept],
            self._withheld.positions[kept],
            self.tables,
            self._world,
            self.num_steps,
            seed=train.seed,
            progress=tell,
            **self.config.of_requests,
        )

    def _planner_phase(self, kept: KeptObservations | None = None) -> None:
        train, saved = self.config.train, time.monotonic()
        started = saved - self.position.elapsed_s
        kept = self._keep_observations() if kept is None else kept
        for step in range(int(self.state.step), train.final_steps):
            observation = self.layout.place_batch(kept.batch(step, train.final_events_per_step))
            draw = self.layout.place(jnp.asarray(self.num_steps + step, jnp.int32))
            frozen, _, world = self._constants
            self.state, values = self._decide(self.state, observation, frozen, world, draw)
            self._log("planner", step + 1, train.final_steps, values)
            self.position.elapsed_s = time.monotonic() - started
            due = time.monotonic() - saved > 60 * train.checkpoint_minutes
            stop, due = self._agreed(step + 1, self._stop.is_set(), due)
            if stop or due or step + 1 == train.final_steps:
                self._save(stop)
                saved = time.monotonic()

    def _measure_scales(self) -> None:
        """Moments of the head's features, dQ, dC and the mean quality of each plan on withheld positions, which no trunk has seen."""
        assert self._world is not None and self._withheld is not None
        drawn = np.random.default_rng(self.config.train.seed).permutation(len(self._withheld))[:SCALE_EVENTS]
        asked = (self._world, self._withheld.users[drawn], self._withheld.positions[drawn])
        self._standardise(*self.population.feature_moments(self.weights(), *asked))
        records = self.population.records(self.weights(), *asked, draws=1)
        requests = jax.tree.map(lambda leaf: leaf[0], records.requests)
        possible = possible_plans(requests.context, self._world.space)
        scales = WeightScales.from_quality_and_costs(records.quality, possible, requests.predicted, requests.mask)
        means = mean_quality(records.quality, possible)
        measured = {name: float(value) for name, value in vars(scales).items()}
        measured |= {f"mean_quality/{index}": float(value) for index, value in enumerate(means)}
        self.position.scales = dict(zip(measured, from_first(list(measured.values())), strict=True))
        self._apply_scales()
        policy = nnx.merge(self.graph_of_all, self.weights()).policy
        assert policy is not None
        # In one program: as many as an untraced policy has operations would be compiled otherwise.
        scores = nnx.jit(type(policy).logits)(policy, requests.context, requests.predicted, requests.mask)
        check_scores(policy, scores, requests.mask)

    def _apply_scales(self) -> None:
        """Put measured scales into the planning world and the policy."""
        stored = self.position.scales
        if stored is None or self._world is None:
            return
        gaps = {name: value for name, value in stored.items() if not name.startswith("mean_quality/")}
        means = [stored[f"mean_quality/{index}"] for index in range(len(stored) - len(gaps))]
        self._world = PlanningWorld(**{**vars(self._world), "scales": WeightScales.of(**gaps)})
        with self._system() as system:
            assert system.policy is not None
            system.policy.standardise(jnp.asarray(gaps["quality_gap"], jnp.float32), jnp.asarray(means, jnp.float32))

    def _standardise(self, mean: np.ndarray, deviation: np.ndarray) -> None:
        """The head goes on with its features standardised by these moments."""
        with self._system() as system:
            assert system.device is not None
            head = system.device.head
            nnx.jit(type(head).standardise)(head, jnp.asarray(mean), jnp.asarray(deviation))
            self.position.moments = {"mean": head.mean[...].tolist(), "deviation": head.deviation[...].tolist()}

    def _restore_moments(self) -> None:
        if self.position.moments is None:
            return
        with self._system() as system:
            assert system.device is not None
            head = system.device.head
            head.mean[...] = jnp.asarray(self.position.moments["mean"], jnp.float32)
            head.deviation[...] = jnp.asarray(self.position.moments["deviation"], jnp.float32)

    @contextmanager
    def _system(self) -> Iterator[System]:
        """The system, to change what is measured of it: its frozen arrays, and deciders that have to follow them."""
        trunk, deciders = self.layout.local((self.state.trunk, self.state.deciders))
        system = nnx.merge(self.graph, trunk, deciders, self.frozen)
        yield system
        _, _, deciders, self.frozen = split_system(system)
        self.state = TrainState(**{**vars(self.state), "deciders": self.layout.place(deciders)})
        self._place_constants()

    @property
    def world(self) -> PlanningWorld | None:
        """The planning world under the scales that were measured last."""
        return self._world

    def _log(self, phase: str, step: int, num_steps: int, values: dict[str, jax.Array]) -> None:
        if step % LOG_EVERY_STEPS and step != num_steps:
            return
        numbers = {name: float(value) for name, value in values.items()}
        if not np.isfinite(numbers["loss"]):
            raise UserError(f"the loss is {numbers['loss']} at step {step}: train with a lower --learning-rate")
        offset = self.num_steps if phase == "planner" else 0
        self.run.append_metric({"step": offset + step, "phase": phase, **numbers})
        self.watch(Progress(phase=phase, step=step, num_steps=num_steps, values=numbers))

    def _save(self, stop: bool) -> None:
        offset = self.num_steps if self.position.phase == "planner" else 0
        position = {name: value for name, value in vars(self.position).items() if name != "iterator"}
        if self.position.iterator is not None:
            position["iterator"] = self.position.iterator
        self.run.save_checkpoint(offset + int(self.state.step), self.state, position, self._shapes)
        if stop:
            raise Interrupted

    def _restore(self) -> None:
        found = self.run.restore_latest(self.state, self._shapes)
        if found is None:
            self.run.truncate_metrics(0)
            return
        self.state = found.state
        self.position = _Position(**found.extras)
        self.run.truncate_metrics(found.step)
        self._apply_scales()
        self._restore_moments()

    @contextmanager
    def _catching_interrupts(self) -> Iterator[None]:
        """Ctrl-C finishes the step at hand and saves; a second one stops at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def request_stop(*_: Any) -> None:
            if self._stop.is_set():
                raise KeyboardInterrupt
            self._stop.set()

        before = signal.signal(signal.SIGINT, request_stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
