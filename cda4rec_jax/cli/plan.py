"""The command ``cda4rec plan``: why a plan was chosen, what another run would choose, and stored traces decided again."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from cda4rec_jax.cli.arguments import Device, Level, Link, require_positive
from cda4rec_jax.cli.console import StagesView, in_shell, standard_output
from cda4rec_jax.cli.process import set_up_process
from cda4rec_jax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PlanExplain:
    """Why a request gets its plan: the terms of every plan, what forbids the others, and the smallest change that flips the decision."""

    run_directory: Annotated[Path, tyro.conf.arg(name="run")]
    """Run directory of a finished training."""
    user: str
    """Id of a user of the run's data."""
    link: Link = "wifi"
    """Network of the device."""
    device: Device = "mid"
    """Speed of the device."""
    consent: Level = "full"
    """The most that the user allows to leave the device."""
    cache_age: int | None = None
    """Events since the kept embedding was made, 0 if there is none; 3, or what the history allows, if not given."""
    cache_level: Level | None = None
    """What the kept embedding was made from; the consent's level if not given."""
    free_memory_mb: float | None = None
    """Free memory of the device; the middle of what such devices have if not given."""
    round_trip_ms: float | None = None
    """Round trip of the network; its typical one if not given."""
    uplink_kbps: float | None = None
    """Bandwidth to the cloud; the network's typical one if not given."""
    downlink_kbps: float | None = None
    """Bandwidth from the cloud; the network's typical one if not given."""
    price_of_time: float = 1.0
    """What a millisecond is worth, times the typical price."""
    price_of_energy: float = 1.0
    """What a millijoule is worth, times the typical price."""
    price_of_exposure: float = 1.0
    """What exposure is worth, times the typical price."""
    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        """See ``explain_request``."""
        set_up_process()
        from cda4rec_jax.cli.plan_tables import print_explanation
        from cda4rec_jax.runs.artifacts import load_trained
        from cda4rec_jax.runtime.recommend import Recommender
        from cda4rec_jax.runtime.recommend.explanation import Departures, explain_request
        from cda4rec_jax.runtime.recommend.planning import Situation
        from cda4rec_jax.runtime.recommend.recommender import LEVELS, LINKS, TIERS

        situation = Situation(link=LINKS[self.link], tier=TIERS[self.device], consent=LEVELS[self.consent])
        departures = Departures(
            cache_age_events=self.cache_age,
            cache_level=None if self.cache_level is None else LEVELS[self.cache_level],
            free_memory_mb=self.free_memory_mb,
            round_trip_ms=self.round_trip_ms,
            uplink_kbps=self.uplink_kbps,
            downlink_kbps=self.downlink_kbps,
            price_of_time=self.price_of_time,
            price_of_energy=self.price_of_energy,
            price_of_exposure=self.price_of_exposure,
        )
        with Recommender(load_trained(self.run_directory)) as recommender:
            found = explain_request(recommender, self.user, situation, departures)
        if self.json:
            print(found.to_json())
        else:
            print_explanation(found, standard_output())


