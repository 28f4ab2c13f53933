"""One job of several processes (``jax.distributed``): who writes, and how all come to the same decision.

Every process runs the same program on the same data. Files are written by the first one alone, and what depends on a clock, a signal
or the rounding of one machine is told to the others. In a job of one process all of this does nothing.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from cda4rec_jax.errors import UserError

_T = TypeVar("_T")


def is_first() -> bool:
    """Whether this is the process that writes files and prints."""
    return jax.process_index() == 0


def any_process(*flags: bool) -> tuple[bool, ...]:
    """For each flag, whether it is set in any process."""
    if jax.process_count() == 1:
        return flags
    gathered = multihost_utils.process_allgather(np.asarray(flags, np.int32))
    return tuple(bool(flag) for flag in np.any(gathered, axis=0))


def from_first(values: Sequence[float]) -> list[float]:
    """The numbers of the first process, in float32; every process must give equally many."""
    if jax.process_count() == 1:
        return list(values)
    return [float(value) for value in tree_from_first(np.asarray(values, np.float32))]


def tree_from_first(tree: _T) -> _T:
    """The arrays of the first process; every process gives a tree of the same shapes."""
    return tree if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(tree)


def first_does(action: Callable[[], _T]) -> _T | None:
    """Let the first process do something and the others wait; its result there, None elsewhere.

    Raises:
        UserError: in the other processes, where the first one failed; that one raises its own error.
    """
    if jax.process_count() == 1:
        return action()
    result: _T | None = None
    error: BaseException | None = None
    if is_first():
        try:
            result = action()
        except BaseException as caught:  # the others must hear of it, or they wait for ever
            error = caught
    failed = any_process(error is not None)[0]
    if error is not None:
        raise error
    if failed:
        raise UserError("the first process of the job could not go on: its own message says why.")
    return result
