"""Choosing an index by catalogue size, batch, recall and backend, from times that were measured.

``times_BACKEND.json`` beside this module (of a CPU one for each kind of vector instructions, on which the order of the ways depends)
holds the times of a call of each index at some catalogue sizes and batches, on vectors without clusters, with the settings that reached a
recall there; the command ``MEASURE`` writes such a file, to be copied here. Between measured sizes and batches, the logarithm of the time
is linear in their logarithms. Above the largest size what scans all items takes longer in proportion to them, and what searches a tree by
the power of the size by which it grew between the two largest sizes, at most in proportion; above the largest batch all take longer in
proportion to it; below the smallest size or batch the nearest one counts. The reason says so, calls recall at such a size not measured,
and names the points at which the machine was not quiet.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np

from cda4rec_jax.errors import UserError
from cda4rec_jax.kernels.topk_dot.native import native_problem
from cda4rec_jax.processor import vector_instructions
from cda4rec_jax.retrieval.partitioned import PartitionedConfig
from cda4rec_jax.retrieval.scann import ScannConfig, scann_available

# Ways to search, the simplest first; the second is the first without a compiler.
Way = Literal["exact", "exact by XLA", "quantised", "scann", "partitioned"]
LEAST_GAIN = 1.1  # how many times as fast a way must be to be chosen over a simpler one
TREES: tuple[Way, ...] = ("scann", "partitioned")  # search a part of the items; the others scan all, and find all
PLAIN = "AVX2"  # stands for instructions under which nothing has been measured
RECALL = 0.99  # that an index is chosen for where nothing is said
# Around 16,384 items ScaNN begins to use a partition, so both sides are measured.
MEASURE = "cda4rec bench retrieval --items --no-exact --sizes --crossover 1000 16000 17000 65000 300000 --rounds 5"


@dataclass(frozen=True, kw_only=True)
class IndexTime:
    """One way to search one catalogue."""

    way: Way
    num_items: int
    recall: float  # wanted, and reached; 1 of exact search
    call_ms: tuple[float, ...]  # for each batch of the table
    leaf_share: float | None = None  # of the leaves searched; None where there is no partition
    reordered: int | None = None  # items that ScaNN scores exactly; None where it scores all so


@dataclass(frozen=True, kw_only=True)
class IndexTimes:
    """What was measured on one backend."""

    backend: str
    instructions: str | None  # vector instructions of a CPU
    width: int
    k: int
    batches: tuple[int, ...]
    rows: tuple[IndexTime, ...]
    provenance: Mapping[str, Any]
    disturbed: tuple[tuple[int, int], ...] = ()  # items and batch of the points at which the machine was not quiet

    @property
    def sizes(self) -> list[int]:
        return sorted({row.num_items for row in self.rows})

    def save(self, folder: Path) -> Path:
        """Write ``times_BACKEND.json`` or ``times_cpu_INSTRUCTIONS.json``, one row a line."""
        rows = [json.dumps({name: value for name, value in asdict(row).items() if value is not None}) for row in self.rows]
        told = {name: value for name, value in vars(self).items() if name != "rows"}
        path = folder / _file_name(self.backend, self.instructions)
        lines = ",\n  ".join(rows)
        path.write_text(f'{json.dumps(told, indent=1)[:-2]},\n "rows": [\n  {lines}\n ]\n}}\n', encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: Path) -> "IndexTimes":
        """What ``save`` wrote."""
        told = json.loads(path.read_text(encoding="utf-8"))
        rows = tuple(IndexTime(**{**row, "call_ms": tuple(row["call_ms"])}) for row in told.pop("rows"))
        disturbed = tuple(tuple(point) for point in told["disturbed"])
        return cls(**{**told, "batches": tuple(told["batches"]), "disturbed": disturbed, "rows": rows})


@dataclass(frozen=True, kw_only=True)
class Choice:
    """An index, and why."""

    implementation: Literal["exact", "quantised", "scann", "partitioned"]
    config: ScannConfig | PartitionedConfig | None  # of the last two, with the settings that reached the recall when measured
    reason: str
    missing: tuple[str, ...] = ()  # what cannot be had here, and was left out


@functools.cache
def measured_times(backend: str) -> IndexTimes | None:
    """The times on one of JAX's backends, on a CPU those of its vector instructions or else of plain ones; None where there are none."""
    kinds = (vector_instructions(), PLAIN) if backend == "cpu" else (None,)
    paths = (Path(__file__).with_name(_file_name(backend, kind)) for kind in kinds)
    return next((IndexTimes.load(path) for path in paths if path.is_file()), None)


