"""What do weeks of use do to a planner that nobody touches, and what does training it again every week bring?

    python experiments/long_run.py

Users of the synthetic world go on after the system was trained: interests drift, items retire, and new ones appear of which only the text
is known. Caches follow from the planner's choices. In ``--version-week`` the cloud gets a model that was trained on everything until then,
while devices keep what they have, cached embeddings of the old version included (``cda4rec_jax/evaluation/long_run.py`` says what happens
to those). A frozen policy is held against one that is trained again every week, alone, on the outcomes of that week's requests.

Trains two versions where ``--work`` does not have them. Writes ``long-run-synthetic.json``, ``.md``, ``.png``.
"""

import json
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from harness import (
    RESULTS,
    WORK,
    Arrays,
    error_bars,
    estimates,
    markdown_page,
    markdown_table,
    run_script,
    stored,
    train_resumed,
    with_interval,
    write_results,
)
from rich.console import Console

from cda4rec_jax.data import Interactions, write_prepared
from cda4rec_jax.data.synthetic import SyntheticConfig, synthetic_world
from cda4rec_jax.data.synthetic.catalogue import DAY_SECONDS, START_SECONDS
from cda4rec_jax.errors import UserError
from cda4rec_jax.evaluation.long_run import Deployment, Fleet, Shop, logged_outcomes, serve
from cda4rec_jax.pipeline.corpus import Corpus
from cda4rec_jax.planner import LearnedPlanner
from cda4rec_jax.presets import preset
from cda4rec_jax.runs import provenance
from cda4rec_jax.runs.artifacts import TrainedSystem, load_trained
from cda4rec_jax.training import PlannerExamples, PlannerTraining, train_planner

QUESTION = "What do weeks of drift, churn and a new cloud version do to a frozen planner, and what does weekly training bring?"
MIN_PAST = 5  # events before a request, and before training
FROZEN, REFRESHED = "frozen", "refreshed weekly"
ARMS = (FROZEN, REFRESHED)
QUANTITIES = ("hit_rate@10", "utility", "latency_ms", "calls", "repaired", "refused")
COLD = "hit_rate@10 of cold items"
SELECTING_SHARE = 0.3  # of a week's users, who do not train but select
CACHE_DRAWS = 2


@dataclass(frozen=True, kw_only=True)
class Options:
    """The world, and how long it goes on.

    Attributes:
        users, items: sizes of the world.
        first_week: of the year, in which requests start; the system is trained on what came before.
        weeks: that are simulated.
        version_week: of these, in which the cloud gets its new version.
        preset_name: of the system.
        refresh_steps: of training the policy after each week.
        seed: of the world and of training.
        work: where trained systems and answers are kept.
        out: folder of the results.
    """

    users: int = 2000
    items: int = 600
    first_week: int = 30
    weeks: int = 8
    version_week: int = 4
    preset_name: Annotated[str, tyro.conf.arg(name="preset")] = "synthetic"
    refresh_steps: int = 200
    seed: int = 0
    work: Path = WORK
    out: Path = RESULTS

    def __post_init__(self) -> None:
        if self.weeks < 2 or not 0 < self.version_week < self.weeks or self.first_week < 1 or self.refresh_steps < 1:
            raise UserError(
                f"got --weeks {self.weeks}, --version-week {self.version_week}, --first-week {self.first_week}, --refresh-steps "
                f"{self.refresh_steps}: expected at least 2 weeks, a version week between the first and the last, and positive numbers"
            )

    @property
    def world(self) -> SyntheticConfig:
        """Twice the events of the default world, more drift, and items that come and go."""
        sizes = {"seed": self.seed, "num_users": self.users, "num_items": self.items}
        return SyntheticConfig(**sizes, median_events=60.0, drift=0.2, launched_late=0.3, retired=0.2)

    def starts(self, week: int) -> float:
        """Unix seconds at which a simulated week starts."""
        return START_SECONDS + 7 * DAY_SECONDS * (self.first_week + week)


def main(options: Options) -> dict[str, Any]:
    """A frozen policy and one that is trained every week, over weeks."""
    console = Console(stderr=True)
    world = synthetic_world(options.world)
    folder = _folder(options)
    systems = [_trained(options, world.interactions, folder, week, console) for week in (0, options.version_week)]
    corpus = Corpus(interactions=world.interactions, text=systems[0].corpus.text)
    if any(system.corpus.attributes[1] != corpus.attributes[1] for system in systems):
        raise UserError(f"some attributes occur only among users who came later: take more --users than {options.users}")
    shop = Shop(world=world, corpus=corpus)
    deployments = {version: Deployment.of(version, systems[0], system) for version, system in enumerate(systems)}
    policy = systems[0].system.policy
    assert policy is not None
    requests = _requests(options, world.interactions)
    answers = {}
    for arm in ARMS:
        make = partial(_simulate, options, shop, deployments, policy, requests, arm == REFRESHED)
        answers[arm] = stored(folder / f"{arm.replace(' ', '-')}-{options.weeks}-{options.refresh_steps}.npz", make, console)
    weeks = [_week(week, requests, answers) for week in range(options.weeks)]
    result = {
        "question": QUESTION,
        "dataset": "synthetic",
        "num_users": options.users,
        "num_items": options.items,
        "users_evaluated": len(np.unique(requests["users"])),
        "seeds": 1,
        "protocol": _protocol(options),
        "version_week": options.version_week,
        "weeks": weeks,
        "all_weeks": _arms(np.ones(len(requests["users"]), bool), requests, answers),
        "after_the_new_version": _arms(requests["week"] >= options.version_week, requests, answers),
        "provenance": provenance(dataset_fingerprint=world.interactions.fingerprint),
    }
    write_results(options.out, "long-run-synthetic", result, page(result), partial(_draw, result), console)
    return result


