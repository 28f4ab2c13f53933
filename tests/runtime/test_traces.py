"""Traces of real requests: kept line by line, read back with every bad line named, and decided again."""

import dataclasses
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import msgspec
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from cda4rec_jax.cli.plan_tables import print_explanation, print_replay
from cda4rec_jax.errors import UserError
from cda4rec_jax.messages import Context, EgressLevel, Link, Placement, Subtask
from cda4rec_jax.planner import PLANS, STANDARD, PolicyConfig, plan_index
from cda4rec_jax.runs.artifacts import TrainedSystem, load_trained
from cda4rec_jax.runtime.recommend import Recommender
from cda4rec_jax.runtime.recommend.explanation import Departures, explain_request
from cda4rec_jax.runtime.recommend.planning import Situation
from cda4rec_jax.runtime.recommend.record import record_traces
from cda4rec_jax.runtime.replay import Accuracy, replay_traces
from cda4rec_jax.runtime.traces import (
    StoredContext,
    StoredSpan,
    StoredTrace,
    TraceLog,
    batch_contexts,
    read_traces,
    run_identity,
    stored_context,
)
from tests.planner.own_planner import Mute

FOLDER = Path(__file__).resolve().parents[2] / "checkpoints" / "synthetic-tiny"
NUM_REQUESTS = 6


@pytest.fixture(scope="module")
def trained() -> TrainedSystem:
    return load_trained(FOLDER)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traces") / "traces.jsonl"


@pytest.fixture(scope="module")
def recommender(trained: TrainedSystem, file: Path):
    with Recommender(trained, traces=TraceLog(file, run_identity(trained))) as recommender:
        yield recommender


@pytest.fixture(scope="module")
def recorded(recommender: Recommender, file: Path) -> tuple[StoredTrace, ...]:
    """Six drawn requests, and one whose plan was asked for."""
    traces = record_traces(recommender, NUM_REQUESTS, seed=3)
    recommender.recommend(recommender.user_ids[0], plan="cloud-full-cloud")
    stored = read_traces(file)
    assert [trace.plan for trace in stored[:-1]] == [trace.plan.name for trace in traces]
    assert [trace.latency_ms for trace in stored[:-1]] == [trace.latency_ms for trace in traces]
    return stored


def test_a_stored_context_has_the_fields_of_a_context() -> None:
    assert StoredContext.__struct_fields__ == tuple(entry.name for entry in dataclasses.fields(Context))


def test_a_trace_tells_all_but_the_user(recorded: Sequence[StoredTrace], trained: TrainedSystem, file: Path) -> None:
    assert len(recorded) == NUM_REQUESTS + 1
    text = file.read_text()
    interactions = trained.corpus.interactions
    assert not any(f'"{user}"' in text for user in interactions.user_ids)
    assert not any(f'"{item}"' in text for item in interactions.item_ids)
    assert len({trace.user for trace in recorded[:-1]}) == NUM_REQUESTS  # nobody twice before everybody once
    assert [trace.asked_for for trace in recorded] == [None] * NUM_REQUESTS + ["cloud-full-cloud"]
    assert all({"planning", "retrieval"} <= {span.subtask for span in trace.spans} for trace in recorded)
    assert all(trace.uplink_bytes > 0 for trace in recorded if trace.plan.startswith("fresh"))
    assert len({trace.context for trace in recorded}) == len(recorded)


def test_another_session_calls_the_same_user_something_else(
    recommender: Recommender, recorded: Sequence[StoredTrace], trained: TrainedSystem, tmp_path: Path
) -> None:
    context = batch_contexts([recorded[0].context])
    trace = record_traces(recommender, 1, seed=3)[0]
    logs = [TraceLog(tmp_path / "two.jsonl", run_identity(trained)) for _ in range(2)]
    for log in (*logs, logs[1]):
        log.append("user-001", context, None, trace)
    first, second, third = read_traces(tmp_path / "two.jsonl")
    assert first.user != second.user == third.user


def test_a_context_survives_storing(recorded: Sequence[StoredTrace]) -> None:
    contexts = [trace.context for trace in recorded]
    batch = batch_contexts(contexts)
    again = [stored_context(jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], batch)) for row in range(len(contexts))]
    assert again == contexts


