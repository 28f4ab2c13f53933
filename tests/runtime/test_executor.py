"""One slate for every request, whatever happens; both branches at once; and nothing leaves but through the gate."""

import threading
import time
from collections.abc import Callable

import msgspec
import numpy as np
import pytest

from cda4rec_jax.errors import UserError
from cda4rec_jax.messages import EgressLevel, Placement, Plan, Subtask
from cda4rec_jax.planner.plan_space import PLANS
from cda4rec_jax.runtime import device_client
from cda4rec_jax.runtime.clock import LinkRealisation
from cda4rec_jax.runtime.executor import Prediction, Request
from cda4rec_jax.runtime.functions import AbstractData
from cda4rec_jax.runtime.wire import EVIDENCE_FIELDS, Tensor, decode_request, pack, unpack
from tests.runtime.fakes import CLOUD_FULL, NUM_ITEMS, REUSE, SEEN, K, Setting, finish, fresh, local, retrieve, sleeping
from tests.runtime.fakes import embedding_of as embedding

FAILED = LinkRealisation(transfer_ms=lambda payload_bytes, direction: 0.0, failed=True)


def slow_link(up_ms: float, down_ms: float, queue_ms: float = 0.0) -> LinkRealisation:
    return LinkRealisation(
        transfer_ms=lambda payload_bytes, direction: up_ms if direction == "up" else down_ms, queue_ms=queue_ms
    )


def span_of(trace, subtask):
    (span,) = [span for span in trace.spans if span.subtask is subtask]
    return span


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
def test_every_plan_gives_one_slate_without_seen_items(plan):
    with Setting() as setting:
        answer = setting.run(plan)
    assert answer.slate.items.shape == (1, K)
    assert not set(np.asarray(answer.slate.items[0]).tolist()) & set(SEEN)
    assert answer.trace.executed_plan == plan
    assert answer.trace.flags == ()
    assert bool(setting.sent) == plan.uses_link
    assert answer.trace.uplink_bytes == sum(map(len, setting.sent))
    subtasks = {span.subtask: span.placement for span in answer.trace.spans}
    assert subtasks[Subtask.RANKING] is plan.ranking
    assert subtasks[Subtask.RETRIEVAL] is plan.retrieval
    assert subtasks.get(Subtask.STRUCTURED, Placement.SKIP) is plan.structured
    assert subtasks.get(Subtask.SEMANTIC, Placement.SKIP) is plan.semantic
    assert answer.trace.latency_ms >= max(span.end_ms for span in answer.trace.spans)


def test_a_fresh_plan_ranks_what_the_cloud_retrieved_for_its_abstract():
    with Setting() as setting:
        answer = setting.run(fresh(EgressLevel.FULL))
        (pool,), (state,) = setting.device.pools, setting.device.states
    np.testing.assert_array_equal(pool.items, retrieve(embedding(3), 20)[0])
    assert set(pool.evidence) == EVIDENCE_FIELDS
    assert state == "device state"
    assert answer.embedding is not None and pool.embedding is answer.embedding
    np.testing.assert_array_equal(answer.embedding.values, embedding(3))
    assert (answer.embedding.level, answer.embedding.age_events) == (EgressLevel.FULL, 0)
    assert answer.pool is pool


def test_without_structured_modelling_only_popularity_travels():
    with Setting() as setting:
        setting.run(fresh(structured=Placement.SKIP))
        assert set(setting.device.pools[0].evidence) == {"log_popularity"}
        assert setting.device.states == [None]


def test_a_reusing_plan_sends_the_embedding_alone_at_the_level_it_was_made_from():
    with Setting() as setting:
        answer = setting.run(REUSE)
        fields = decode_request(setting.sent[0]).fields
        pool = setting.device.pools[0]
    assert fields.level is EgressLevel.RECENT
    assert fields.semantic_embedding == embedding(1).tobytes()
    assert (fields.item_ids, fields.category_shares, fields.length_bucket) == ((), (), None)
    assert pool.embedding is not None
    assert (pool.embedding.age_events, pool.embedding.level) == (6, EgressLevel.RECENT)
    assert answer.embedding is None


