"""The clock of one request, and what the link does to it: measured work, plus delays that are slept or only counted."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax

from cda4rec_jax.links.virtual_clock import Realisation, downlink_ms, uplink_ms

Direction = Literal["up", "down"]

_uplink_ms = jax.jit(uplink_ms)
_downlink_ms = jax.jit(downlink_ms)


@dataclass(frozen=True, kw_only=True)
class LinkRealisation:
    """What one request meets on the link.

    Attributes:
        transfer_ms: time that so many bytes take in a direction.
        failed: nothing comes back.
        queue_ms: wait for the cloud model.
    """

    transfer_ms: Callable[[int, Direction], float]
    failed: bool = False
    queue_ms: float = 0.0


NO_DELAY = LinkRealisation(transfer_ms=lambda payload_bytes, direction: 0.0)


def realised_link(realisation: Realisation, row: int) -> LinkRealisation:
    """What request ``row`` of a batch meets, by the formulas of ``links.virtual_clock``."""
    one = jax.tree.map(lambda values: values[row : row + 1], realisation)

    def transfer_ms(payload_bytes: int, direction: Direction) -> float:
        function = _uplink_ms if direction == "up" else _downlink_ms
        return function(jax.numpy.full((1, 1), float(payload_bytes)), one).item()

    return LinkRealisation(transfer_ms=transfer_ms, failed=bool(one.failed[0]), queue_ms=float(one.queue_ms[0]))


class RequestClock:
    """Milliseconds since a request began, for one branch of its work.

    ``now = start + measured time + delays``. On a real clock a delay is slept, and so measured; on a virtual one it is added.
    Branches that run side by side are forks, each with delays of its own.

    Args:
        start_ms: reading at the moment of creation.
        real_delay: sleep delays.
    """

    def __init__(self, start_ms: float, real_delay: bool) -> None:
        self._origin_s = time.perf_counter() - start_ms / 1e3
        self._added_ms = 0.0
        self._real_delay = real_delay

    def now_ms(self) -> float:
        return (time.perf_counter() - self._origin_s) * 1e3 + self._added_ms

    def fork(self) -> "RequestClock":
        """A clock that reads the same now and goes on by itself."""
        other = RequestClock(0.0, self._real_delay)
        other._origin_s, other._added_ms = self._origin_s, self._added_ms
        return other

    def wait(self, delay_ms: Callable[..., float], *arguments: object) -> float:
        """Let the delay that the function gives pass, and return it. The time of computing it is part of it, not added to it."""
        start_s = time.perf_counter()
        total_ms = float(delay_ms(*arguments))
        rest_ms = total_ms - (time.perf_counter() - start_s) * 1e3
        if not self._real_delay:
            self._added_ms += rest_ms
        elif rest_ms > 0:
            time.sleep(rest_ms / 1e3)
        return total_ms

    def advance_to(self, moment_ms: float) -> None:
        """Wait until ``moment_ms``; nothing happens if it is over."""
        self.wait(lambda: max(0.0, moment_ms - self.now_ms()))