def _file_name(backend: str, instructions: str | None) -> str:
    return f"times_{backend}{f'_{instructions.lower()}' if instructions else ''}.json"


def choose_index(num_items: int, *, batch: int = 1, recall: float = RECALL, backend: str | None = None) -> Choice:
    """The fastest index of those that can be had here and reach a recall; of those that are nearly as fast, the simplest.

    On a backend without measurements all items are scored exactly. Indices over several devices and over files are never chosen: they
    are for catalogues that one device or the memory cannot hold.

    Args:
        num_items: size of the catalogue.
        batch: queries of one call.
        recall: least share of the exact items to find; what approximate search reached on vectors without clusters, its hardest case.
        backend: ``cpu``, ``gpu`` or ``tpu``; the one at hand by default.

    Raises:
      UserError: A size or a batch below 1, or a recall that is not above 0 and at most 1.
    """
    if num_items < 1 or batch < 1 or not 0.0 < recall <= 1.0:
        raise UserError(
            f"got {num_items} items, batch {batch} and recall {recall:g}; expected at least 1 item, at least 1 query, and a recall above "
            "0 and at most 1."
        )
    backend = backend or jax.default_backend()
    times = measured_times(backend)
    if times is None:
        reason = f"exact: nothing has been measured on {backend}, and scoring all items finds them all ({MEASURE!r} measures)"
        return Choice(implementation="exact", config=None, reason=reason)
    missing = _missing(backend)
    offers = [
        offer
        for way in get_args(Way)
        if way not in missing and (offer := _offer(times, way, num_items, batch, recall)) is not None
    ]
    fastest = min(offers, key=lambda offer: offer.call_ms)
    chosen = next(offer for offer in offers if offer.call_ms < LEAST_GAIN * fastest.call_ms)
    told = tuple(why for why in missing.values() if why)
    return Choice(
        implementation="exact" if chosen.way == "exact by XLA" else chosen.way,
        config=chosen.config(times.k),
        reason=_reason(times, chosen, offers, num_items, batch, recall, told),
        missing=told,
    )


@dataclass(frozen=True, kw_only=True)
class _Offer:
    """One way to search the catalogue at hand."""

    way: Way
    call_ms: float
    leaf_share: float | None
    reordered: int | None

    def config(self, k: int) -> ScannConfig | PartitionedConfig | None:
        """Settings of the index, if it has any."""
        if self.way == "partitioned":
            return PartitionedConfig(exact_items=0, leaf_share=self.leaf_share or 1.0)
        if self.way != "scann" or self.reordered is None:
            return ScannConfig() if self.way == "scann" else None
        return ScannConfig(leaf_share=self.leaf_share or 1.0, reorder_factor=self.reordered / k, min_reorder=self.reordered)


def _missing(backend: str) -> dict[Way, str]:
    """Ways to search that cannot be had here, and why; an empty reason where nothing is lost."""
    missing: dict[Way, str] = {}
    if not scann_available():
        missing["scann"] = "ScaNN is not installed (it exists for Linux with Python below 3.14)"
    problem = native_problem() if backend == "cpu" else None
    if problem is None:
        missing["exact by XLA"] = ""
    else:
        missing["quantised"] = f"search by 8-bit codes cannot be had ({problem})"
        missing["exact"] = "exact search by compiled code cannot be had either, and runs on XLA"
    return missing


def _offer(times: IndexTimes, way: Way, num_items: int, batch: int, recall: float) -> _Offer | None:
    """What a way takes, from the measured sizes below and above; None where it did not reach the recall on both."""
    around = []
    for size in _around(times.sizes, num_items):
        row = _measured(times, way, size, recall)
        if row is None:
            return None
        around.append(row)
    logs = [_log_ms(times, row, batch) for row in around]
    log_ms = np.interp(np.log(num_items), [np.log(row.num_items) for row in around], logs)
    if num_items > times.sizes[-1]:
        log_ms += _power(times, around[0], batch, recall) * np.log(num_items / times.sizes[-1])
    return _Offer(
        way=way,
        call_ms=float(np.exp(log_ms)),
        leaf_share=max((row.leaf_share for row in around if row.leaf_share is not None), default=None),
        reordered=max((row.reordered for row in around if row.reordered is not None), default=None),
    )