def test_a_list_ranked_in_the_cloud_is_finished_on_the_device():
    with Setting() as setting:
        answer = setting.run(CLOUD_FULL)
    items, scores = retrieve(embedding(3), 20)
    expected = finish(items[::-1], 10 - scores[::-1])
    np.testing.assert_array_equal(answer.slate.items[0], expected[0])
    np.testing.assert_allclose(answer.slate.scores[0], expected[1], rtol=1e-6)


def test_both_branches_run_at_the_same_time():
    both = threading.Barrier(2, timeout=20)

    def meet(result):
        def work(*_):
            both.wait()  # returns only if the other branch is in here too
            time.sleep(0.02)
            return result

        return work

    with Setting(cloud={"encode": meet(embedding(2))}, device={"structured": meet("state")}) as setting:
        trace = setting.run(fresh()).trace
    semantic, structured = span_of(trace, Subtask.SEMANTIC), span_of(trace, Subtask.STRUCTURED)
    assert max(semantic.start_ms, structured.start_ms) < min(semantic.end_ms, structured.end_ms)
    assert span_of(trace, Subtask.RANKING).start_ms >= max(semantic.end_ms, structured.end_ms)


def test_one_after_the_other_the_branches_do_not_overlap():
    slow = {"cloud": {"encode": sleeping(embedding(2))}, "device": {"structured": sleeping("state")}}
    with Setting(concurrent=False, **slow) as setting:
        trace = setting.run(fresh()).trace
    assert span_of(trace, Subtask.STRUCTURED).start_ms >= span_of(trace, Subtask.SEMANTIC).end_ms


def test_virtual_delays_are_counted_and_not_slept():
    with Setting() as setting:
        start_s = time.perf_counter()
        trace = setting.run(fresh(), link=slow_link(3000.0, 4000.0, 500.0), planning_ms=2.0).trace
        elapsed_ms = (time.perf_counter() - start_s) * 1e3
    assert elapsed_ms < 3000
    assert trace.latency_ms >= 7502
    assert span_of(trace, Subtask.SEMANTIC).start_ms >= 3502
    assert span_of(trace, Subtask.STRUCTURED).end_ms < 3000
    assert span_of(trace, Subtask.PLANNING).end_ms == 2.0


def test_real_delays_are_slept_while_structured_modelling_runs():
    with Setting(real_delay=True) as setting:
        start_s = time.perf_counter()
        trace = setting.run(fresh(), link=slow_link(30, 30)).trace
        elapsed_ms = (time.perf_counter() - start_s) * 1e3
    assert elapsed_ms >= 60
    assert 60 <= trace.latency_ms <= elapsed_ms


def test_a_failed_link_is_answered_locally_after_the_timeout():
    with Setting(failure_timeout_ms=400.0) as setting:
        answer = setting.run(fresh(), fallback=local(Placement.REUSE), link=FAILED)
    assert answer.slate.items.shape == (1, K)
    assert answer.trace.flags == ("link_failed",)
    assert answer.trace.executed_plan == local(Placement.REUSE)
    assert span_of(answer.trace, Subtask.RANKING).start_ms >= 400
    # What was sent has left, though nothing came back.
    assert answer.trace.uplink_bytes > 0
    assert answer.trace.downlink_bytes == 0
    assert setting.device.states == ["device state"]
    assert answer.embedding is None


@pytest.mark.parametrize("failure", [b"noise", ConnectionError("reset"), "wrong request"])
def test_a_cloud_that_talks_nonsense_is_answered_locally(failure):
    def wrap(handle):
        def carry(payload):
            if isinstance(failure, Exception):
                raise failure
            if isinstance(failure, bytes):
                return failure
            reply = msgspec.msgpack.decode(handle(payload))
            return msgspec.msgpack.encode({**reply, "request_id": "cd" * 16})

        return carry

    with Setting(wrap=wrap) as setting:
        answer = setting.run(fresh())
    assert answer.trace.flags == ("link_failed" if isinstance(failure, Exception) else "cloud_failed",)
    assert answer.trace.executed_plan == local()


def test_a_reply_that_breaks_the_parser_is_answered_locally(monkeypatch: pytest.MonkeyPatch):
    def decode(*_):
        raise RuntimeError("a fault of the parser")

    monkeypatch.setattr(device_client, "decode_reply", decode)
    with Setting() as setting:
        answer = setting.run(fresh())
    assert answer.trace.flags == ("cloud_failed",) and answer.trace.executed_plan == local()