@dataclass(frozen=True, kw_only=True)
class PlanRecord:
    """Serve requests of sampled users in simulated contexts, for real, and append a trace of each to a file."""

    run_directory: Annotated[Path, tyro.conf.arg(name="run")]
    """Run directory of a finished training."""
    traces: Path
    """File to append to, one JSON object a line, without the users' ids or histories."""
    requests: int = 200
    """How many; no user is asked twice before every user was asked once."""
    seed: int = 0
    """Of the users and of their contexts."""

    def run(self) -> None:
        """See ``record_traces``."""
        require_positive(self.requests, "--requests")
        require_positive(self.seed, "--seed", or_zero=True)
        set_up_process()
        from cda4rec_jax.runs.artifacts import load_trained
        from cda4rec_jax.runtime.recommend import Recommender
        from cda4rec_jax.runtime.recommend.record import record_traces
        from cda4rec_jax.runtime.traces import TraceLog, run_identity

        console, trained = standard_output(), load_trained(self.run_directory)
        log = TraceLog(self.traces, run_identity(trained))
        with Recommender(trained, traces=log) as recommender, StagesView(console) as view:
            record_traces(recommender, self.requests, self.seed, lambda done, total: view.progress("serving", done, total))
        console.print(
            f"appended {self.requests:,} traces to {self.traces}\n"
            f"decide them again with: {in_shell('cda4rec plan replay --traces', self.traces, '--run', self.run_directory)}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


@dataclass(frozen=True, kw_only=True)
class PlanReplay:
    """Decide stored traces again: what this run's planner would do, what that earns, and how well times were predicted."""

    traces: Path
    """File that cda4rec plan record or cda4rec recommend --traces wrote."""
    run_directory: Annotated[Path, tyro.conf.arg(name="run")]
    """Run directory whose planner decides."""
    json: Path | None = None
    """File for the same as JSON."""

    def run(self) -> None:
        """See ``replay_traces``."""
        set_up_process()
        from cda4rec_jax.cli.plan_tables import print_replay
        from cda4rec_jax.runs.artifacts import load_trained
        from cda4rec_jax.runtime.replay import replay_traces
        from cda4rec_jax.runtime.traces import read_traces

        file = _writable(self.json)
        if file is not None and file.exists() and file.samefile(self.traces):
            raise UserError(f"--json is the file of the traces, {file}, which would be lost: name another file")
        traces = read_traces(self.traces)
        found = replay_traces(load_trained(self.run_directory), traces)
        print_replay(found, standard_output())
        _write(file, found.to_json())


@dataclass(frozen=True, kw_only=True)
class PlanDiff:
    """Compare the planners of two runs over the same simulated contexts of the same held-out events."""

    run_directory: Annotated[Path, tyro.conf.arg(name="run")]
    """Run directory of run A, at whose prices both are compared."""
    other: Path
    """Run directory of run B, trained on the same data."""
    requests: int = 1000
    """Contexts of test events to compare; more where every user must have the same number."""
    seed: int = 0
    """Of the users, where there are more than requests."""
    json: Path | None = None
    """File for the same as JSON."""

    def run(self) -> None:
        """See ``diff_plans``."""
        require_positive(self.seed, "--seed", or_zero=True)
        set_up_process()
        from cda4rec_jax.cli.plan_tables import print_diff
        from cda4rec_jax.evaluation.plan_diff import diff_plans
        from cda4rec_jax.runs.artifacts import load_trained

        console, file = standard_output(), _writable(self.json)
        run_a, run_b = load_trained(self.run_directory), load_trained(self.other)
        with StagesView(console) as view:
            found = diff_plans(run_a, run_b, num_requests=self.requests, seed=self.seed, progress=view.progress)
        print_diff(found, console)
        _write(file, found.to_json())


def _writable(file: Path | None) -> Path | None:
    """The file, if it can be written. Raises UserError where it cannot."""
    from cda4rec_jax.evaluation.evaluate import check_writable

    if file is not None:
        check_writable(file)
    return file


def _write(file: Path | None, text: str) -> None:
    if file is None:
        return
    try:
        file.write_text(f"{text}\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {file} ({error.strerror}): name a file in a folder that can be written") from error


@dataclass(frozen=True, kw_only=True)
class PlanCommand:
    """Look into the planner: explain a decision, record and replay traces, compare two runs."""

    command: Annotated[
        Annotated[PlanExplain, tyro.conf.subcommand(name="explain")]
        | Annotated[PlanRecord, tyro.conf.subcommand(name="record")]
        | Annotated[PlanReplay, tyro.conf.subcommand(name="replay")]
        | Annotated[PlanDiff, tyro.conf.subcommand(name="diff")],
        tyro.conf.arg(name=""),
    ]

    def run(self) -> None:
        """Run the command that was chosen."""
        self.command.run()
