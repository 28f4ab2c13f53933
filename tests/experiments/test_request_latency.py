"""The latency benchmark runs on a tiny run."""

import importlib.util
import json
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).resolve().parents[2]


def test_request_latency_stores_percentiles_and_the_gain_of_concurrency(tiny_run: Path, tmp_path: Path):
    spec = importlib.util.spec_from_file_location("request_latency", ROOT / "experiments" / "request_latency.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    table = script.main(run=tiny_run, requests=3, rounds=2, users=4, out=tmp_path)
    (stored,) = tmp_path.glob("request-latency-*.json")
    result = json.loads(stored.read_text())
    assert set(script.FAMILIES) < set(result["latency"])
    assert all(summary["count"] == 3 and summary["p50_ms"] > 0 for summary in result["latency"].values())
    assert result["speedup"]["sequential_ms"] > result["speedup"]["concurrent_ms"]
    assert {"commit", "versions", "dataset_fingerprint"} <= set(result["provenance"])
    console = Console(width=100, record=True, quiet=True)
    console.print(table)
    assert table.row_count == len(result["latency"]) + 2
