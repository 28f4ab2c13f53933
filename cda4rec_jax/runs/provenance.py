"""Where a number comes from."""

import datetime
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

from cda4rec_jax.processor import cpu_model, vector_instructions
from cda4rec_jax.timing import usable_cores

PACKAGES = ("cda4rec_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "scann", "numpy", "scikit-learn")


def provenance(*, dataset_fingerprint: str) -> dict[str, Any]:
    """What to store beside every result: data, code, versions, hardware and time, ready for JSON.

    ``dataset_fingerprint`` is ``Interactions.fingerprint``. ``commit`` is null outside a git checkout of this package; ``dirty``
    tells whether tracked files differed from it. ``cores`` counts the processors that this process may use.
    """
    return {
        "dataset_fingerprint": dataset_fingerprint,
        **_git_state(Path(__file__)),
        "versions": package_versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_model": cpu_model(),
        "vector_instructions": vector_instructions(),
        "cores": usable_cores(),
        "devices": [device.device_kind for device in jax.devices()],
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def package_versions() -> dict[str, str | None]:
    """Installed version of each package that a result may depend on; null for one that is not installed."""
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_state(file: Path) -> dict[str, Any]:
    """Commit of the checkout that tracks ``file``; an installed copy inside some other checkout is not tracked by it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}
