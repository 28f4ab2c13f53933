"""What is set once for a process."""

import subprocess
import sys

import pytest

# Faults of four fills of 64 MB after one that warms up: without the setting each maps and clears all of its pages anew.
PROGRAM = """
import resource, sys
import numpy as np
from cda4rec_jax.cli.process import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
np.ones(2**23)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    np.ones(2**23)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_memory_that_is_freed_is_kept_and_not_asked_for_again() -> None:
    faults = {}
    for what in ("keep", "return"):
        done = subprocess.run([sys.executable, "-c", PROGRAM, what], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        faults[what] = int(done.stdout)
    assert faults["keep"] < 100 < faults["return"]