def without_embedding(reply: dict) -> dict:
    return {**reply, "semantic": None}


def with_fewer_records(reply: dict) -> dict:
    def shorter(tensor: dict) -> dict:
        rows, *width = tensor["shape"]
        return {**tensor, "shape": [rows - 1, *width], "data": tensor["data"][: len(tensor["data"]) * (rows - 1) // rows]}

    return {**reply, "evidence": {name: shorter(tensor) for name, tensor in reply["evidence"].items()}}


def changed(field: str, change) -> Callable[[dict], dict]:
    """Spoils an array of a reply."""
    return lambda reply: {**reply, field: msgspec.to_builtins(pack(change(told(reply[field]))), builtin_types=(bytes,))}


def told(tensor: dict) -> np.ndarray:
    return unpack(msgspec.convert(tensor, Tensor)).copy()


def with_record(name: str, change) -> Callable[[dict], dict]:
    return lambda reply: {**reply, "evidence": changed(name, change)(reply["evidence"])}


def at_first(value: float):
    def change(array: np.ndarray) -> np.ndarray:
        array[0] = value
        return array

    return change


def with_times(reply: dict) -> dict:
    return {**reply, "times": dict.fromkeys(reply["times"], float("inf"))}


def with_one_candidate_less(reply: dict) -> dict:
    return with_fewer_records(changed("scores", lambda scores: scores[:-1])(changed("items", lambda items: items[:-1])(reply)))


SPOILT = {
    "no embedding": (fresh(), without_embedding),
    "too few records": (fresh(), with_fewer_records),
    "too few candidates": (fresh(), with_one_candidate_less),
    "unknown item": (fresh(), changed("items", at_first(10**6))),
    "item above the last": (fresh(), changed("items", at_first(NUM_ITEMS + 1))),
    "unknown item ranked by the cloud": (CLOUD_FULL, changed("items", at_first(10**6))),
    "unknown item for a reused embedding": (REUSE, changed("items", at_first(10**6))),
    "infinite score": (fresh(), changed("scores", at_first(np.inf))),
    "no score": (CLOUD_FULL, changed("scores", at_first(-np.inf))),
    "huge score": (fresh(), changed("scores", at_first(3e38))),
    "narrow embedding": (fresh(), changed("semantic", lambda embedding: embedding[:3])),
    "narrow embedding of a ranked list": (CLOUD_FULL, changed("semantic", lambda embedding: embedding[:3])),
    "embedding of no numbers": (fresh(), changed("semantic", at_first(np.nan))),
    "huge embedding": (fresh(), changed("semantic", at_first(3e38))),
    "narrow records": (fresh(), with_record("vectors", lambda rows: rows[:, :3])),
    "flat records": (fresh(), with_record("words", lambda rows: rows[:, 0])),
    "records of another type": (fresh(), with_record("vectors", lambda rows: rows.astype(np.int32))),
    "records of no numbers": (fresh(), with_record("vector_scales", at_first(np.nan))),
    "no popularity": (fresh(structured=Placement.SKIP), with_record("log_popularity", at_first(np.inf))),
    "endless times": (fresh(), with_times),
}


@pytest.mark.parametrize(("plan", "spoil"), SPOILT.values(), ids=SPOILT.keys())
def test_a_reply_that_the_device_cannot_use_is_answered_locally(plan: Plan, spoil: Callable[[dict], dict]):
    def wrap(handle):
        return lambda payload: msgspec.msgpack.encode(spoil(msgspec.msgpack.decode(handle(payload))))

    with Setting(wrap=wrap) as setting:
        answer = setting.run(plan)
    assert answer.trace.flags == ("cloud_failed",) and answer.trace.executed_plan == local()


def test_a_resend_is_the_same_bytes_one_release_and_two_sends():
    failures = iter([True, False])

    def wrap(handle):
        def carry(payload):
            if next(failures):
                raise ConnectionResetError("reset")
            return handle(payload)

        return carry

    with Setting(wrap=wrap) as setting:
        answer = setting.run(fresh())
        (entry,) = setting.ledger.entries()
    assert answer.trace.executed_plan == fresh()
    assert len(setting.sent) == 2
    assert setting.sent[0] == setting.sent[1]
    assert entry.sends == 2
    assert answer.trace.uplink_bytes == 2 * len(setting.sent[0])


def test_a_plan_above_the_consent_sends_nothing_and_is_answered_locally():
    with Setting(consent=EgressLevel.PROFILE) as setting:
        answer = setting.run(fresh(EgressLevel.RECENT))
        assert setting.ledger.entries() == []
    assert setting.sent == []
    assert answer.trace.flags == ("egress_denied",)
    assert answer.trace.uplink_bytes == 0


def test_consent_revoked_between_release_and_resend_stops_the_resend():
    setting = Setting(wrap=lambda handle: lambda payload: revoke_and_fail(payload))

    def revoke_and_fail(payload):
        setting.gate.revoke()
        raise ConnectionResetError("reset")

    with setting:
        answer = setting.run(fresh())
        assert [entry.sends for entry in setting.ledger.entries()] == [1]
    assert len(setting.sent) == 1
    assert answer.trace.flags == ("egress_denied",)


def test_consent_revoked_while_the_abstract_is_made_holds():
    setting = Setting(device={"abstract": lambda level: revoke_and_tell(level)})

    def revoke_and_tell(level):
        setting.gate.revoke()
        return setting.device.abstract(level)

    with setting:
        answer = setting.run(fresh())
    assert setting.sent == []
    assert answer.trace.flags == ("egress_denied",)


@pytest.mark.parametrize("level", [EgressLevel.PROFILE, EgressLevel.RECENT])
def test_a_device_that_abstracts_too_much_sends_no_canary(level):
    canary = 0x5AFE_CA1D
    abstract = AbstractData(category_shares=((1, 15),), length_bucket=2, item_ids=(canary,) * 11, attributes=(0x7A7A,))
    with Setting(device={"abstract": lambda _: abstract}) as setting:
        answer = setting.run(fresh(level))
    assert not any(canary.to_bytes(4, "big") in payload for payload in setting.sent)
    assert setting.sent == []
    assert answer.slate.items.shape == (1, K)


def test_an_embedding_that_was_dropped_since_planning_is_answered_locally():
    with Setting(cached_level=None) as setting:
        answer = setting.run(REUSE)
    assert answer.trace.flags == ("cache_missing",)
    assert setting.sent == []


def test_a_cloud_that_is_late_on_the_virtual_clock_is_hedged_before_the_deadline():
    with Setting(local_p99_ms=500.0) as setting:
        answer = setting.run(fresh(), link=slow_link(2000, 2000), deadline_ms=3000.0)
    assert answer.trace.flags == ("deadline_hedged",)
    assert 2500 <= answer.trace.latency_ms < 3000
    assert answer.trace.executed_plan == local()
    assert all(span.end_ms <= answer.trace.latency_ms for span in answer.trace.spans)


def test_a_cloud_that_hangs_is_hedged_and_what_it_says_later_is_dropped():
    release = threading.Event()
    with Setting(local_p99_ms=100.0, cloud={"encode": sleeping(embedding(2), release)}) as setting:
        answer = setting.run(fresh(), deadline_ms=1000.0)
        release.set()
    assert answer.trace.flags == ("deadline_hedged",)
    assert len(setting.device.pools) == 1
    assert answer.trace.latency_ms >= 900


def test_nothing_is_sent_once_the_device_has_answered_alone():
    release = threading.Event()
    finished = threading.Event()

    def abstract(level):
        release.wait(timeout=20)
        finished.set()
        return AbstractData(category_shares=(), length_bucket=0, item_ids=(), attributes=())

    with Setting(local_p99_ms=100.0, device={"abstract": abstract}) as setting:
        answer = setting.run(fresh(), deadline_ms=250.0)
        release.set()
        assert finished.wait(timeout=20)
        setting.executor._pool.shutdown(wait=True)
        assert setting.sent == []
    assert answer.trace.uplink_bytes == 0


def test_structured_modelling_that_hangs_is_left_out():
    release = threading.Event()
    with Setting(local_p99_ms=100.0, device={"structured": sleeping("late", release)}) as setting:
        answer = setting.run(fresh(), deadline_ms=1500.0)
        release.set()
    assert answer.trace.executed_plan == fresh(structured=Placement.SKIP)
    assert answer.trace.flags == ("device_exhausted",)  # what is ranked came from the cloud
    assert setting.device.states == [None]


def test_structured_modelling_waits_for_its_own_time_and_not_for_the_links():
    # On the virtual clock the link takes all but 100 ms of the time there is; structured modelling beside it fits.
    slow = {"structured": sleeping("state", seconds=0.3)}
    with Setting(local_p99_ms=100.0, device=slow) as setting:
        answer = setting.run(fresh(), link=slow_link(4400, 4400), deadline_ms=9000.0)
    assert answer.trace.executed_plan == fresh()
    assert setting.device.states == ["state"]


def test_a_fallback_that_needs_structured_modelling_starts_it():
    with Setting() as setting:
        answer = setting.run(CLOUD_FULL, fallback=local(), link=FAILED)
    assert setting.device.states == ["device state"]
    assert span_of(answer.trace, Subtask.STRUCTURED).start_ms >= 500


def test_a_deadline_that_even_the_local_plan_would_miss_is_refused_at_once():
    with Setting(local_p99_ms=50.0) as setting, pytest.raises(UserError, match="later deadline"):
        setting.run(fresh(), deadline_ms=40.0)
    assert setting.sent == []


def test_a_fallback_must_be_local():
    with pytest.raises(ValueError, match="expected a local plan"):
        Request(plan=fresh(), fallback=fresh(), link=FAILED)


def test_failures_of_the_device_are_raised_and_not_hidden():
    def fail():
        raise RuntimeError("broken model")

    with Setting(device={"structured": fail}) as setting, pytest.raises(RuntimeError, match="broken model"):
        setting.run(fresh())


def predicted(**changed) -> Prediction:
    """A prediction that nothing exceeds, with changes."""
    return Prediction(**{"subtask_ms": dict.fromkeys(Subtask, 1e6), "link_ms": 1e6, "latency_ms": 1e6, **changed})


def test_surprises_are_flagged_against_the_prediction():
    prediction = predicted(subtask_ms={Subtask.STRUCTURED: 1e6}, link_ms=10.0, latency_ms=10.0)
    with Setting() as setting:
        trace = setting.run(fresh(), link=slow_link(500, 500), prediction=prediction).trace
    assert trace.flags == ("context_shift",)
    assert trace.predicted_ms == 10.0
    assert span_of(trace, Subtask.STRUCTURED).predicted_ms == 1e6
    with Setting() as setting:
        assert setting.run(fresh(), link=slow_link(500, 500), prediction=predicted(link_ms=1000.0)).trace.flags == ()


def test_a_slow_cloud_shifts_the_context_and_does_not_exhaust_the_device():
    prediction = predicted(subtask_ms=dict.fromkeys(Subtask, 1e6) | {Subtask.SEMANTIC: 1.0, Subtask.RETRIEVAL: 1.0})
    with Setting(cloud={"encode": sleeping(embedding(2))}) as setting:
        assert setting.run(fresh(), prediction=prediction).trace.flags == ("context_shift",)


def test_a_slow_device_is_exhausted_and_does_not_shift_the_context():
    prediction = predicted(subtask_ms=dict.fromkeys(Subtask, 1.0) | {Subtask.SEMANTIC: 1e6})
    with Setting(device={"structured": sleeping("state")}) as setting:
        assert setting.run(fresh(), prediction=prediction).trace.flags == ("device_exhausted",)


@pytest.mark.parametrize(("regret", "flags"), [(0.49, ()), (0.51, ("regret_high",))])
def test_a_plan_that_gives_away_half_a_quality_gap_is_a_poor_choice(regret: float, flags: tuple[str, ...]):
    with Setting() as setting:
        assert setting.run(fresh(), prediction=predicted(regret=regret)).trace.flags == flags


def test_structured_modelling_without_memory_is_left_out():
    def fail():
        raise MemoryError

    with Setting(device={"structured": fail}) as setting:
        answer = setting.run(fresh())
    assert answer.slate.items.shape == (1, K)
    assert answer.trace.flags == ("device_exhausted",)
    assert answer.trace.executed_plan == fresh(structured=Placement.SKIP)
    assert setting.device.states == [None]


def test_many_requests_at_once_get_their_own_answers():
    with Setting(workers=16) as setting:
        answers = []
        threads = [threading.Thread(target=lambda: answers.append(setting.run(fresh()))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
        assert len(setting.ledger.entries()) == 8
    assert len(answers) == 8
    assert len({tuple(np.asarray(answer.slate.items[0]).tolist()) for answer in answers}) == 1