def _protocol(options: Options) -> str:
    return (
        f"every event of {options.weeks} weeks by users with {MIN_PAST} events or more, in order, in one context v1 each, with consent, "
        "tier and memory of the device; caches follow from choices; the system is trained on what came before the first week; items that "
        "are not on offer are removed; the weekly training learns from the outcome of every plan in contexts drawn anew for that week's "
        "requests, an upper bound of what logs would tell; means by user, bootstrap over users, 95%, 2000 resamples"
    )


def _folder(options: Options) -> Path:
    """Where systems of this world are kept; a folder that was made with other settings is refused."""
    name = f"long-run-{options.preset_name}-{options.users}x{options.items}-seed{options.seed}"
    folder = options.work / name
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"world": asdict(options.world), "first_week": options.first_week, "version_week": options.version_week}
    file, text = folder / "settings.json", json.dumps(settings, indent=1)
    if file.exists() and file.read_text(encoding="utf-8") != text:
        raise UserError(f"{folder} holds systems of other settings (see {file.name}): name another --work")
    file.write_text(text, encoding="utf-8")
    return folder


def _trained(options: Options, interactions: Interactions, folder: Path, week: int, console: Console) -> TrainedSystem:
    """A system trained on what happened before a week."""
    path = folder / f"before-week-{week}"
    if not (path / "training.json").is_file():
        data = folder / f"data-before-week-{week}"
        write_prepared(events_before(interactions, options.starts(week)), data, f"the synthetic world before week {week}")
        config = preset(options.preset_name)
        config = replace(config, k_core=1, train=replace(config.train, seed=options.seed))
        with console.status(f"training {path.name}"):
            train_resumed(str(data), config, path, console)
    return load_trained(path)


def events_before(interactions: Interactions, seconds: float) -> Interactions:
    """What happened before a moment, of users with ``MIN_PAST`` events by then; all items stay, those without events too.

    Raises:
        UserError: fewer than two users had so many.
    """
    early = interactions.timestamps < seconds
    user_of_event = np.repeat(np.arange(interactions.num_users), np.diff(interactions.offsets))
    counts = np.bincount(user_of_event[early], minlength=interactions.num_users)
    users = np.flatnonzero(counts >= MIN_PAST)
    if len(users) < 2:
        raise UserError(
            f"{len(users)} users have {MIN_PAST} events before the first week: name more --users or a later --first-week"
        )
    kept = early & (counts >= MIN_PAST)[user_of_event]
    return replace(
        interactions,
        user_ids=tuple(interactions.user_ids[user] for user in users),
        offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(counts[users], dtype=np.int64)]),
        items=interactions.items[kept],
        timestamps=interactions.timestamps[kept],
        user_attributes={name: tuple(of[user] for user in users) for name, of in interactions.user_attributes.items()},
    )


def _requests(options: Options, interactions: Interactions) -> Arrays:
    """User, position and week of every request."""
    lengths = np.diff(interactions.offsets)
    users = np.repeat(np.arange(interactions.num_users), lengths)
    positions = np.arange(interactions.num_interactions) - np.repeat(interactions.offsets[:-1], lengths)
    week = np.floor((interactions.timestamps - options.starts(0)) / (7 * DAY_SECONDS)).astype(np.int64)
    asked = (week >= 0) & (week < options.weeks) & (positions >= MIN_PAST)
    found = {"users": users[asked], "positions": positions[asked], "week": week[asked]}
    if missing := sorted(set(range(options.weeks)) - set(found["week"].tolist())):
        raise UserError(f"weeks {missing} have no request: name more --users or another --first-week")
    return found


def _simulate(
    options: Options, shop: Shop, deployments: dict[int, Deployment], policy: LearnedPlanner, requests: Arrays, refresh: bool
) -> Arrays:
    """What every request gets, in the order of ``requests``."""
    fleet, planner = Fleet(options.users), policy
    values: Arrays = {}
    for week in range(options.weeks):
        rows = np.flatnonzero(requests["week"] == week)
        version = int(week >= options.version_week)
        of_week = (requests["users"][rows], requests["positions"][rows])
        for name, column in serve(shop, deployments, version, planner.logits, fleet, *of_week).items():
            values.setdefault(name, np.zeros(len(requests["week"]), np.float32))[rows] = column
        if refresh and week + 1 < options.weeks:
            planner = _refreshed(options, shop, deployments[version], planner, week, *of_week)
    return values


