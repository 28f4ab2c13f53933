"""Requests whose user withdraws consent in the middle, for ``forbidden_plans.py``: a device and a cloud without models, and real threads.

Gate, ledger, wire, device client and executor are those that serve. The transport counts what it gets.
"""

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from cda4rec_jax.messages import EgressLevel, Placement, Plan
from cda4rec_jax.planner import PLANS, plan_index
from cda4rec_jax.privacy.gate import Gate
from cda4rec_jax.privacy.ledger import Ledger
from cda4rec_jax.runtime import (
    NO_DELAY,
    Answer,
    CloudFunctions,
    CloudService,
    DeviceClient,
    DeviceFunctions,
    Executor,
    ExecutorConfig,
    Request,
)
from cda4rec_jax.runtime.functions import AbstractData, CachedEmbedding, CandidatePool, EvidenceRows
from cda4rec_jax.runtime.wire import EVIDENCE_FIELDS, decode_request

MOMENTS = {
    "abstract": "while the device makes what is to leave",
    "beside": "by another thread, while structured modelling runs beside the cloud branch",
    "cloud": "while the cloud works; the same request comes again afterwards",
    "resend": "after the first send was reset, before it is sent again",
    "hedge": "after the local hedge has answered, before anything was sent",
    "late reset": "after the local hedge has answered a cloud that hangs, whose connection then resets",
}
NUM_ITEMS, WIDTH, SLATE = 40, 4, 5
HEDGE_MS = 40.0  # from which on the device answers alone
PATIENCE_S = 30.0
CACHED = EgressLevel.RECENT
LAST_RESORT = PLANS[plan_index("local-skip-skip")]


@dataclass(kw_only=True)
class Trial:
    """One user's request, its moment, and what left; a hook at each place where consent can go."""

    moment: str
    gate: Gate
    left: EgressLevel  # what is still consented to after the withdrawal
    carry: Callable[[bytes], bytes]  # to the cloud and back
    bytes_before: int = 0
    bytes_after: int = 0
    sends: int = 0
    withdrawn: threading.Event = field(default_factory=threading.Event)
    answered: threading.Event = field(default_factory=threading.Event)

    def withdraw(self) -> None:
        if not self.withdrawn.is_set():
            self.gate.revoke(self.left)
            self.withdrawn.set()

    def prepare(self) -> None:
        """The device makes what is to leave."""
        if self.moment == "abstract":
            self.withdraw()
        if self.moment == "beside":
            self.withdrawn.wait(PATIENCE_S)
        if self.moment == "hedge":
            self.answered.wait(PATIENCE_S)

    def structured(self) -> str:
        if self.moment == "beside":
            self.withdraw()
        return "device state"

    def transport(self, payload: bytes) -> bytes:
        self.sends += 1
        if decode_request(payload).fields.level > self.gate.consent:
            self.bytes_after += len(payload)
        else:
            self.bytes_before += len(payload)
        if self.moment == "resend" and self.sends == 1:
            self.withdraw()
            raise ConnectionResetError("reset")
        if self.moment == "late reset" and self.sends == 1:
            self.answered.wait(PATIENCE_S)
            raise ConnectionResetError("reset")
        if self.moment == "cloud":
            self.withdraw()
        return self.carry(payload)


def _table() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((NUM_ITEMS + 1, WIDTH)).astype(np.float32)


def _evidence(items: np.ndarray, whole: bool = True) -> dict[str, np.ndarray]:
    names = EVIDENCE_FIELDS if whole else {"log_popularity"}
    kinds = {"log_popularity": np.zeros(len(items), np.float32), "vector_scales": np.ones(len(items), np.float32)}
    return {name: kinds.get(name, np.zeros((len(items), 2), np.uint8)) for name in names}