def _measured(times: IndexTimes, way: Way, size: int, recall: float) -> IndexTime | None:
    """The row of the least recall that is enough; None where it was not reached."""
    rows = [row for row in times.rows if (row.way, row.num_items) == (way, size) and row.recall >= recall]
    return min(rows, key=lambda row: row.recall, default=None)


def _log_ms(times: IndexTimes, row: IndexTime, batch: int) -> float:
    """Logarithm of a call's time, above the largest batch in proportion to it."""
    beyond = max(0.0, float(np.log(batch / times.batches[-1])))
    return beyond + float(np.interp(np.log(batch), np.log(times.batches), np.log(row.call_ms)))


def _power(times: IndexTimes, largest: IndexTime, batch: int, recall: float) -> float:
    """Of the size, with which the time of a way grows above the largest size: 1 unless a tree was searched at the size before, too."""
    before = _measured(times, largest.way, times.sizes[-2], recall) if len(times.sizes) > 1 else None
    if largest.way not in TREES or before is None or before.leaf_share is None or largest.leaf_share is None:
        return 1.0
    growth = _log_ms(times, largest, batch) - _log_ms(times, before, batch)
    return min(1.0, max(0.0, growth / float(np.log(largest.num_items / before.num_items))))


def _around(measured: Sequence[int], wanted: int) -> list[int]:
    """The nearest measured sizes or batches, below and above; one where just what is wanted was measured, or it lies beyond all."""
    below, above = [one for one in measured if one <= wanted], [one for one in measured if one >= wanted]
    return sorted({*below[-1:], *above[:1]})


def _reason(
    times: IndexTimes, chosen: _Offer, offers: Sequence[_Offer], num_items: int, batch: int, recall: float, missing: Sequence[str]
) -> str:
    others = sorted((offer for offer in offers if offer is not chosen), key=lambda offer: offer.call_ms)
    around = _around(times.sizes, num_items)
    sizes = " and ".join(f"{size:,}" for size in around) + " items"
    is_measured = times.sizes[0] <= num_items <= times.sizes[-1]
    found = f"at a recall@{times.k} of {recall:g}"
    if num_items < times.sizes[0]:
        sizes += ", the nearest size, whose times these are"
    elif not is_measured:
        sizes += ", the largest size, from which times were extrapolated: of scans in proportion to the items"
        grown = f" and of trees by their growth from {times.sizes[-2]:,} items on" if len(times.sizes) > 1 else ""
        sizes += grown if any(offer.way in TREES for offer in offers) else ""
    if not is_measured and chosen.way in TREES:
        found = f"with its recall@{times.k} not measured there, but {recall:g} at {around[0]:,} items"
    points = [(size, each) for size in around for each in _around(times.batches, batch)]
    disturbed = " and ".join(f"{each:,} of {size:,}" for size, each in points if (size, each) in times.disturbed)
    devices = times.provenance["devices"]
    machine = f"{len(devices)} {devices[0]}"
    if times.backend == "cpu":
        here = vector_instructions()
        machine = f"{times.provenance['cores']} cores with {times.instructions}"
        machine += f", while this machine has {here}" if here != times.instructions else ""
    queries = "one query" if batch == 1 else f"{batch:,} queries"
    parts = [
        f"{chosen.way}: about {_number(chosen.call_ms)} ms for {queries} over {num_items:,} items, {found}",
        *([", ".join(f"{offer.way} {_number(offer.call_ms)} ms" for offer in others)] if others else []),
        *([f"none is {LEAST_GAIN} times as fast"] if others and others[0].call_ms < chosen.call_ms else []),
        f"measured on {times.backend} ({machine}), width {times.width}, at {sizes}",
        *(
            [f"the largest batch measured is {times.batches[-1]:,}, and the time in proportion"]
            if batch > times.batches[-1]
            else []
        ),
        *([f"the machine was not quiet for {disturbed} items"] if disturbed else []),
        *missing,
    ]
    return "; ".join(parts)


def _number(milliseconds: float) -> str:
    return f"{milliseconds:.3g}" if milliseconds < 100.0 else f"{milliseconds:,.0f}"