def test_a_torn_line_stays_alone_and_all_bad_lines_are_named(recorded: Sequence[StoredTrace], file: Path, tmp_path: Path) -> None:
    lines = file.read_bytes().splitlines()
    wrong = [json.loads(line) for line in lines[:4]]
    wrong[0]["version"] = 2
    wrong[1]["context"]["link"] = 9
    wrong[2]["history"] = [1, 2, 3]
    del wrong[3]["context"]["consent"]
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(b"\n".join([lines[0], *(json.dumps(each).encode() for each in wrong), b"not json", lines[1][:40]]))
    TraceLog(bad, recorded[0].run)
    with bad.open("ab") as end:
        end.write(lines[1] + b"\n")
    with pytest.raises(UserError) as refused:
        read_traces(bad)
    message = str(refused.value)
    assert "6 of 8 lines are no traces of version 1" in message
    assert all(f"line {number}: " in message for number in (2, 3, 4, 5, 6, 7))
    assert "line 1: " not in message and "line 8: " not in message
    assert "`$.context.link`" in message and "unknown field `history`" in message


def test_a_file_that_cannot_be_used_is_refused(recorded: Sequence[StoredTrace], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read traces from .*nowhere"):
        read_traces(tmp_path / "nowhere")
    (tmp_path / "empty").touch()
    with pytest.raises(UserError, match="is empty: record traces with"):
        read_traces(tmp_path / "empty")
    with pytest.raises(UserError, match="cannot write traces to"):
        TraceLog(tmp_path / "no" / "folder", recorded[0].run)


def test_a_run_decides_its_own_traces_as_before(recorded: Sequence[StoredTrace], trained: TrainedSystem) -> None:
    found = replay_traces(trained, recorded)
    assert (found.num_traces, found.num_same_run, found.num_asked_for) == (NUM_REQUESTS + 1, NUM_REQUESTS + 1, 1)
    assert (found.num_compared, found.num_equal, found.num_forbidden) == (NUM_REQUESTS, NUM_REQUESTS, 0)
    assert found.changes == ()
    assert found.gain is not None and found.gain.mean_difference == found.gain.low == found.gain.high == 0.0
    assert json.loads(found.to_json())["num_equal"] == NUM_REQUESTS


def test_changed_plans_are_counted_by_pair_with_what_they_gain(
    recorded: Sequence[StoredTrace], trained: TrainedSystem, recommender: Recommender
) -> None:
    last_resort = "local-skip-skip"
    stored = [msgspec.structs.replace(trace, plan=last_resort) for trace in recorded[:-1]]
    found = replay_traces(trained, stored)
    planned = [recommender.planner.of_context(batch_contexts([trace.context])) for trace in stored]
    best = [int(each.logits[0].argmax()) for each in planned]
    tau = float(np.asarray(planned[0].tau))
    gains = [
        tau * float(each.logits[0, plan] - each.logits[0, plan_index(last_resort)])
        for each, plan in zip(planned, best, strict=True)
    ]
    assert found.num_equal == sum(PLANS[plan].name == last_resort for plan in best)
    assert sum(change.count for change in found.changes) == NUM_REQUESTS - found.num_equal > 0
    assert found.gain is not None and found.gain.mean_difference == pytest.approx(np.mean(gains), abs=1e-5)
    for change in found.changes:
        of_pair = [gain for gain, plan in zip(gains, best, strict=True) if PLANS[plan].name == change.now]
        assert (change.before, change.count) == (last_resort, len(of_pair))
        assert change.utility == pytest.approx(np.mean(of_pair), abs=1e-5)


def test_stored_plans_that_are_forbidden_now_are_told_by_rule(recorded: Sequence[StoredTrace], trained: TrainedSystem) -> None:
    ample = {"free_memory_mb": 1e4, "consent": EgressLevel.FULL, "link": Link.WIFI}

    def stored(plan: str, **fields: object) -> StoredTrace:
        context = msgspec.structs.replace(recorded[0].context, **(ample | fields))
        return msgspec.structs.replace(recorded[0], plan=plan, executed_plan=plan, context=context)

    found = replay_traces(
        trained,
        [
            stored("fresh-full-20-skip", consent=EgressLevel.PROFILE),
            stored("fresh-full-20-device", consent=EgressLevel.PROFILE, free_memory_mb=10.0),
            stored("fresh-full-20-skip", link=Link.OFFLINE),
            stored("fresh-full-20-skip"),
        ],
    )
    assert found.num_forbidden == 3
    assert found.forbidden == {"consent": 2, "link down": 1, "memory": 1}
    assert sum(change.forbidden for change in found.changes) == 3
    assert all((change.utility is None) == (change.forbidden == change.count) for change in found.changes)

    # At this price nothing leaves, whatever may: one pair of plans, forbidden to two of three requests.
    dear = [stored("fresh-full-20-skip", utility_per_exposure=1e3, consent=EgressLevel(level)) for level in (1, 3, 2)]
    (change,), (alone,) = (replay_traces(trained, traces).changes for traces in (dear, dear[1:2]))
    assert (change.now, change.count, change.forbidden) == (alone.now, 3, 2) and alone.forbidden == 0
    assert change.utility == pytest.approx(alone.utility) and alone.utility is not None and alone.utility > 0


def test_prediction_error_is_the_median_relative_one_of_requests_that_ran_as_planned(
    recorded: Sequence[StoredTrace], trained: TrainedSystem
) -> None:
    def timed(predicted_ms: float, latency_ms: float, **changes: object) -> StoredTrace:
        times = {"start_ms": 1.0, "end_ms": 5.0, "predicted_ms": predicted_ms, "payload_bytes": 0}
        ranking = StoredSpan(subtask=Subtask.RANKING, placement=Placement.DEVICE, **times)
        reuse = StoredSpan(subtask=Subtask.SEMANTIC, placement=Placement.REUSE, **times)
        values = {"plan": "local-skip-skip", "executed_plan": "local-skip-skip", "spans": (ranking, reuse), "flags": ()} | changes
        return msgspec.structs.replace(recorded[0], predicted_ms=predicted_ms, latency_ms=latency_ms, **values)

    failed = timed(1.0, 500.0, plan="fresh-profile-20-skip", flags=("link_failed", "regret_high"))
    found = replay_traces(trained, [timed(2.0, 4.0), timed(5.0, 4.0), timed(3.0, 4.0, flags=("regret_high",)), failed])
    assert found.latency == Accuracy(name="request", count=3, median_absolute_percentage_error=0.25)  # of .5, .25, .25
    assert found.subtasks == (Accuracy(name="ranking, device", count=3, median_absolute_percentage_error=0.25),)
    assert (found.num_failed, found.flags) == (1, {"regret_high": 2, "link_failed": 1})


def test_what_this_run_cannot_decide_is_refused(recorded: Sequence[StoredTrace], trained: TrainedSystem) -> None:
    other = msgspec.structs.replace(recorded[0], plan="teleport-20")
    with pytest.raises(UserError, match="plans that this run does not have: teleport-20"):
        replay_traces(trained, [other])


def test_a_plan_that_became_none_of_the_runs_plans_is_replayed(recorded: Sequence[StoredTrace], trained: TrainedSystem) -> None:
    lost = msgspec.structs.replace(recorded[0], executed_plan="fresh-full-50-skip")
    found = replay_traces(trained, [lost])
    assert (found.num_traces, found.num_equal, found.num_failed) == (1, 1, 1)


@pytest.mark.parametrize("consent", [EgressLevel.PROFILE, EgressLevel.FULL])
def test_an_explanation_fits_100_columns(recommender: Recommender, consent: EgressLevel) -> None:
    situation, memory = Situation(consent=consent), Departures(free_memory_mb=100.0)
    found = explain_request(recommender, recommender.user_ids[1], situation, memory)
    console = Console(width=100, file=io.StringIO())
    print_explanation(found, console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 100 and "…" not in text
    assert f"chosen: {found.decision.chosen.name}" in text and "runner-up: " in text and "free memory, MB" in text
    assert ("by consent + memory" in text) == (consent is EgressLevel.PROFILE)


def test_every_flip_flips_where_it_says_and_not_before(recommender: Recommender) -> None:
    user = recommender.user_ids[1]
    found = explain_request(recommender, user, Situation(), Departures())
    history = recommender.history(user)
    context = recommender.planner.plan(history, Situation()).context
    base = found.decision.chosen.plan_index
    numbers = [flip for flip in found.flips if isinstance(flip.to, float)]
    assert len(numbers) >= 3

    def chosen(field: str, value: float) -> int:
        changed = replace(context, **{field: np.full((1,), value, np.float32)})
        return int(recommender.planner.of_context(changed).logits[0].argmax())

    for flip in numbers:
        assert isinstance(flip.to, float) and isinstance(flip.now, float)
        assert chosen(flip.axis, flip.to) == flip.plan_index != base
        step = -1e-3 if flip.to > flip.now else 1e-3
        assert chosen(flip.axis, flip.to * (1 + step)) == base


def test_departures_that_cannot_be_are_refused(recommender: Recommender) -> None:
    with pytest.raises(UserError, match=r"numbers of 0 or more, got round_trip_ms -1.0, price_of_time nan"):
        Departures(round_trip_ms=-1.0, price_of_time=float("nan"))
    context = recommender.planner.draw(recommender.history(recommender.user_ids[1]), 0)
    with pytest.raises(UserError, match=r"at most [0-9]+ events old, not 10000"):
        Departures(cache_age_events=10_000).applied(context, max_cache_age=20_000)


def test_an_age_without_a_level_and_a_level_without_an_age_are_refused(recommender: Recommender) -> None:
    user, closed = recommender.user_ids[1], Situation(consent=EgressLevel.NOTHING)
    for situation, departures in (
        (closed, Departures(cache_age_events=2)),
        (closed, Departures(cache_level=EgressLevel.RECENT)),
        (Situation(), Departures(cache_age_events=0, cache_level=EgressLevel.RECENT)),
    ):
        with pytest.raises(UserError, match=r"no kept embedding of level (nothing and age 2|recent and age 0): name a level"):
            explain_request(recommender, user, situation, departures)
    withdrawn = explain_request(recommender, user, closed, Departures(cache_age_events=2, cache_level=EgressLevel.RECENT))
    assert withdrawn.context.cache_age_events == 2 and withdrawn.context.cache_level is EgressLevel.RECENT


def test_a_planner_without_a_score_is_served_explained_and_replayed_alike(recorded: Sequence[StoredTrace]) -> None:
    trained, last_resort, asked = load_trained(FOLDER), "local-skip-skip", "fresh-full-20-device"
    trained.system.policy = Mute(PolicyConfig(), space=STANDARD, rngs=nnx.Rngs(0))
    with Recommender(trained) as recommender:
        user = recommender.user_ids[1]
        served, forced = recommender.recommend(user), recommender.recommend(user, plan=asked)
        explained = explain_request(recommender, user, Situation(), Departures())
    assert served.plan.name == explained.decision.chosen.name == last_resort and forced.plan.name == asked
    assert served.choice.decision.runner_up is None and json.loads(served.to_json())["plan"]["chosen"]["name"] == last_resort
    assert [terms.name for terms in explained.ranked] == [last_resort] and all(flip.to is None for flip in explained.flips)
    print_explanation(explained, Console(file=io.StringIO()))
    forced.print(Console(file=io.StringIO()))
    replayed = replay_traces(trained, recorded)
    assert {(change.now, change.forbidden, change.utility) for change in replayed.changes} == {(last_resort, 0, None)}
    console = Console(width=100, file=io.StringIO())
    print_replay(replayed, console)
    assert isinstance(console.file, io.StringIO)
    rows = [line.split() for line in console.file.getvalue().splitlines() if last_resort in line]
    assert rows and all(row[-2:] == ["0", "-"] for row in rows)


def test_departures_change_what_they_name_and_nothing_else(recommender: Recommender) -> None:
    context = recommender.planner.draw(recommender.history(recommender.user_ids[1]), 0)
    changed = Departures(cache_age_events=0, round_trip_ms=77.0, price_of_time=3.0).applied(context, max_cache_age=20)
    before, after = stored_context(context), stored_context(changed)
    assert after == msgspec.structs.replace(
        before,
        cache_age_events=0.0,
        cache_level=EgressLevel.NOTHING,
        round_trip_ms=77.0,
        utility_per_ms=float(3 * np.float32(before.utility_per_ms)),
    )


def test_weights_tell_runs_apart(trained: TrainedSystem) -> None:
    assert run_identity(trained) == run_identity(load_trained(FOLDER))
    other = replace(trained, weights=jax.tree.map(lambda leaf: leaf + leaf.dtype.type(1), trained.weights))
    assert run_identity(other).weights != run_identity(trained).weights
