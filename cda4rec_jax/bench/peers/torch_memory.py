"""Memory of a stretch of PyTorch code. Needs the extra ``bench``."""

from types import TracebackType

import numpy as np
import torch  # pyright: ignore[reportMissingImports]


class MemoryProfile:
    """A context manager: most memory that tensors held at a time inside of it, beyond what was there before, by torch's profiler."""

    def __init__(self) -> None:
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self) -> "MemoryProfile":
        self._profile.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._profile.__exit__(kind, error, trace)

    def peak_bytes(self) -> int:
        """The highest running sum of what was allocated less what was freed."""
        events = [event for event in self._profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        return int(np.max(np.cumsum(sizes), initial=0))
