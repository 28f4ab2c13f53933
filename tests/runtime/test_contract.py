"""For every plan, the slate that cloud and device make over the wire is the slate that ``pipeline.outcomes`` says it makes."""

from copy import copy
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
from flax import nnx

from cda4rec_jax.agents.cloud import CloudConfig
from cda4rec_jax.agents.device import DeviceConfig
from cda4rec_jax.data.synthetic import SyntheticConfig, synthetic_world
from cda4rec_jax.data.text import TfidfSvd
from cda4rec_jax.messages import EgressLevel, Placement
from cda4rec_jax.nn import DecoderConfig
from cda4rec_jax.pipeline.catalogue import build_catalogue
from cda4rec_jax.pipeline.corpus import build_corpus
from cda4rec_jax.pipeline.outcomes import outcomes
from cda4rec_jax.pipeline.request import RequestFunctions
from cda4rec_jax.pipeline.system import System, SystemConfig
from cda4rec_jax.planner import OwnPlanner, PolicyConfig, fresh_plan
from cda4rec_jax.privacy.gate import Gate
from cda4rec_jax.privacy.ledger import Ledger
from cda4rec_jax.privacy.levels import UplinkFields
from cda4rec_jax.retrieval import ExactIndex
from cda4rec_jax.runtime import NO_DELAY, CloudService, DeviceClient, Executor, Request
from cda4rec_jax.runtime.models import cloud_functions, device_functions, device_state
from cda4rec_jax.runtime.wire import decode_reply, encode_reply, pack, unpack

K = 10
# The level and the age of each user's cache; the last age is the oldest that there may be.
CACHES = (
    (EgressLevel.PROFILE, 1),
    (EgressLevel.RECENT, 2),
    (EgressLevel.FULL, 4),
    (EgressLevel.FULL, 6),
    (EgressLevel.NOTHING, 0),
)


def decoder(width: int) -> DecoderConfig:
    return DecoderConfig(width=width, num_layers=1, num_heads=2, num_kv_heads=2, mlp_hidden=width, dropout_rate=0.1)


CONFIG = SystemConfig(
    cloud=CloudConfig(decoder=decoder(16), history_length=12),
    device=DeviceConfig(decoder=decoder(8), history_length=12),
    profile_events=20,
    max_cache_age=6,
    resident_items=150,  # more than a device finds by the embedding, fewer than there are
    planner=OwnPlanner.find("tests.planner.own_planner:Priced", PolicyConfig()),  # so that plans of a user's own are among them
)
PLANS = CONFIG.space.plans


@pytest.fixture(scope="module")
def shop() -> SimpleNamespace:
    """Untrained agents over a small world, everything that serves it, and the slates that outcomes promises."""
    world = synthetic_world(SyntheticConfig(num_users=60, num_items=200))
    corpus = build_corpus(world.interactions, TfidfSvd(dimensions=8))
    system = System(CONFIG, jnp.asarray(corpus.text), corpus.prefix_size, rngs=nnx.Rngs(0))
    assert system.device is not None
    # Young blocks are the identity, and a young head follows the cloud's score almost alone; these listen to everything.
    rngs = nnx.Rngs(2)
    for decoder in (system.cloud.decoder, system.device.decoder):
        nnx.update(decoder, jax.tree.map(lambda x: x + 0.2 * jax.random.normal(rngs(), x.shape), nnx.state(decoder, nnx.Param)))
    head = system.device.head
    head.linear[...] = jax.random.normal(jax.random.key(1), head.linear[...].shape)
    catalogue = build_catalogue(system.cloud, system.device, corpus.tables(corpus.statistics(), CONFIG.resident_items))
    lengths = np.diff(corpus.interactions.offsets)
    # The shortest and the longest past, and some between: fewer and more events than a model reads.
    users = np.argsort(lengths, kind="stable")[np.linspace(0, 59, len(CACHES)).astype(int)]
    history = corpus.histories(users, lengths[users], CONFIG.stored_events)
    graph, state = nnx.split(system)

    def answer(weights, shelves, past, level, age):
        merged = nnx.merge(graph, weights)
        assert merged.device is not None
        return outcomes(merged.cloud, merged.device, shelves, past, level, age, CONFIG, K).slates

    levels = np.asarray([int(level) for level, _ in CACHES], np.int32)
    ages = np.asarray([age for _, age in CACHES], np.float32)
    expected = np.asarray(jax.jit(answer)(state, catalogue, history, levels, ages))
    functions = RequestFunctions(system, catalogue, CONFIG, ExactIndex.build(catalogue.vectors))
    cloud = cloud_functions(functions, history.attributes.shape[1])
    states = []
    for row, (level, age) in enumerate(CACHES):
        own = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], history)
        states.append(device_state(functions, cloud, own, level, age))
    return SimpleNamespace(functions=functions, cloud=cloud, states=states, expected=expected, history=history)


