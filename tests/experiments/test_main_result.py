"""The main result runs on a tiny run."""

import importlib.util
import json
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_main_result_stores_aggregates_as_json_and_markdown(tiny_run: Path, tmp_path: Path):
    spec = importlib.util.spec_from_file_location("main_result", ROOT / "experiments" / "main_result.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    report = script.main(run=run, out=tmp_path / "results")
    stored = json.loads((tmp_path / "results" / f"{report.dataset}.json").read_text())
    assert stored["split"] == "test"
    assert len(stored["planners"]) == 38
    assert "## Planners in contexts v1" in (tmp_path / "results" / f"{report.dataset}.md").read_text()
