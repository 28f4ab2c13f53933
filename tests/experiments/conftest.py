"""A folder of trained tiny systems as the experiments keep them, and the scripts as modules."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = "synthetic:users=300,items=150"  # that of `tiny_run`


@pytest.fixture(scope="session")
def scripts() -> Callable[[str], ModuleType]:
    """``scripts("staleness")``: the experiment as a module."""
    import importlib
    import sys

    sys.path.insert(0, str(ROOT / "experiments"))
    return importlib.import_module


@pytest.fixture(scope="session")
def work(tiny_run: Path, tiny_baseline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``--work`` with all that experiments would train on the tiny world; the run stands in for the one without text too."""
    folder = tmp_path_factory.mktemp("experiments") / "synthetic"
    for run, name in ((tiny_run, "cda4rec"), (tiny_run, "cda4rec-without-text"), (tiny_baseline, "sasrec-ce")):
        shutil.copytree(run, folder / f"{name}-0")
    return folder.parent


@pytest.fixture
def refits(scripts: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What experiments ask of ``refit_deciders``, which copies the run instead: tests/training/test_refit.py trains one in earnest."""
    asked = []

    def copy(path: Path, out: Path, *, overwrite: bool, **arguments: Any) -> None:
        asked.append({"path": path, "out": out, **arguments})
        shutil.copytree(path, out, dirs_exist_ok=overwrite)

    for name in ("joint_vs_separate", "contributions", "replay"):
        monkeypatch.setattr(scripts(name), "refit_deciders", copy)
    return asked


@pytest.fixture
def options(scripts: Callable[[str], ModuleType], work: Path, tmp_path: Path) -> Any:
    """The options of every experiment on the tiny world; results go to ``tmp_path``."""
    return scripts("harness").Options(data=SOURCE, preset_name="tiny", work=work, out=tmp_path, users=100)