def execute(shop: SimpleNamespace, row: int, plan, spoil=lambda reply: reply):
    def carry(payload: bytes) -> bytes:
        return encode_reply(spoil(decode_reply(service.handle(payload))))

    with CloudService(shop.cloud) as service:
        ledger = Ledger()
        client = DeviceClient(carry, Gate(EgressLevel.FULL, ledger))
        with Executor(device_functions(shop.functions, shop.states[row], K), client) as executor:
            fallback = PLANS[CONFIG.space.last_resort]
            answer = executor.execute(Request(plan=plan, fallback=fallback, link=NO_DELAY, deadline_ms=120_000.0))
        ledger.close()
    return answer


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
def test_the_executors_slate_is_the_slate_of_outcomes(shop, plan):
    index = PLANS.index(plan)
    for row, (level, _) in enumerate(CACHES):
        if plan.semantic is Placement.REUSE and level is EgressLevel.NOTHING:
            continue  # there is nothing to reuse, and no planner may choose it
        answer = execute(shop, row, plan)
        assert answer.trace.executed_plan == plan
        assert answer.trace.flags == ()
        np.testing.assert_array_equal(np.asarray(answer.slate.items[0]), shop.expected[row, index], f"user {row}")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda reply: msgspec.structs.replace(reply, items=pack(unpack(reply.items) + np.int32(10**6))),
        lambda reply: msgspec.structs.replace(reply, semantic=pack(unpack(reply.semantic)[:3])),
        lambda reply: msgspec.structs.replace(
            reply, evidence=reply.evidence | {"words": pack(unpack(reply.evidence["words"])[:, :1])}
        ),
    ],
    ids=["items", "semantic", "words"],
)
def test_a_reply_that_ranking_cannot_read_is_answered_locally(shop, spoil):
    answer = execute(shop, 2, fresh_plan(EgressLevel.FULL, 20, Placement.DEVICE), spoil)
    assert answer.trace.flags == ("cloud_failed",)
    index = CONFIG.space.last_resort
    assert answer.trace.executed_plan == PLANS[index]
    np.testing.assert_array_equal(np.asarray(answer.slate.items[0]), shop.expected[2, index])


def test_the_plans_differ(shop):
    """Otherwise the contract above would say little."""
    slates = {shop.expected[:, index].tobytes() for index in range(len(PLANS))}
    assert len(slates) > 20


def test_the_cloud_sends_the_records_of_items_that_no_device_holds(shop):
    items, _ = shop.cloud.retrieve(np.ones(shop.cloud.embedding_size, np.float32), 100)
    held = shop.functions.is_resident(items)
    assert 20 < held.sum() < 100 and shop.functions.is_resident(np.arange(201)).sum() == CONFIG.resident_items
    sent = shop.cloud.evidence(items, True)
    whole = shop.functions.evidence(items[~held])
    for name, rows in sent.items():
        np.testing.assert_array_equal(rows, getattr(whole, name))
    device, embedding = device_functions(shop.functions, shop.states[2], K), shop.states[2].embedding
    pool = device.complete(items, np.zeros(100, np.float32), sent, embedding)
    np.testing.assert_array_equal(pool.evidence["vectors"][~held], sent["vectors"])
    with pytest.raises(ValueError, match=f"expected {np.sum(~held)}"):
        device.complete(
            items, np.zeros(100, np.float32), shop.cloud.evidence(items[1:], True) | {"words": sent["words"][:1]}, embedding
        )


