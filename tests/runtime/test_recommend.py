"""One slate for one user of a trained run, whatever the situation, and the truth about how it came to be."""

import io
import itertools
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from cda4rec_jax.errors import UserError
from cda4rec_jax.messages import EgressLevel, Link, Placement
from cda4rec_jax.planner import PLANS, plan_index
from cda4rec_jax.runs.artifacts import load_trained
from cda4rec_jax.runtime import Request
from cda4rec_jax.runtime.clock import NO_DELAY
from cda4rec_jax.runtime.recommend import Recommender
from cda4rec_jax.runtime.recommend.planning import Situation
from cda4rec_jax.runtime.recommend.report import in_words
from cda4rec_jax.runtime.recommend.waterfall import stages_of
from cda4rec_jax.runtime.wire import decode_request

SENDS_FULL = "fresh-full-100-device"


@pytest.fixture(scope="module")
def trained(tiny_run: Path):
    return load_trained(tiny_run)


@pytest.fixture(scope="module")
def recommender(trained):
    with Recommender(trained) as recommender:
        yield recommender


@pytest.fixture(scope="module")
def user(trained) -> str:
    return trained.corpus.interactions.user_ids[3]


def printed(found, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO())
    found.print(console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def past_items(trained, user: str) -> set[str]:
    interactions = trained.corpus.interactions
    row = interactions.user_ids.index(user)
    return {interactions.item_ids[item - 1] for item in interactions.history(row)}


@pytest.mark.parametrize(
    ("link", "tier", "consent"),
    [
        ("wifi", "high", "full"),
        ("3g", "low", "profile"),
        ("offline", "mid", "full"),
        ("lte", "mid", "nothing"),
        (None, None, None),
    ],
)
def test_there_is_one_slate_of_new_items_in_every_situation(recommender, trained, user, link, tier, consent):
    found = recommender.recommend(user, link=link, tier=tier, consent=consent)
    assert len(found.items) == 10
    assert not {item.item_id for item in found.items} & past_items(trained, user)
    assert len({item.item_id for item in found.items}) == 10
    assert all(item.title for item in found.items)
    scores = [item.score for item in found.items]
    assert scores == sorted(scores, reverse=True)
    if link == "offline" or consent == "nothing":
        assert not found.plan.uses_link
        assert (found.uplink_bytes, found.released) == (0, ())


def test_what_left_is_told_field_by_field_and_adds_up(recommender, user):
    found = recommender.recommend(user, plan=SENDS_FULL)
    assert found.executed_plan.name == SENDS_FULL
    fields = {field.name: field for field in found.released}
    assert fields["item_ids"].level is EgressLevel.RECENT
    assert fields["item_ids"].payload_bytes > 0
    assert sum(field.payload_bytes for field in found.released) == found.uplink_bytes
    assert all(field.payload_bytes > 0 for field in found.released)


def test_bytes_are_predicted_by_what_agents_read_not_by_what_the_user_has(recommender, trained):
    lengths = np.diff(trained.corpus.interactions.offsets)
    longest = int(np.argmax(lengths))
    assert lengths[longest] > 2 * trained.config.history_length
    history = recommender.history(trained.corpus.interactions.user_ids[longest])
    found = recommender.answer(history, Situation(), plan_index(SENDS_FULL))
    predicted = float(found.planned.costs.uplink_bytes[0, found.choice.plan_index])
    assert found.answer.trace.uplink_bytes == pytest.approx(predicted, rel=0.2)


def test_warming_up_tells_the_cloud_nothing_of_the_user(recommender, user, monkeypatch):
    handled, handle = [], recommender.service.handle
    monkeypatch.setattr(
        recommender.service, "handle", lambda payload: handled.append(decode_request(payload).fields) or handle(payload)
    )
    monkeypatch.setattr(recommender, "_compiled", set())
    before = len(recommender._ledger.entries())
    found = recommender.recommend(user, plan=SENDS_FULL)
    assert found.executed_plan.name == SENDS_FULL
    (entry,) = recommender._ledger.entries()[before:]
    *warming, real = handled
    assert (entry.request_id, entry.sends) == (real.request_id, 1)
    own = set(recommender.history(user).items[0].tolist())
    assert warming and len(set(real.item_ids)) > 1 and set(real.item_ids) <= own
    assert {item for fields in warming for item in fields.item_ids} == {1}
    assert not any(fields.attributes or fields.semantic_embedding for fields in warming)
    assert all(fields.category_shares != real.category_shares for fields in warming)


def test_nothing_above_consent_leaves(recommender, user):
    found = recommender.recommend(user, plan=SENDS_FULL, consent="profile")
    assert found.choice.asked_for == SENDS_FULL
    assert found.plan.name == "fresh-profile-100-device"
    assert max(field.level for field in found.released) is EgressLevel.PROFILE
    assert "forbids" in printed(found)


def test_a_link_that_fails_leaves_the_device_to_answer(recommender, user):
    history = recommender.history(user)
    planned = recommender.planner.plan(history, Situation(link=Link.EDGE))
    failing = next(draw for draw in itertools.count() if recommender.planner.meet(planned, history.event_ids, draw).failed)
    found = recommender.recommend(user, link="edge", plan=SENDS_FULL, draw=failing)
    assert len(found.items) == 10
    assert "link_failed" in found.flags
    assert not found.executed_plan.uses_link
    assert found.uplink_bytes > 0
    assert found.downlink_bytes == 0
    assert [stage.name for stage in found.stages if stage.where == "link" and stage.actual] == ["no answer"]
    assert "the link failed" in printed(found)


def test_the_plan_is_the_one_with_the_best_terms_among_the_allowed(recommender, user):
    found = recommender.recommend(user, link="lte", consent="recent")
    history = recommender.history(user)
    planned = recommender.planner.plan(history, Situation(link=Link.LTE, consent=EgressLevel.RECENT))
    best = int(np.argmax(planned.logits[0]))
    assert found.plan == PLANS[best]
    assert planned.mask[0, best]
    decision = found.choice.decision
    assert decision.margin is not None and decision.margin >= 0
    logit_gap = np.sort(planned.logits[0])[-1] - np.sort(planned.logits[0])[-2]
    assert decision.margin / decision.tau == pytest.approx(logit_gap, abs=1e-2)


def test_the_same_request_gets_the_same_slate(recommender, user):
    first, second = (recommender.recommend(user, plan=SENDS_FULL, draw=1) for _ in range(2))
    assert first.items == second.items
    assert first.uplink_bytes == second.uplink_bytes


def test_expected_stages_end_when_the_cost_formula_says(recommender, user):
    planned = recommender.planner.plan(recommender.history(user), Situation(link=Link.THREE_G))
    state = recommender.state(recommender.history(user), planned)
    for index, plan in enumerate(PLANS):
        trace = recommender._execute(state, EgressLevel.FULL, recommender._ledger, request(plan), 10, False).trace
        stages = stages_of(planned, index, NO_DELAY, trace)
        ends = [stage.expected[1] for stage in stages if stage.expected]
        assert max(ends) == pytest.approx(float(planned.here.latency_ms[0, index]), rel=1e-4), plan.name
        # What was expected is what happened, but for reuse, which is no work.
        assert all((stage.expected is None) == (stage.actual is None) for stage in stages), plan.name


def request(plan):
    local = next(other for other in PLANS if other.name == "local-skip-skip")
    return Request(plan=plan, fallback=local, link=NO_DELAY, deadline_ms=60_000.0)


def test_actual_stages_fit_the_measured_latency(recommender, user):
    found = recommender.recommend(user, plan=SENDS_FULL, link="3g")
    actual = [stage.actual for stage in found.stages if stage.actual]
    assert min(start for start, _ in actual) == 0.0
    assert max(end for _, end in actual) <= found.latency_ms + 1.0
    # Most of the time goes by on the modelled link, and is not waited for.
    assert found.latency_ms > 150.0


def test_json_tells_everything(recommender, user):
    told = json.loads(recommender.recommend(user, plan="cloud-full-cloud", link="3g", k=3).to_json())
    assert [item["rank"] for item in told["slate"]] == [1, 2, 3]
    assert told["situation"]["link"] == "3g"
    assert told["plan"]["executed"] == "cloud-full-cloud"
    assert told["plan"]["chosen"]["utility"] == pytest.approx(
        sum(told["plan"]["chosen"][name] for name in ("quality", "time", "energy", "exposure"))
    )
    assert {"semantic", "structured", "retrieval", "ranking", "uplink", "downlink"} <= {
        stage["name"] for stage in told["time"]["stages"]
    }
    assert told["uplink"]["payload_bytes"] == sum(field["payload_bytes"] for field in told["uplink"]["fields"])
    assert told["time"]["link_times_are"] == "modelled, and added"


@pytest.mark.parametrize("width", [60, 80, 100])
def test_the_report_fits_its_columns_and_labels_its_numbers(recommender, user, width):
    found = recommender.recommend(user, plan="fresh-profile-500-device", link="edge")
    text = printed(found, width)
    assert max(map(len, text.splitlines())) <= width
    assert found.items[0].title in text
    names = next(line for line in text.splitlines() if line.startswith("terms of the logit"))
    assert width < 80 or "fresh-profile-500-device" in names
    assert all(f"{field.payload_bytes:,} " in text for field in found.released) and f"{found.downlink_bytes:,} " in text
    assert f"{found.latency_ms:.2f} " in text and "…" not in text.partition(" Time ")[2]
    assert "deployment (modelled)" in " ".join(text.split())
    assert "measured on this machine" in " ".join(text.split())
    assert "item_ids" not in text
    assert "category_shares" in text


def test_a_real_delay_is_waited_for(trained, user):
    with Recommender(trained, real_delay=True) as waiting:
        waiting.recommend(user, plan="fresh-recent-20-skip", link="lte")
        start_s = time.perf_counter()
        found = waiting.recommend(user, plan="fresh-recent-20-skip", link="lte")
        taken_ms = (time.perf_counter() - start_s) * 1e3
    link_ms = sum(stage.actual[1] - stage.actual[0] for stage in found.stages if stage.where == "link" and stage.actual)
    assert link_ms > 20.0
    assert taken_ms > link_ms
    assert "waited for" in json.loads(found.to_json())["time"]["link_times_are"]


def test_an_unknown_user_is_told_the_closest_ids(recommender, user):
    with pytest.raises(UserError, match=f"unknown user.*did you mean.*{user}"):
        recommender.recommend(user + "x")
    with pytest.raises(UserError, match="ids look like"):
        recommender.recommend("@@@@@@@@@@@@@@@@@@@@@@@")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"k": 100_000}, "asked for 100000 items of a catalogue of"),
        ({"k": 0}, "asked for 0 items"),
        ({"plan": "fresh"}, "unknown plan 'fresh'.*fresh-profile-20-device"),
        ({"link": "5g"}, "unknown link '5g'; expected one of wifi"),
        ({"consent": "all"}, "unknown consent"),
        ({"tier": "huge"}, "unknown device tier"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_does_not_fit_is_refused_with_what_would(recommender, user, wrong, message):
    with pytest.raises(UserError, match=message):
        recommender.recommend(user, **wrong)


def test_a_planner_that_tells_no_quality_is_shown_with_its_prices_and_its_logit(recommender, user):
    found = recommender.recommend(user, link="lte")
    decision = found.choice.decision
    silent = {
        "chosen": replace(decision.chosen, quality=None),
        "runner_up": replace(decision.runner_up, quality=None),
        "tau": None,
    }
    text = " ".join(printed(replace(found, choice=replace(found.choice, decision=replace(decision, **silent)))).split())
    assert "This planner tells no quality, so its logit cannot be taken apart" in text
    assert "price of time" in text and "logit, as the planner gives it" in text
    assert "expected quality" not in text and "utility = their sum" not in text


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
def test_every_plan_is_put_into_words(plan):
    words = in_words(plan, EgressLevel.RECENT)
    assert words.startswith("Nothing leaves") is not plan.uses_link
    assert ("the cloud ranks" in words) is (plan.ranking is Placement.CLOUD)
