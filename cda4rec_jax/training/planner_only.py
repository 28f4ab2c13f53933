"""Training a planner alone on a finished run, in seconds.

Trunks and fusion head are frozen, so what every plan would answer to a user is a constant for each draw of the cache. It is computed once
(``planner_examples``); then any number of planners train on these arrays (``train_planner``), in contexts drawn anew at every step.

The examples are validation events. Withheld training events would not do for a run whose trunks were trained again on all training
events (``refit_trunks``): those trunks have seen them, and their scores are better there than they will be. A seeded share of the users
does not train but selects among the weights on the way; the test split is never touched.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Bool, Float, Int, PRNGKeyArray

from cda4rec_jax.array_typing import Array
from cda4rec_jax.data.splits import Split
from cda4rec_jax.errors import UserError
from cda4rec_jax.links import LinkConfig
from cda4rec_jax.messages import Context
from cda4rec_jax.metrics import Interval, paired_interval
from cda4rec_jax.pipeline.decisions import PlanningWorld, Requests, redraw_requests
from cda4rec_jax.pipeline.planners import PlugIn, mean_quality, possible_plans
from cda4rec_jax.pipeline.population import CONTEXTS_PER_EVENT, Population
from cda4rec_jax.planner import (
    STANDARD,
    ContextConfig,
    FixedPlan,
    LearnedPlanner,
    Objective,
    PlanSpace,
    Policy,
    PolicyConfig,
    check_scores,
    choose,
    realised_utility,
)
from cda4rec_jax.runs.artifacts import TrainedSystem
from cda4rec_jax.training.losses import decision_loss

MIN_USERS = 20  # fewer say nothing about a planner
SELECTION_DRAWS = 2  # contexts of each selecting user and cache
STEPS_AT_ONCE = 25  # in one compiled call
REPORTS = 20  # looks at the selecting users, evenly over training
DRAW_STRIDE = 65_537  # keeps the contexts of training apart from those of selection and evaluation

Report = Callable[[str, int, int], None]
OUTCOMES, TRAINING = "outcomes of all plans", "training the planner"  # the stages that it hears of


@dataclass(frozen=True, kw_only=True)
class PlannerTraining:
    """How a planner is trained alone.

    Raises:
        UserError: a number that is too small.
    """

    objective: Objective = Objective.EXACT
    steps: int = 400
    users_per_step: int = 256
    context_draws: int = 1  # contexts of each user in a step
    learning_rate: float = 2e-3  # Adam, falling to 0 along a cosine
    clip_norm: float = 5.0
    entropy: float = 0.005  # beta, in units of dQ
    quality_regression: float = 0.05  # weight of the squared error of q_theta beside the objectives that choose
    average_decay: float = 0.99  # of the moving average of the weights, which is what is selected and kept
    seed: int = 0
    contexts: ContextConfig = ContextConfig()
    links: LinkConfig = LinkConfig()
    policy: PolicyConfig = PolicyConfig()  # of a new policy
    users: int | None = 8192  # at most so many
    cache_draws: int = 4  # draws of the cached embedding of each user; outcomes are computed for each
    selection_share: float = 0.3  # of the users, who do not train

    def __post_init__(self):
        least = {"steps": 1, "users_per_step": 1, "context_draws": 1, "cache_draws": 1, "seed": 0}
        bad = [f"{name}={getattr(self, name)}, at least {low}" for name, low in least.items() if getattr(self, name) < low]
        if not self.learning_rate > 0:
            bad.append(f"learning_rate={self.learning_rate}, above 0")
        if bad:
            raise UserError(f"training a planner was told {'; '.join(bad)} expected")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PlannerExamples:
    """What every plan would have answered to ``n`` users under each of ``d`` cached embeddings. NumPy arrays.

    Of ``context`` only the facts of the user, the cache and the consent count; the rest is drawn anew in training, where links and
    tiers of a ``ContextConfig`` may be others than those of the examples.
    """

    users: Int[np.ndarray, "n"]
    event_ids: Int[np.ndarray, "n"]
    selects: Bool[np.ndarray, "n"]
    context: Context  # leaves [d, n]
    quality: Float[np.ndarray, "d n p"]
    space: PlanSpace = field(default=STANDARD, metadata={"static": True})

    def of(self, selecting: bool) -> "PlannerExamples":
        """The users who select, or those who train."""
        rows = self.selects == selecting
        return PlannerExamples(
            users=self.users[rows],
            event_ids=self.event_ids[rows],
            selects=self.selects[rows],
            context=jax.tree.map(lambda leaf: leaf[:, rows], self.context),
            quality=self.quality[:, rows],
            space=self.space,
        )

    def mean_quality(self) -> Float[np.ndarray, "p"]:
        """Mean quality of each plan over the requests that it could serve: what plug-in knows."""
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), self.context)
        return mean_quality(self.quality.reshape(-1, self.quality.shape[-1]), possible_plans(flat, self.space))


@dataclass(frozen=True, kw_only=True)
class TrainedPlanner:
    """A planner with how it came about. Utilities are means over the selecting users, who chose among its weights on the way."""

    policy: Any
    curve: tuple[dict[str, float], ...]  # step, utility of the selecting users, and the means of the loss and its terms before
    best_step: int
    utility: dict[str, float]  # of the policy, plug-in and the best fixed plan
    best_fixed: str  # chosen on the same requests, in its favour
    minus_plug_in: Interval
    minus_best_fixed: Interval
    seconds: float

    def lines(self) -> list[str]:
        """What was found, in words."""
        names = ", ".join(f"{name} {value:.4f}" for name, value in self.utility.items())
        compared = (("plug-in", self.minus_plug_in), (f"best fixed ({self.best_fixed})", self.minus_best_fixed))
        return [
            f"utility on validation events of {self.minus_plug_in.num_users:,} users who did not train: {names}",
            *(f"policy - {name}: {gain.mean_difference:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]" for name, gain in compared),
            f"best weights at step {self.best_step:,}; {self.seconds:.0f} s of training",
        ]


def planner_examples(
    trained: TrainedSystem, world: PlanningWorld, config: PlannerTraining, progress: Report = lambda stage, done, total: None
) -> PlannerExamples:
    """Outcomes of all plans before the validation events of at most ``config.users`` users, for ``config.cache_draws`` caches.

    They do not depend on prices and costs, so that one set of examples serves any ``world``, objective, link and tier. Consent and
    cache are drawn by ``config.contexts``.

    Raises:
        UserError: too few users.
    """
    corpus = trained.corpus
    random = np.random.default_rng([config.seed, 41])
    users = np.sort(random.permutation(corpus.interactions.num_users)[: config.users])
    num_selecting = _num_selecting(len(users), config)
    if not enough_users(len(users), config):
        raise UserError(
            f"{len(users) - num_selecting} users to train on and {num_selecting} to select on: expected at least {MIN_USERS} each. "
            "Take more users, another share that selects, or a larger dataset."
        )
    selects = np.zeros(len(users), bool)
    selects[random.permutation(len(users))[:num_selecting]] = True
    positions = corpus.target_positions(Split.VALIDATION)[users]
    population = Population(trained.graph, trained.config, trained.tables, corpus, contexts=config.contexts, links=config.links)
    weights, found = jax.device_put(trained.weights), []
    for cache in range(config.cache_draws):

        def tell(done: int, total: int, cache: int = cache) -> None:
            progress(OUTCOMES, cache * total + done, config.cache_draws * total)

        first = cache * CONTEXTS_PER_EVENT
        found.append(population.records(weights, world, users, positions, draws=1, first_draw=first, progress=tell))
    return PlannerExamples(
        users=users,
        event_ids=corpus.histories(users, positions, stored_events=1).event_ids,
        selects=selects,
        context=jax.tree.map(lambda *leaves: np.concatenate(leaves), *(records.requests.context for records in found)),
        quality=np.stack([records.quality for records in found]),
        space=world.space,
    )


def enough_users(num_users: int, config: PlannerTraining) -> bool:
    """Whether of so many users, or of the ``config.users`` that are taken, enough train and enough select."""
    num_users = num_users if config.users is None else min(num_users, config.users)
    num_selecting = _num_selecting(num_users, config)
    return min(num_selecting, num_users - num_selecting) >= MIN_USERS


def _num_selecting(num_users: int, config: PlannerTraining) -> int:
    return round(config.selection_share * num_users)


def new_planner(
    examples: PlannerExamples, world: PlanningWorld, config: PlannerTraining, kind: type[LearnedPlanner] = Policy
) -> LearnedPlanner:
    """A planner that has learned nothing yet, and has heard dQ and the mean quality of each plan over the users who train.

    ``Policy`` is plug-in then.
    """
    planner = kind(config.policy, space=world.space, rngs=nnx.Rngs(config.seed))  # pyright: ignore[reportCallIssue]
    planner.standardise(world.scales.quality_gap, jnp.asarray(examples.of(selecting=False).mean_quality(), jnp.float32))
    return planner


def train_planner(
    examples: PlannerExamples,
    world: PlanningWorld,
    config: PlannerTraining,
    policy: LearnedPlanner | None = None,
    progress: Report = lambda stage, done, total: None,
) -> TrainedPlanner:
    """A planner trained on ``examples``; what it starts from stays as it is.

    Each step draws ``users_per_step`` users, a cache and ``context_draws`` contexts each. ``REPORTS`` times on the way the mean realised
    utility of the averaged weights is taken over the users who select, in fixed contexts; the best weights are returned, those of the
    start among them.

    Args:
        examples: of ``planner_examples``.
        world: costs, prices and exposure.
        config: objective and optimisation.
        policy: what to start from; None is ``new_planner``.
        progress: hears (stage, done, total).

    Raises:
        UserError: a regression on the quality of a planner that predicts none; a loss or scores that are no numbers.
    """
    started = time.monotonic()
    _check(config, policy)
    start = new_planner(examples, world, config) if policy is None else policy
    graph, params, rest = nnx.split(start, nnx.Param, ...)
    training, selecting = examples.of(selecting=False), examples.of(selecting=True)
    bank = _bank(selecting, world, config)
    state = (params, params, _optimizer(config).init(params))
    # The seed is in the key and the order, so that planners of several seeds share one program.
    advance = partial(_advance, graph=graph, config=replace(config, seed=0))
    key, order = jax.random.key(config.seed), _order(len(training.users), config)
    arrays = jax.device_put((training.event_ids, training.context, training.quality, world, rest))

    def utility_of(params: Any) -> float:
        logits = _logits(graph, params, rest, bank.requests)
        check_scores(start, logits, bank.requests.mask)
        return float(bank.utility(logits).mean())

    best, best_step, curve = params, 0, [{"step": 0.0, "utility": utility_of(params)}]
    every = max(1, config.steps // REPORTS)
    done, terms = 0, []
    while done < config.steps:
        size = min(STEPS_AT_ONCE, config.steps - done, every - done % every)
        state, values = advance(state, key, order[done : done + size], jnp.arange(done, done + size), *arrays)
        terms.append(values)
        done += size
        progress(TRAINING, done, config.steps)
        if done % every and done < config.steps:
            continue
        utility = utility_of(state[1])
        means = jax.tree.map(lambda *leaves: float(np.mean(np.concatenate(leaves))), *terms)
        if not np.isfinite(means["loss"]):
            raise UserError(
                f"the loss is {means['loss']} at step {done}: train with a lower learning rate than {config.learning_rate}"
            )
        if utility > max(row["utility"] for row in curve):
            best, best_step = state[1], done
        curve.append({**means, "step": float(done), "utility": utility})
        terms = []
    found = nnx.merge(graph, best, rest)
    own = bank.utility(_logits(graph, best, rest, bank.requests))
    return _concluded(found, own, curve, best_step, bank, training.mean_quality(), time.monotonic() - started)


def _check(config: PlannerTraining, policy: LearnedPlanner | None) -> None:
    silent = policy is not None and type(policy).quality is LearnedPlanner.quality
    if silent and config.objective is Objective.REGRESSION:
        raise UserError(
            f"{type(policy).__name__} tells no quality (it has no quality(features) of its own), so there is nothing to regress on: "
            "train it with objective exact or gumbel"
        )


def _optimizer(config: PlannerTraining) -> optax.GradientTransformation:
    schedule = optax.cosine_decay_schedule(config.learning_rate, config.steps)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optax.adam(schedule, b2=0.98))


def _order(num_users: int, config: PlannerTraining) -> Int[np.ndarray, "s u"]:
    """Users of every step: all of them once before any comes again."""
    random = np.random.default_rng([config.seed, 43])
    needed = config.steps * config.users_per_step
    turns = [random.permutation(num_users) for _ in range(-(-needed // num_users))]
    return np.concatenate(turns)[:needed].reshape(config.steps, config.users_per_step).astype(np.int32)


@partial(jax.jit, static_argnames=("graph", "config"))
def _advance(
    state: Any,
    key: PRNGKeyArray,
    order: Int[Array, "s u"],
    numbers: Int[Array, "s"],
    event_ids: Int[Array, "n"],
    context: Context,
    quality: Float[Array, "d n p"],
    world: PlanningWorld,
    rest: Any,
    *,
    graph: nnx.GraphDef,
    config: PlannerTraining,
) -> tuple[Any, dict[str, Array]]:
    """Some steps in one program; terms of the loss [s]."""
    optimizer = _optimizer(config)

    def step(state: Any, now: tuple[Array, Array]) -> tuple[Any, dict[str, Array]]:
        params, average, optimizer_state = state
        users, number = now
        of_caches, of_choices = jax.random.split(jax.random.fold_in(key, number))
        caches = jax.random.randint(of_caches, users.shape, 0, quality.shape[0])
        drawn, answers = jax.tree.map(lambda leaf: leaf[caches, users], (context, quality))

        def loss(params: Any) -> tuple[Array, dict[str, Array]]:
            planner = nnx.merge(graph, params, rest)

            def one_draw(draw: Array) -> tuple[Array, dict[str, Array]]:
                asked = redraw_requests(world, drawn, event_ids[users], draw, contexts=config.contexts, links=config.links)
                total, terms, _ = decision_loss(
                    planner,
                    asked,
                    answers,
                    world.scales.quality_gap,
                    config.objective,
                    quality_regression=config.quality_regression,
                    entropy_weight=config.entropy,
                    key=jax.random.fold_in(of_choices, draw),
                )
                return total, terms

            draws = DRAW_STRIDE + number * config.context_draws + jnp.arange(config.context_draws)
            total, terms = jax.tree.map(jnp.mean, jax.vmap(one_draw)(draws))
            return total, terms

        (total, terms), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
        params = optax.apply_updates(params, updates)
        # Early steps average over what there is, so that the start does not weigh on the average for long.
        decay = jnp.minimum(config.average_decay, (1.0 + number) / (10.0 + number))
        average = jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new, average, params)
        return (params, average, optimizer_state), {**terms, "loss": total}

    return jax.lax.scan(step, state, (order, numbers))


_choices = jax.jit(choose, static_argnames="space")


@dataclass(frozen=True, kw_only=True)
class _Bank:
    """Requests of ``n`` selecting users in ``c`` fixed contexts each, in one row of ``c n``, and what every plan would earn in them."""

    num_users: int
    requests: Requests
    gained: Float[np.ndarray, "b p"]

    def utility(self, logits: Float[Array, "b p"]) -> Float[np.ndarray, "n c"]:
        """What the plans earn that these logits choose."""
        plans = np.asarray(_choices(logits, self.requests.mask, self.requests.predicted.space))
        found = np.take_along_axis(self.gained, plans[:, None], axis=1)
        return np.asarray(found, np.float64).reshape(-1, self.num_users).T


def _bank(examples: PlannerExamples, world: PlanningWorld, config: PlannerTraining) -> _Bank:
    def one(cache: int, draw: int) -> tuple[Requests, Float[Array, "n p"]]:
        context = jax.tree.map(lambda leaf: leaf[cache], examples.context)
        given = (world, context, examples.event_ids, examples.quality[cache], cache * CONTEXTS_PER_EVENT + draw)
        return _one_draw(*given, contexts=config.contexts, links=config.links)

    found = [one(cache, draw) for cache in range(len(examples.quality)) for draw in range(SELECTION_DRAWS)]
    requests, gained = jax.tree.map(lambda *leaves: np.concatenate(leaves), *found)
    return _Bank(num_users=len(examples.users), requests=requests, gained=gained)


@partial(jax.jit, static_argnames=("contexts", "links"))
def _one_draw(
    world: PlanningWorld,
    context: Context,
    event_ids: Int[Array, "n"],
    quality: Float[Array, "n p"],
    draw: Array | int,
    *,
    contexts: ContextConfig,
    links: LinkConfig,
) -> tuple[Requests, Float[Array, "n p"]]:
    """The requests of one draw, and what every plan would earn in them."""
    asked = redraw_requests(world, context, event_ids, draw, contexts=contexts, links=links)
    return asked, realised_utility(quality, asked.realised, asked.context, failed=asked.failed, mask=asked.mask)


@partial(jax.jit, static_argnames="graph")
def _logits(graph: nnx.GraphDef, params: Any, rest: Any, requests: Requests) -> Float[Array, "b p"]:
    return nnx.merge(graph, params, rest).logits(requests.context, requests.predicted, requests.mask)


def _concluded(
    policy: Any,
    own: Float[np.ndarray, "n c"],
    curve: list[dict[str, float]],
    best_step: int,
    bank: _Bank,
    means: Float[np.ndarray, "p"],
    seconds: float,
) -> TrainedPlanner:
    """Compare what the policy earned, ``own``, with plug-in and with the best fixed plan on the requests of the bank."""

    def earned(planner: Any) -> Float[np.ndarray, "n c"]:
        asked = bank.requests
        return bank.utility(planner.logits(asked.context, asked.predicted, asked.mask))

    plug_in = earned(PlugIn(quality=jnp.asarray(means, jnp.float32)[None]))
    fixed = [earned(FixedPlan(index)) for index in range(len(means))]
    best = int(np.argmax([values.mean() for values in fixed]))
    return TrainedPlanner(
        policy=policy,
        curve=tuple(curve),
        best_step=best_step,
        utility={"policy": float(own.mean()), "plug-in": float(plug_in.mean()), "best fixed": float(fixed[best].mean())},
        best_fixed=bank.requests.predicted.space.names[best],
        minus_plug_in=paired_interval(own, plug_in),
        minus_best_fixed=paired_interval(own, fixed[best]),
        seconds=seconds,
    )
