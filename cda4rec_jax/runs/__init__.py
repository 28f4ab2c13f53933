"""The run directory: the only writer and reader of what training leaves behind.

- ``RunDirectory``: one run on disk (configuration, checkpoints, weights, tables, metrics, results).
- ``Checkpoint``: what ``RunDirectory.restore_latest`` returns.
- ``FINISHED``: the file that a finished run has.
- ``KEPT_FILES``: those of a run that no report may replace.
- ``provenance``: where a number comes from (data, commit, versions, hardware, time).
"""

from cda4rec_jax.runs.checkpoints import Checkpoint
from cda4rec_jax.runs.directory import FINISHED, KEPT_FILES, RunDirectory
from cda4rec_jax.runs.provenance import provenance

__all__ = ["FINISHED", "KEPT_FILES", "Checkpoint", "RunDirectory", "provenance"]
