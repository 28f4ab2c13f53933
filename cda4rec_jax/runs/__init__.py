"""The run directory: the only writer and reader of what training leaves behind.

- ``RunDirectory``: one run on disk (configuration, checkpoints, weights, tables, metrics, results).
- ``Checkpoint``: what ``RunDirectory.restore_latest`` returns.
- ``FINISHED``: the file that a finished run has.
- ``provenance``: where a number comes from (data, commit, versions, hardware, time).
"""

from cda4rec_jax.runs.checkpoints import Checkpoint
from cda4rec_jax.runs.directory import FINISHED, RunDirectory
from cda4rec_jax.runs.provenance import provenance

__all__ = ["FINISHED", "Checkpoint", "RunDirectory", "provenance"]
