"""What ``ScannIndex.search`` adds to ScaNN's own search: its checks, its conversions, and its padding."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from cda4rec_jax.errors import UserError
from cda4rec_jax.retrieval import ScannIndex
from cda4rec_jax.timing import Contestant, Measurement, TimingConfig, measure

ADAPTER, RAW = "ScannIndex.search", "searcher.search"
TIMING = TimingConfig()
TARGET_SINGLE_US, TARGET_SHARE = 10.0, 0.05  # at batch 1, and at batch 256


@dataclass(frozen=True, kw_only=True)
class AdapterOverhead:
    """Both at one batch size, in turns, with the same arguments, from NumPy to NumPy."""

    batch: int
    k: int
    measurement: Measurement

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


def adapter_overhead(
    index: ScannIndex,
    queries: Float[np.ndarray, "n d"],
    k: int,
    *,
    batches: Sequence[int] = (1, 256),
    timing: TimingConfig = TIMING,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[AdapterOverhead, ...]:
    """Time of ``index.search`` beside ScaNN's own search, one for each batch size.

    Raises:
      UserError: There are fewer queries than in the largest batch, or ``k`` does not fit.
    """
    rows = np.ascontiguousarray(queries, np.float32)
    if not batches or min(batches) < 1 or len(rows) < max(batches):
        raise UserError(f"got {len(rows)} queries for batches of {tuple(batches)}; expected at least as many as in each batch.")
    index.search(rows[:1], k)
    found = []
    for batch in batches:
        parts = [rows[start : start + batch] for start in range(0, len(rows) - batch + 1, batch)]
        call = index.scann_call(batch, k)
        inputs = [part[0] for part in parts] if batch == 1 else parts

        def raw(number: int, call=call, inputs=inputs) -> float:
            call(inputs[number % len(inputs)])
            return 1.0

        def adapter(number: int, parts=parts) -> float:
            index.search(parts[number % len(parts)], k)
            return 1.0

        contestants = (Contestant(name=ADAPTER, call=adapter), Contestant(name=RAW, call=raw))
        measurement = measure(contestants, [(ADAPTER, RAW)], timing, progress=progress)
        found.append(AdapterOverhead(batch=batch, k=k, measurement=measurement))
    return tuple(found)
