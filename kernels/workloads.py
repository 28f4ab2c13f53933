"""What ``bench.py`` of a kernel gives: ``workloads(backend)``, one workload at a time, which ``cda4rec bench kernels`` measures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jax import Array

PLAIN = "plain jax"  # what one would write without the kernel


@dataclass(frozen=True, kw_only=True)
class DevicePeer:
    """What another library offers on an accelerator, over its own copies of the inputs there.

    Attributes:
        start: queues one call, on the batch of a number in rotation, and gives its output, which may not be there yet.
        wait: until all that was queued is done.
        result: an output in the form in which a program gives it, as NumPy arrays.
        tolerance: of the difference of its outputs, where that is not the workload's.
    """

    start: Callable[[int], Any]
    wait: Callable[[], None]
    result: Callable[[Any], Any]
    tolerance: float | None = None


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One operation on inputs of one shape.

    Attributes:
        kernel: name of the kernel's folder.
        name: of the workload, unique within the kernel.
        shapes: the inputs in words.
        constants: arrays that every call gets first, such as a table of items.
        batches: further arrays of a call; all of one shape, and calls take them in turns.
        programs: implementations by name: functions of ``(*constants, *batch)`` that ``jax.jit`` takes.
        baseline: whose outputs all others must give, and to which the times of all are held.
        peers: what others offer on the CPU: functions of a batch as NumPy arrays that return what a program returns.
        device_peers: what others offer on the accelerator.
        left_out: peers that are not measured here, and why.
        flops: floating-point operations of the products that the result needs, nothing computed twice.
        bytes_moved: inputs read once and outputs written once.
        dtype: of the operands of the products.
        difference: how far an output is from that of the baseline.
        tolerance: of it, for an output to count as the same.
    """

    kernel: str
    name: str
    shapes: str
    constants: tuple[Array, ...] = ()
    batches: Sequence[tuple[Array, ...]]
    programs: Mapping[str, Callable[..., Any]]
    baseline: str = PLAIN
    peers: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    device_peers: Mapping[str, DevicePeer] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    flops: float
    bytes_moved: float
    dtype: str
    difference: Callable[[Any, Any], float]
    tolerance: float
