"""A cloud and a device without models, and a transport that records every byte."""

import threading
import time
from dataclasses import replace

import numpy as np

from cda4rec_jax.messages import EgressLevel, Placement, Plan
from cda4rec_jax.privacy.gate import Gate
from cda4rec_jax.privacy.ledger import Ledger
from cda4rec_jax.runtime.clock import NO_DELAY
from cda4rec_jax.runtime.cloud_service import CloudService
from cda4rec_jax.runtime.device_client import DeviceClient
from cda4rec_jax.runtime.executor import Executor, ExecutorConfig, Request
from cda4rec_jax.runtime.functions import AbstractData, CachedEmbedding, CandidatePool, CloudFunctions, DeviceFunctions
from cda4rec_jax.runtime.wire import EVIDENCE_FIELDS

NUM_ITEMS = 40
WIDTH = 4
K = 5
SEEN = (3, 4)
TABLE = np.random.default_rng(0).normal(size=(NUM_ITEMS + 1, WIDTH)).astype(np.float32)


def plan(semantic, retrieval, level, structured, ranking, num_candidates=20) -> Plan:
    return Plan(
        semantic=semantic,
        retrieval=retrieval,
        level=level,
        num_candidates=num_candidates,
        structured=structured,
        ranking=ranking,
    )


def fresh(level=EgressLevel.RECENT, structured=Placement.DEVICE, num_candidates=20) -> Plan:
    return plan(Placement.CLOUD, Placement.CLOUD, level, structured, Placement.DEVICE, num_candidates)


def local(semantic=Placement.SKIP, structured=Placement.DEVICE) -> Plan:
    return plan(semantic, Placement.DEVICE_CACHE, EgressLevel.NOTHING, structured, Placement.DEVICE)


REUSE = plan(Placement.REUSE, Placement.CLOUD, EgressLevel.NOTHING, Placement.DEVICE, Placement.DEVICE)
CLOUD_FULL = plan(Placement.CLOUD, Placement.CLOUD, EgressLevel.FULL, Placement.CLOUD, Placement.CLOUD)


def evidence_of(items, whole=True):
    rows = {"log_popularity": (items / NUM_ITEMS).astype(np.float32)}
    if whole:
        rows["vectors"] = (TABLE[items] * 20).astype(np.int8)
        rows["vector_scales"] = np.full(len(items), 0.05, np.float32)
        others = EVIDENCE_FIELDS - set(rows)
        rows |= {name: np.zeros((len(items), 2), np.uint8) for name in sorted(others)}
    return rows


def embedding_of(num_ids: int) -> np.ndarray:
    return np.linspace(-1, 1, WIDTH, dtype=np.float32) * (1 + num_ids)


def retrieve(embedding, num_candidates):
    scores = TABLE @ embedding
    scores[0] = -np.inf
    items = np.argsort(-scores, kind="stable")[:num_candidates].astype(np.int32)
    return items, scores[items]


def finish(items, scores):
    kept = ~np.isin(items, SEEN)
    items, scores = items[kept][:K], scores[kept][:K]
    return items, scores


def cloud_functions(**overrides) -> CloudFunctions:
    functions = {
        "num_items": NUM_ITEMS,
        "embedding_size": WIDTH,
        "encode": lambda fields: embedding_of(len(fields.item_ids)),
        "retrieve": retrieve,
        "evidence": evidence_of,
        "structured": lambda fields: 10.0,
        "rank": lambda items, scores, fields, structured: (items[::-1], -scores[::-1] + (structured or 0.0)),
    }
    return CloudFunctions(**{**functions, **overrides})


class FakeDevice:
    """Functions of one user's device, and what they were called with."""

    def __init__(self, cached_level: EgressLevel | None = EgressLevel.RECENT) -> None:
        self.pools: list[CandidatePool] = []
        self.states: list[object] = []
        self.cached_level = cached_level

    def abstract(self, level: EgressLevel) -> AbstractData:
        return AbstractData(
            category_shares=((1, 15), (2, 7)),
            length_bucket=2,
            item_ids={EgressLevel.PROFILE: (), EgressLevel.RECENT: (7, 9), EgressLevel.FULL: (5, 7, 9)}[level],
            attributes=(1,) if level is EgressLevel.FULL else (),
        )

    def cached_embedding(self) -> CachedEmbedding | None:
        if self.cached_level is None:
            return None
        return CachedEmbedding(values=embedding_of(1), level=self.cached_level, age_events=6)

    def cached_candidates(self, semantic: Placement) -> CandidatePool:
        items = np.arange(1, 11, dtype=np.int32)
        kept = CachedEmbedding(values=embedding_of(1), level=EgressLevel.RECENT, age_events=6)
        pool = self.complete(items, np.linspace(1, 0, 10, dtype=np.float32), evidence_of(items), kept)
        return replace(pool, by_semantics=semantic is Placement.REUSE)

    def complete(self, items, scores, evidence, embedding: CachedEmbedding | None) -> CandidatePool:
        """As on a device that holds no records of its own."""
        if any(len(rows) != len(items) for rows in evidence.values()):
            raise ValueError("records are missing")
        return CandidatePool(items=items, scores=scores, evidence=evidence, embedding=embedding)

    def rank(self, pool: CandidatePool, structured: object):
        self.pools.append(pool)
        self.states.append(structured)
        scores = pool.scores if pool.by_semantics else np.zeros_like(pool.scores)
        order = np.argsort(-(scores + pool.evidence["log_popularity"]), kind="stable")
        return finish(pool.items[order], pool.scores[order])

    def functions(self, **overrides) -> DeviceFunctions:
        functions = {
            "num_items": NUM_ITEMS,
            "embedding_size": WIDTH,
            "no_records": evidence_of(np.zeros(0, np.int32)),
            "abstract": self.abstract,
            "structured": lambda: "device state",
            "cached_embedding": self.cached_embedding,
            "cached_candidates": self.cached_candidates,
            "complete": self.complete,
            "rank": self.rank,
            "finish": finish,
        }
        return DeviceFunctions(**{**functions, **overrides})


class Setting:
    """A device and a cloud joined by a recorded transport; close it."""

    def __init__(
        self,
        *,
        consent=EgressLevel.FULL,
        cloud=None,
        device=None,
        wrap=None,
        cached_level: EgressLevel | None = EgressLevel.RECENT,
        **config,
    ):
        self.device = FakeDevice(cached_level)
        self.ledger = Ledger()
        self.gate = Gate(consent, self.ledger)
        self.sent: list[bytes] = []
        self.service = CloudService(cloud_functions(**(cloud or {})))
        self._answer = wrap(self.service.handle) if wrap else self.service.handle
        self.executor = Executor(
            self.device.functions(**(device or {})), DeviceClient(self._carry, self.gate), ExecutorConfig(**config)
        )

    def _carry(self, payload: bytes) -> bytes:
        self.sent.append(payload)
        return self._answer(payload)

    def run(self, wanted: Plan, *, fallback: Plan | None = None, link=NO_DELAY, **more):
        return self.executor.execute(Request(plan=wanted, fallback=fallback or local(), link=link, **more))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.executor.close()
        self.service.close()
        self.ledger.close()


def sleeping(result, event: threading.Event | None = None, seconds: float = 0.05):
    """A function of any arguments that takes its time."""

    def work(*_):
        if event is None:
            time.sleep(seconds)
        else:
            event.wait(timeout=20)
        return result

    return work
