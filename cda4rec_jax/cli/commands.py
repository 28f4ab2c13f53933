"""The sub-commands: a dataclass each, whose fields are the flags and whose ``run`` does the work."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Protocol, runtime_checkable

import tyro

from cda4rec_jax.cli.arguments import Device, Level, Link, require_positive
from cda4rec_jax.cli.bench import Bench
from cda4rec_jax.cli.calibrate import Calibrate
from cda4rec_jax.cli.console import StagesView, in_shell, standard_output
from cda4rec_jax.cli.plan import PlanCommand
from cda4rec_jax.cli.process import set_up_process
from cda4rec_jax.cli.train import Train
from cda4rec_jax.cli.train_planner import TrainPlanner
from cda4rec_jax.errors import UserError


@runtime_checkable
class Command(Protocol):
    """What the command line is parsed to."""

    def run(self) -> None:
        """Do it. Raises UserError or Stopped."""
        ...


@dataclass(frozen=True, kw_only=True)
class Quickstart:
    """Train, evaluate and recommend, to see everything once: minutes on the synthetic world, longer on real data."""

    data: str = "synthetic"
    """What to train on: synthetic, or a folder (prepared, RecBole or MovieLens)."""
    out: Path = Path("runs/quickstart")
    """Run directory. Where it is taken, a number is appended: nothing is ever overwritten."""

    def run(self) -> None:
        """See ``quickstart``."""
        from cda4rec_jax.cli.quickstart import quickstart

        set_up_process()
        quickstart(self.data, self.out, standard_output())


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Validate a dataset, say what is dropped and why, and write it as a prepared folder that training reads at once."""

    source: tyro.conf.Positional[str]
    """A RecBole folder (NAME.inter), a MovieLens folder (ratings.dat, ratings.csv), or synthetic[:users=500,items=200,seed=1]."""
    out: Path
    """Folder to write. A prepared dataset that is there is replaced when the new one is complete."""
    k_core: int = 5
    """Events that every user and every item must have; 1 keeps every item."""

    def run(self) -> None:
        """Print the report of ``cda4rec_jax.data.prepare``."""
        from cda4rec_jax.data import prepare

        require_positive(self.k_core, "--k-core")
        for line in prepare(self.source, self.out, k_core=self.k_core).lines():
            print(line)