def test_slates_hold_nothing_that_the_user_has_seen(shop):
    for row in range(len(CACHES)):
        assert not set(shop.expected[row].ravel().tolist()) & set(shop.history.seen[row].tolist()) - {0}


def released(shop: SimpleNamespace, row: int, level: EgressLevel) -> UplinkFields:
    abstract = device_functions(shop.functions, shop.states[row], K).abstract(level)
    return UplinkFields(
        request_id="ab" * 16,
        deadline_unix_ms=4e12,
        level=level,
        num_candidates=20,
        category_shares=abstract.category_shares,
        length_bucket=abstract.length_bucket,
        item_ids=abstract.item_ids,
        attributes=abstract.attributes,
    )


@pytest.mark.parametrize("level", list(EgressLevel)[1:], ids=lambda level: level.name)
def test_the_cloud_reads_from_the_wire_what_the_device_wrote(shop, level):
    for row, state in enumerate(shop.states):
        written = shop.functions.abstract(state.history, level, 0)
        np.testing.assert_array_equal(
            shop.cloud.encode(released(shop, row, level)), np.asarray(shop.functions.semantic(written))[0]
        )


def test_cloud_and_device_model_the_same_structure_from_a_full_abstract(shop):
    for row, state in enumerate(shop.states):
        own = device_functions(shop.functions, state, K).structured()
        theirs = shop.cloud.structured(released(shop, row, EgressLevel.FULL))
        for leaf, other in zip(jax.tree.leaves(own), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_array_equal(leaf, other)


def test_a_device_whose_memory_ends_leaves_structured_modelling_out(shop):
    greedy = copy(shop.functions)
    greedy.structured = lambda *_: jnp.zeros(1 << 48)  # more than an address can name
    without = SimpleNamespace(functions=greedy, cloud=shop.cloud, states=shop.states)
    trace = execute(without, 2, fresh_plan(EgressLevel.FULL, 20, Placement.DEVICE)).trace
    assert (trace.executed_plan, trace.flags) == (fresh_plan(EgressLevel.FULL, 20, Placement.SKIP), ("device_exhausted",))


def test_other_errors_of_structured_modelling_are_raised(shop):
    def broken(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: broken")

    functions = copy(shop.functions)
    functions.structured = broken
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        device_functions(functions, shop.states[2], K).structured()


def test_an_embedding_that_is_not_kept_cannot_be_reused(shop):
    device = device_functions(shop.functions, shop.states[-1], K)
    assert device.cached_embedding() is None
    pool = device.cached_candidates(Placement.REUSE)
    assert pool.embedding is None and not pool.items.any()
    assert device.rank(pool, None)[0].all()


def test_places_that_an_index_left_empty_do_not_reach_the_slate(shop):
    items, scores = shop.cloud.retrieve(np.ones(shop.cloud.embedding_size, np.float32), 20)
    items, scores = items.copy(), scores.copy()
    items[-3:], scores[-3:] = 0, -np.inf
    fields = released(shop, 0, EgressLevel.FULL)
    ranked, final = shop.cloud.rank(items, scores, fields, shop.cloud.structured(fields))
    assert not np.isnan(final).any()
    assert set(ranked[-3:].tolist()) == {0}
    slate, values = device_functions(shop.functions, shop.states[0], 20).finish(ranked, final)
    assert np.array_equal(slate == 0, np.isneginf(values))
