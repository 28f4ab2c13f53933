"""Provenance tells where a number comes from, in plain JSON."""

import json
import shutil
import subprocess
from pathlib import Path

from cda4rec_jax.runs import provenance
from cda4rec_jax.runs.provenance import _git_state


def test_provenance_names_data_versions_and_hardware_in_plain_json() -> None:
    found = provenance(dataset_fingerprint="abc")
    assert json.loads(json.dumps(found)) == found
    assert found["dataset_fingerprint"] == "abc"
    assert found["versions"]["jax"] and found["versions"]["numpy"]
    assert found["cores"] >= 1 and len(found["devices"]) == 2
    assert found["cpu_model"] and found["time"].endswith("+00:00")


def test_commit_is_that_of_the_checkout_that_tracks_the_file(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    tracked, copy = tmp_path / "tracked.py", tmp_path / "installed.py"
    tracked.write_text("1")
    assert _git_state(tracked) == {"commit": None, "dirty": None}
    git("init")
    git("add", "tracked.py")
    git("commit", "-m", "one")
    assert _git_state(tracked) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    tracked.write_text("2")
    assert _git_state(tracked)["dirty"] is True
    shutil.copy(tracked, copy)
    assert _git_state(copy) == {"commit": None, "dirty": None}
