"""What the C library does with memory that is freed."""

import subprocess
import sys

import pytest

# Faults of four fills of 64 MB after one that warms up: where memory is given back, each maps and clears all of its pages anew.
PROGRAM = """
import resource, sys
import numpy as np
from cda4rec_jax.allocator import keep_freed_memory, return_freed_memory
for what in sys.argv[1].split():
    assert {"keep": keep_freed_memory, "return": return_freed_memory}[what]()
np.ones(2**23)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    np.ones(2**23)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_freed_memory_is_kept_or_returned_as_was_said_last() -> None:
    faults = {}
    for what in ("keep", "keep return", "return keep", ""):
        done = subprocess.run([sys.executable, "-c", PROGRAM, what], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        faults[what] = int(done.stdout)
    assert max(faults["keep"], faults["return keep"]) < 100 < min(faults["keep return"], faults[""])