def cloud() -> CloudService:
    """A cloud that retrieves from random vectors."""
    table = _table()

    def retrieve(embedding: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        scores = table[1:] @ embedding
        items = np.argsort(-scores, kind="stable")[:count].astype(np.int32) + 1
        return items, scores[items - 1]

    return CloudService(
        CloudFunctions(
            num_items=NUM_ITEMS,
            embedding_size=WIDTH,
            encode=lambda fields: np.full(WIDTH, 1.0 + len(fields.item_ids), np.float32),
            retrieve=retrieve,
            evidence=_evidence,
            structured=lambda fields: 1.0,
            rank=lambda items, scores, fields, structured: (items, scores),
        )
    )


def _device(trial: Trial) -> DeviceFunctions:
    items = np.arange(1, 11, dtype=np.int32)

    def pool(items: np.ndarray, scores: np.ndarray, evidence: EvidenceRows, embedding: CachedEmbedding | None) -> CandidatePool:
        return CandidatePool(items=items, scores=scores, evidence=evidence, embedding=embedding)

    def abstract(level: EgressLevel) -> AbstractData:
        trial.prepare()
        ids = {EgressLevel.PROFILE: (), EgressLevel.RECENT: (7, 9), EgressLevel.FULL: (5, 7, 9)}[level]
        return AbstractData(
            category_shares=((1, 15),), length_bucket=2, item_ids=ids, attributes=(1,) if level is EgressLevel.FULL else ()
        )

    def cached() -> CachedEmbedding:
        trial.prepare()
        return CachedEmbedding(values=np.ones(WIDTH, np.float32), level=CACHED, age_events=3)

    return DeviceFunctions(
        num_items=NUM_ITEMS,
        embedding_size=WIDTH,
        no_records=_evidence(np.zeros(0, np.int32)),
        abstract=abstract,
        structured=trial.structured,
        cached_embedding=cached,
        cached_candidates=lambda semantic: pool(items, np.zeros(10, np.float32), _evidence(items), None),
        complete=pool,
        rank=lambda pool, structured: (pool.items[:SLATE], pool.scores[:SLATE]),
        finish=lambda items, scores: (items[:SLATE], scores[:SLATE]),
    )


def run_trial(plan: Plan, moment: str, left: EgressLevel, service: CloudService) -> tuple[Trial, list[Answer]]:
    """Run one request (twice for "cloud") from full consent on, and wait until no thread of it is left."""
    ledger = Ledger()
    gate = Gate(EgressLevel.FULL, ledger)
    trial = Trial(moment=moment, gate=gate, left=left, carry=service.handle)
    hedged = moment in ("hedge", "late reset")
    request = {"plan": plan, "fallback": LAST_RESORT, "link": NO_DELAY}
    config = ExecutorConfig(local_p99_ms=10.0)
    with Executor(_device(trial), DeviceClient(trial.transport, gate), config) as executor:
        deadline_ms = config.local_p99_ms + (HEDGE_MS if hedged else 1e3 * PATIENCE_S)
        answers = [executor.execute(Request(**request, deadline_ms=deadline_ms))]
        if hedged:
            trial.withdraw()
            trial.answered.set()
        if moment == "cloud":
            answers.append(executor.execute(Request(**request, deadline_ms=deadline_ms)))
    for thread in threading.enumerate():
        if thread.name.startswith("request"):
            thread.join(PATIENCE_S)
    ledger.close()
    return trial, answers


def executed_requests(count: int, seed: int, console: Console) -> dict[str, dict[str, Any]]:
    """``count`` requests over the moments in turn, under plans that use the link in random order."""
    draws = np.random.default_rng(seed)
    plans = [plan for plan in PLANS if plan.uses_link]
    fields = ("requests", "withdrawn", "bytes_before", "bytes_after", "without_slate")
    found: dict[str, Counter[str]] = {moment: Counter(dict.fromkeys(fields, 0)) for moment in MOMENTS}
    service = cloud()
    with Progress(console=console, disable=not console.is_terminal) as progress:
        for number in progress.track(range(count), description="withdrawing"):
            moment = list(MOMENTS)[number % len(MOMENTS)]
            fitting = [plan for plan in plans if moment != "beside" or plan.structured is Placement.DEVICE]
            plan = fitting[draws.integers(len(fitting))]
            left = EgressLevel(int(draws.integers(plan.egress_level(CACHED))))
            trial, answers = run_trial(plan, moment, left, service)
            found[moment].update(
                requests=len(answers),
                withdrawn=int(trial.withdrawn.is_set()),
                bytes_before=trial.bytes_before,
                bytes_after=trial.bytes_after,
                without_slate=sum(not np.any(np.asarray(answer.slate.items) > 0) for answer in answers),
            )
    service.close()
    return {moment: dict(counts) for moment, counts in found.items()}