@dataclass(frozen=True, kw_only=True)
class Encode:
    """Give every item of a dataset a vector from its text by a pretrained sentence encoder, as a file for train --text."""

    source: tyro.conf.Positional[str]
    """Whose items to encode: a folder (prepared, RecBole or MovieLens) or synthetic[:users=500,items=200,seed=1]."""
    model: Path
    """Folder of the encoder, a BERT with mean pooling such as all-MiniLM-L6-v2: config.json, tokenizer.json, model.safetensors."""
    out: Path
    """File to write, ending in .npz. Text vectors that are there are replaced when the new ones are complete."""
    dimensions: int = 128
    """Principal components to keep of the encoder's vectors."""
    tfidf: int | None = None
    """Put so many dimensions of TF-IDF beside them; none if not given."""

    def run(self) -> None:
        """See ``encode_items``."""
        from cda4rec_jax.data import read_interactions
        from cda4rec_jax.data.encoders import SentenceEncoder
        from cda4rec_jax.data.text import Combined, TfidfSvd
        from cda4rec_jax.data.text_vectors import check_destination, encode_items, save_text_vectors

        require_positive(self.dimensions, "--dimensions")
        require_positive(self.tfidf, "--tfidf")
        console = standard_output()
        check_destination(self.out)
        set_up_process()
        with StagesView(console) as view:
            encoder = SentenceEncoder(self.model, self.dimensions, lambda done, total: view.progress("encoding", done, total))
            provider = Combined(providers=(encoder, TfidfSvd(dimensions=self.tfidf))) if self.tfidf else encoder
            interactions = read_interactions(self.source)
            started = time.monotonic()
            vectors = encode_items(interactions, provider, encoder.sentences.fingerprint)
            seconds = time.monotonic() - started
        save_text_vectors(self.out, vectors)
        num_items, width = vectors.vectors.shape
        console.print(
            f"wrote {self.out}: {num_items:,} items x {width} ({vectors.provider}), {seconds:.1f} s, {num_items / seconds:,.0f} items/s\n"
            f"train with it: {in_shell('cda4rec train --data', self.source, '--text', self.out)}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure a trained run on the held-out events of all users: every plan, every planner, and the baselines."""

    run_directory: Annotated[Path, tyro.conf.arg(name="run")]
    """Run directory of a finished training."""
    plan: tuple[str, ...] = ("all",)
    """Plans to report, by name; all reports all that there are."""
    json: Path | None = None
    """File for the report, in addition to results.json of the run."""
    baseline: Path | None = None
    """Run directory of a SASRec trained on the same data (cda4rec train --preset sasrec); the folder sasrec inside of --run if
    not given."""
    split: Literal["test", "validation"] = "test"
    """Which held-out event of every user to predict."""
    profile: Literal["deployment", "measured"] = "deployment"
    """Costs of sub-tasks: of a declared deployment (modelled), or as measured (by calibrate, or when the run was trained)."""
    budget: tuple[str, ...] = ()
    """Budgets that the policy shall keep, each on its own: calls=3 (cloud calls per user and day, in the mean over users),
    p95_ms=250, exposure=0.2. The price that keeps one is calibrated on validation events."""
    requests_per_day: float | None = None
    """Requests of a user in a day: an assumption, which turns calls per request into calls per day; 10 if not given. Only for a
    --budget of calls."""

    def run(self) -> None:
        """Print the report of ``evaluate_run``."""
        set_up_process()
        from cda4rec_jax.evaluation import evaluate_run
        from cda4rec_jax.planner.budgets import REQUESTS_PER_DAY, Budget, Limited

        per_day = REQUESTS_PER_DAY if self.requests_per_day is None else self.requests_per_day
        budgets = [Budget.parse(text, per_day) for text in self.budget]
        if self.requests_per_day is not None and all(budget.limited is not Limited.CALLS for budget in budgets):
            raise UserError("--requests-per-day says what a budget of calls is: add --budget calls=NUMBER, or leave it out")
        console = standard_output()
        with StagesView(console) as view:
            report = evaluate_run(
                self.run_directory,
                split=self.split,
                plans="all" if "all" in self.plan else self.plan,
                baseline=self.baseline,
                profile=self.profile,
                budgets=budgets,
                json_file=self.json,
                progress=view.progress,
            )
        report.print(console)


@dataclass(frozen=True, kw_only=True)
class Recommend:
    """Recommend to one user, and tell the plan, its reasons, the time of every sub-task, and what left the device."""

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
    k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 10
    """Length of the slate."""
    json: bool = False
    """Print JSON."""
    real_delay: bool = False
    """Wait for the link on a real clock; otherwise link time is computed."""
    plan: str | None = None
    """Follow this plan instead of the planner's choice."""
    traces: Path | None = None
    """Append what was seen, chosen and measured to this file, one JSON object a line, without the user's id or history."""
    ledger: Path | None = None
    """Record what left the device in this SQLite file: when, which fields, how many bytes, their hash and how often they were sent;
    never what they say."""

    def run(self) -> None:
        """Print one recommendation."""
        set_up_process()
        from cda4rec_jax.runs.artifacts import load_trained
        from cda4rec_jax.runtime.recommend import Recommender
        from cda4rec_jax.runtime.traces import TraceLog, run_identity

        trained = load_trained(self.run_directory)
        traces = None if self.traces is None else TraceLog(self.traces, run_identity(trained))
        with Recommender(trained, real_delay=self.real_delay, traces=traces, ledger_file=self.ledger) as recommender:
            found = recommender.recommend(
                self.user, link=self.link, tier=self.device, consent=self.consent, k=self.k, plan=self.plan
            )
        if self.json:
            print(found.to_json())
        else:
            found.print(standard_output())


COMMANDS: Mapping[str, Callable[..., Command]] = {
    "quickstart": Quickstart,
    "prepare": Prepare,
    "encode": Encode,
    "train": Train,
    "train-planner": TrainPlanner,
    "evaluate": Evaluate,
    "recommend": Recommend,
    "plan": PlanCommand,
    "bench": Bench,
    "calibrate": Calibrate,
}