def _refreshed(
    options: Options,
    shop: Shop,
    deployment: Deployment,
    policy: LearnedPlanner,
    week: int,
    users: np.ndarray,
    positions: np.ndarray,
) -> LearnedPlanner:
    """The policy trained further on the outcomes of one week's requests."""
    drawn = [logged_outcomes(shop, deployment, users, positions, 1 + draw) for draw in range(CACHE_DRAWS)]
    people = np.random.default_rng([options.seed, week]).permutation(np.unique(users))
    selecting = people[: round(SELECTING_SHARE * len(people))]
    examples = PlannerExamples(
        users=users,
        event_ids=drawn[0][2],
        selects=np.isin(users, selecting),
        context=jax.tree.map(lambda *leaves: np.stack(leaves), *(context for context, _, _ in drawn)),
        quality=np.stack([quality for _, quality, _ in drawn]),
    )
    size = min(64, int((~examples.selects).sum()))
    config = PlannerTraining(steps=options.refresh_steps, users_per_step=size, seed=week)
    return train_planner(examples, deployment.world, config, policy).policy


def _week(week: int, requests: Arrays, answers: dict[str, Arrays]) -> dict[str, Any]:
    rows = requests["week"] == week
    cold = answers[FROZEN]["cold"][rows] > 0
    counts = {"week": week, "requests": int(rows.sum()), "cold_requests": int(cold.sum())}
    return counts | _arms(rows, requests, answers)


def _arms(rows: np.ndarray, requests: Arrays, answers: dict[str, Arrays]) -> dict[str, Any]:
    """Estimates of both policies over some requests, and of what the refreshed one gains."""
    cold = rows & (answers[FROZEN]["cold"] > 0)
    found: dict[str, Any] = {name: {} for name in ARMS}
    found["gain"] = {}
    for name in (*QUANTITIES, COLD):
        where, source = (cold, "hit_rate@10") if name == COLD else (rows, name)
        columns = {arm: _by_user(requests["users"][where], answers[arm][source][where]) for arm in ARMS}
        columns["gain"] = columns[REFRESHED] - columns[FROZEN]
        for column, estimate in estimates(columns).items():
            found[column][name] = estimate
    return found


def _by_user(users: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Mean of each user's requests, [users, 1]."""
    _, place, counts = np.unique(users, return_inverse=True, return_counts=True)
    return (np.bincount(place, weights=values, minlength=len(counts)) / counts)[:, None]


def page(result: dict[str, Any]) -> str:
    """The result for people."""
    columns = [
        "week",
        "requests",
        "of cold items",
        *(f"{name}, {arm}" for name in ("hit_rate@10", COLD, "calls") for arm in ARMS),
    ]
    rows = []
    for week in result["weeks"]:
        means = [with_interval(week[arm][name]) for name in ("hit_rate@10", COLD, "calls") for arm in ARMS]
        rows.append([str(week["week"]), f"{week['requests']:,}", f"{week['cold_requests']:,}", *means])
    lines = ["## By week", "", *markdown_table(columns, rows)]
    for part, title in (("all_weeks", "All weeks"), ("after_the_new_version", "From the week of the new version on")):
        found = result[part]
        rows = [
            [name, *(with_interval(found[arm][name]) for arm in ARMS), with_interval(found["gain"][name], signed=True)]
            for name in (*QUANTITIES, COLD)
        ]
        lines += [f"## {title}", "", *markdown_table(["", *ARMS, "gain, 95%"], rows)]
    lines += [
        f"The cloud has a new version from week {result['version_week']} on. *repaired* is the share of requests whose call failed and "
        "that a local plan answered; *refused* are those among them whose cached embedding was of the old version. Cold items had no event "
        "when the devices' models were trained.",
        "",
    ]
    return markdown_page(result, "Long run", lines)


def _draw(result: dict[str, Any], pyplot: Any) -> Any:
    figure, panels = pyplot.subplots(2, 3, figsize=(15, 8))
    weeks = np.array([week["week"] for week in result["weeks"]])
    titles = {
        "hit_rate@10": "hit_rate@10",
        COLD: COLD,
        "utility": "utility",
        "calls": "share of requests that call",
        "repaired": "share of requests repaired, refused ones dashed",
        "latency_ms": "mean latency, ms (modelled)",
    }
    for axes, (name, title) in zip(panels.flat, titles.items(), strict=True):
        for arm, colour, shift in ((FROZEN, "tab:gray", -0.06), (REFRESHED, "tab:blue", 0.06)):
            means, bars = error_bars([week[arm][name] for week in result["weeks"]])
            axes.errorbar(weeks + shift, means, bars, fmt="o-", capsize=2, color=colour, label=arm)
            if name == "repaired":
                axes.plot(weeks + shift, [week[arm]["refused"]["mean"] for week in result["weeks"]], "--", color=colour)
        axes.axvline(result["version_week"] - 0.5, color="black", linewidth=0.8, linestyle=":")
        axes.set_title(title)
        axes.set_xticks(weeks)
        axes.set_xlabel("week (dotted: new version in the cloud)")
        axes.grid(alpha=0.3)
    panels[0, 0].legend()
    return figure


if __name__ == "__main__":
    run_script(main, page)
