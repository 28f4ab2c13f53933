"""``train-planner --budget`` from its flags to a run that other commands take, and what bad input gets."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from cda4rec_jax.cli import main
from cda4rec_jax.evaluation import call_schedule
from cda4rec_jax.evaluation.call_schedule import ScheduleFitting
from cda4rec_jax.planner.scheduling import CallScheduler
from cda4rec_jax.runs import RunDirectory
from cda4rec_jax.runs.artifacts import load_trained

Cli = Callable[..., tuple[int, str, str]]
SMALL = partial(ScheduleFitting, users=60, sequences=120, unseen=3, counted=4)  # as in tests/evaluation/test_call_schedule.py


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Runs ``cda4rec`` on a terminal of 100 columns; gives exit code, stdout and stderr, their spaces made single."""
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, " ".join(captured.err.split())

    return run


@pytest.fixture(scope="module")
def scheduled(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run with a planner that may call twice a day."""
    out = tmp_path_factory.mktemp("schedule") / "scheduled"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(call_schedule, "ScheduleFitting", SMALL)
        assert main(["train-planner", "--run", str(tiny_run), "--budget", "calls=2", "--out", str(out)]) == 0
    return out


def test_the_run_has_the_planner_and_tells_where_it_comes_from(scheduled: Path, tiny_run: Path) -> None:
    trained, given = load_trained(scheduled), load_trained(tiny_run)
    planner = trained.system.policy
    assert type(planner) is CallScheduler and trained.planner_profile == "deployment"
    told = trained.run.read_json("call_schedule")
    assert told["budget"] == {"limited": "calls", "limit": 2.0, "requests_per_day": 10.0} and told["run"] == str(given.run.path)
    assert told["price"] == pytest.approx(float(planner.price[...])) and 0 < told["calls_per_day"] <= 2
    assert set(told["outcomes"]) == {"scheduled", "always", "never"} and float(abs(planner.freshness[...]).max()) > 0
    for name in ("mean_quality", "quality_scale"):
        assert (getattr(planner.policy, name)[...] == getattr(given.system.policy, name)[...]).all()
    assert trained.run.has("planner_training.json") == given.run.has("planner_training.json")


def test_recommend_takes_its_decision_apart(scheduled: Path, cli: Cli) -> None:
    code, out, _ = cli("recommend", "--run", scheduled, "--user", "user-001", "--json")
    assert code == 0
    plan = json.loads(out)["plan"]
    for terms in (plan["chosen"], plan["runner_up"]):
        whole = terms["quality"] + terms["further"]["price_of_a_call"] + terms["further"]["worth_to_later_requests"]
        assert terms["logit"] == pytest.approx(whole, abs=1e-5) and terms["total"] == pytest.approx(whole)
        assert terms["utility"] == pytest.approx(terms["quality"] + terms["time"] + terms["energy"] + terms["exposure"])
    assert plan["tau"] == 1.0 and plan["margin"] >= 0
    code, out, _ = cli("recommend", "--run", scheduled, "--user", "user-001")
    assert code == 0
    for row in ("price of a call ", "worth to later requests ", "their sum ", "time, not counted ", "energy, not counted "):
        assert row in out
    assert "price of time" not in out and "play no part in this planner's choice" in " ".join(out.split())


def test_plan_explain_ranks_by_the_sum(scheduled: Path, cli: Cli) -> None:
    flags = ("plan", "explain", "--run", scheduled, "--user", "user-001", "--cache-age", 3)
    code, out, _ = cli(*flags, "--json")
    told = json.loads(out)
    totals = [terms["total"] for terms in told["ranked"]]
    assert code == 0 and totals == sorted(totals, reverse=True) and told["ranked"][0]["prices_count"] is False
    assert {flip["axis"]: flip["to"] for flip in told["flips"]}["utility_per_exposure"] is None
    code, out, _ = cli(*flags)
    assert code == 0 and max(map(len, out.splitlines())) <= 100
    assert "price of a call" in out and "Another value of price of exposure alone never changes the plan" in " ".join(out.split())


def test_a_scheduled_run_is_fitted_to_another_budget_and_not_trained(
    scheduled: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for untrained in (
        ("train-planner", "--run", scheduled),
        ("train", "--preset", "tiny", "--planner", "cda4rec_jax.planner.scheduling:CallScheduler"),
    ):
        code, _, err = cli(*untrained, "--out", tmp_path / "other")
        assert code == 2 and "CallScheduler is not trained but fitted to a budget" in err and not (tmp_path / "other").exists()
    monkeypatch.setattr(call_schedule, "ScheduleFitting", SMALL)
    flags = ("--budget", "calls=6", "--requests-per-day", 20, "--out", tmp_path / "other")
    code, out, _ = cli("train-planner", "--run", scheduled, *flags)
    assert code == 0 and "calls=6 (mean cloud calls per user and day, of 20 requests)" in " ".join(out.split())
    prices = [RunDirectory.open(run).read_json("call_schedule")["price"] for run in (scheduled, tmp_path / "other")]
    assert prices[1] < prices[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--run RUN --budget exposure=0.2", "exposure=0.2 is none"),
        ("--run RUN --budget calls=30", "calls=30 limits nothing where a user has 10 requests a day"),
        ("--run RUN --budget calls", "expected NAME=NUMBER"),
        ("--run RUN --budget calls=3 --steps 10 --objective gumbel", "--objective and --steps say how a planner is trained"),
        ("--run RUN --requests-per-day 5", "add --budget calls=NUMBER"),
        ("--run nowhere --budget calls=3", "There is no run at"),
        ("--run BASELINE --budget calls=3", "which has no planner: name a joint run"),
        ("--run RUN --budget calls=3 --out RUN", "is the run itself or holds it"),
        ("--run RUN --budget calls=3 --out FULL", "already holds a run"),
    ],
)
def test_bad_input_gets_one_message_and_code_2(
    arguments: str, message: str, cli: Cli, tiny_run: Path, tiny_baseline: Path, scheduled: Path, tmp_path: Path
) -> None:
    named = {"RUN": tiny_run, "BASELINE": tiny_baseline, "FULL": scheduled}
    given = [str(named.get(word, word)) for word in arguments.split()]
    code, _, err = cli("train-planner", *([] if "--out" in given else ["--out", tmp_path / "out"]), *given)
    assert code == 2 and "Traceback" not in err and err.count("cda4rec: ") == 1 and message in err
    assert not list(tmp_path.iterdir())
