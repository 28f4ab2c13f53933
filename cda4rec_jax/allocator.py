"""What the C library does with memory that a program frees.

XLA asks for the temporary memory of a program anew at every call. glibc maps large blocks apart from its heap and gives them back when they
are freed, and the system hands each out page by page and cleared: a fifth to a third of a training step on a CPU.
"""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # of malloc.h
_LARGEST_IN_HEAP = 32 * 2**20  # to which glibc raises the threshold for mapping by itself, as blocks are freed
_MAPPED_BLOCKS = 65_536  # glibc's default


def keep_freed_memory() -> bool:
    """Keep all memory in the heap, for the next who asks; False where the C library is not glibc."""
    library = _glibc()
    return library is not None and bool(library.mallopt(_M_MMAP_MAX, 0) and library.mallopt(_M_TRIM_THRESHOLD, -1))


def return_freed_memory() -> bool:
    """As glibc does by itself in a process that has run for a while, and give back what is free now; False without glibc."""
    library = _glibc()
    if library is None:
        return False
    settings = ((_M_MMAP_MAX, _MAPPED_BLOCKS), (_M_MMAP_THRESHOLD, _LARGEST_IN_HEAP), (_M_TRIM_THRESHOLD, 2 * _LARGEST_IN_HEAP))
    done = all([library.mallopt(*setting) for setting in settings])
    library.malloc_trim(0)
    return done


def _glibc() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "gnu_get_libc_version") else None
