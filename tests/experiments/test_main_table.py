"""The main table runs on a tiny world."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

Scripts = Callable[[str], ModuleType]
ROOT = Path(__file__).resolve().parents[2]
SOURCE = "synthetic:users=300,items=150"  # that of `tiny_run`, whose programs are compiled already
SYSTEMS = ["cda4rec", "sasrec-ce", "ease"]


def test_main_table_compares_systems_and_goes_on_where_it_was(tiny_run: Path, scripts: Scripts, tmp_path: Path):
    # As if the table had been stopped after this training.
    shutil.copytree(tiny_run, tmp_path / "work" / "synthetic" / "cda4rec-0")
    work = {"work": tmp_path / "work", "out": tmp_path}
    flags = ["--data", SOURCE, "--preset", "tiny", "--seeds", "1", "--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    command = [
        sys.executable,
        str(ROOT / "experiments" / "main_table.py"),
        *flags,
        "--learning-rates",
        "4e-3",
        "--systems",
        *SYSTEMS,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "table-synthetic.json").read_text())
    rows = {row["system"]: row for row in table["rows"]}
    assert rows.keys() == {"cda4rec", "cda4rec, cloud agent alone", "cda4rec, fresh-full-100-device", "sasrec-ce", "ease"}
    assert all(rows[name]["minus_sasrec_ce"] for name in rows.keys() - {"sasrec-ce"})
    validation = {name: rows[name]["validation_ndcg@10"] for name in ("sasrec-ce", "ease")}
    assert table["best_baseline"] == max(validation, key=lambda name: validation[name])
    for name, row in rows.items():
        assert ("minus_best_baseline" in row) == name.startswith("cda4rec")
        for metric, found in row.get("minus_best_baseline", {}).items():
            apart = row["mean"][metric] - rows[table["best_baseline"]]["mean"][metric]
            assert (
                found["low"] <= found["mean_difference"] == pytest.approx(apart, abs=1e-6)
                and found["mean_difference"] <= found["high"]
            )
    for name in ("sasrec-ce", "ease"):
        apart = rows["cda4rec"]["mean"]["ndcg@10"] - rows[name]["mean"]["ndcg@10"]
        assert rows[name]["ours_minus_this"]["ndcg@10"]["mean_difference"] == pytest.approx(apart, abs=1e-6)
    assert f"minus `{table['best_baseline']}`" in (tmp_path / "table-synthetic.md").read_text()
    assert "| ease |" in (tmp_path / "table-synthetic.md").read_text() and (tmp_path / "table-synthetic.png").exists()
    chosen = rows["ease"]["setting"]
    tried = {path.stem for path in (tmp_path / "work" / "synthetic").glob("ease-0-*.npz")}
    assert (
        len(tried) == 12
        and f"ease-0-regularisation-{chosen['regularisation']:g}-history_decay-{chosen['history_decay']:g}" in tried
    )
    assert rows["sasrec-ce"]["setting"] == {"learning_rate": 4e-3} and rows["cda4rec"]["setting"] is None
    stored = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.npz")}
    again = {"preset_name": "tiny", "seeds": 1, **work}
    scripts("main_table").main(SOURCE, systems=("ease", "sasrec-ce"), learning_rates=(4e-3,), **again)
    assert len(stored) >= 5 and all(path.stat().st_mtime_ns == time for path, time in stored.items() if "data" not in path.parts)
    other = [*command[:2], "--data", "synthetic:users=120,items=100", *flags[2:], "--systems", "ease"]
    refused = subprocess.run(other, capture_output=True, text=True)
    assert refused.returncode == 2 and "other settings or data" in refused.stderr and "Traceback" not in refused.stderr


def test_a_baseline_tries_its_own_settings_with_every_learning_rate(scripts: Scripts) -> None:
    settings_of = scripts("main_table").settings_of
    assert settings_of("gru4rec", (1e-3, 2e-3)) == [{"learning_rate": 1e-3}, {"learning_rate": 2e-3}]
    assert settings_of("bert4rec", (2e-3,)) == [{"learning_rate": 2e-3, "mask_share": share} for share in (0.2, 0.4, 0.6)]
    assert len(settings_of("ease", (1e-3, 2e-3))) == 12 and settings_of("popularity", (1e-3,)) == [{}]
