"""The small run in checkpoints/; that this version reads it and recommends from it is seen in ``test_readme``."""

import json
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "checkpoints" / "synthetic-tiny"


def test_it_is_small():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) < 1_000_000


def test_it_names_no_path_of_the_machine_that_wrote_it():
    assert not list(FOLDER.rglob("commit_success.txt"))
    assert "out" not in json.loads((FOLDER / "data" / "metadata.json").read_text())["report"]
