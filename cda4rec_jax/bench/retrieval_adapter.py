"""What ``ScannIndex.search`` adds to ScaNN's own search: its checks, its conversions, and its padding."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from cda4rec_jax.bench.harness import OtherLoad, measurement_json
from cda4rec_jax.bench.retrieval_systems import version_of
from cda4rec_jax.bench.systems import measure_calls
from cda4rec_jax.errors import UserError
from cda4rec_jax.metrics.system import LatencySummary
from cda4rec_jax.retrieval import ScannIndex
from cda4rec_jax.timing import Contestant, Measurement, TimingConfig, usable_cores

ADAPTER, RAW = "ScannIndex.search", "searcher.search"
TARGET_SINGLE_US, TARGET_SHARE, TARGET_BATCH = 10.0, 0.05, 256  # for one query, and of a batch of so many


@dataclass(frozen=True, kw_only=True)
class AdapterOverhead:
    """Both at one batch size, in turns, with the same arguments, from NumPy to NumPy."""

    batch: int
    k: int
    measurement: Measurement
    latency: dict[str, LatencySummary]  # of single calls, in the rounds
    others: OtherLoad

    @property
    def raw_us(self) -> float:
        """Median time of a call of ScaNN's searcher."""
        return 1e6 / self.measurement.rates[RAW].median

    @property
    def share(self) -> float:
        """Time added, for one of ScaNN's own: median of the rounds."""
        return 1.0 / self.measurement.ratio(ADAPTER, RAW).median - 1.0

    @property
    def added_us(self) -> float:
        """Time added to one call."""
        return self.share * self.raw_us

    def line(self) -> str:
        """In words, beside what we want."""
        aim = {1: f" (aim: at most {TARGET_SINGLE_US:g} us)", TARGET_BATCH: f" (aim: at most {TARGET_SHARE:.0%})"}.get(
            self.batch, ""
        )
        return f"our index adds {self.added_us:.1f} us to the {self.raw_us:,.1f} us of ScaNN's own search, {self.share:.1%}{aim}"

    def json(self) -> dict[str, Any]:
        """Ready for JSON."""
        told = {"batch": self.batch, "raw_us": self.raw_us, "added_us": self.added_us, "share": self.share}
        aims = {"target_single_us": TARGET_SINGLE_US, "target_share": TARGET_SHARE, "target_batch": TARGET_BATCH}
        calls = {name: asdict(latency) for name, latency in self.latency.items()}
        origin = {"threads": usable_cores(), "version": version_of(None), "latency": calls}
        return {**told, **aims, **origin, "measurement": measurement_json(self.measurement, self.others)}


def adapter_overhead(
    index: ScannIndex, queries: Float[np.ndarray, "n d"], k: int, batch: int, *, timing: TimingConfig
) -> AdapterOverhead:
    """Time of ``index.search`` beside ScaNN's own search, on batches of the queries.

    Raises:
      UserError: There are fewer queries than in a batch, or ``k`` does not fit.
    """
    rows = np.ascontiguousarray(queries, np.float32)
    if batch < 1 or len(rows) < batch:
        raise UserError(f"got {len(rows)} queries for batches of {batch}; expected at least as many as in a batch.")
    index.search(rows[:1], k)
    parts = [rows[start : start + batch] for start in range(0, len(rows) - batch + 1, batch)]
    call = index.scann_call(batch, k)
    inputs = [part[0] for part in parts] if batch == 1 else parts

    def raw(number: int) -> float:
        call(inputs[number % len(inputs)])
        return 1.0

    def adapter(number: int) -> float:
        index.search(parts[number % len(parts)], k)
        return 1.0

    contestants = (Contestant(name=ADAPTER, call=adapter), Contestant(name=RAW, call=raw))
    with OtherLoad() as others:
        measurement, latency = measure_calls(contestants, [(ADAPTER, RAW)], timing)
    return AdapterOverhead(batch=batch, k=k, measurement=measurement, latency=latency, others=others)
