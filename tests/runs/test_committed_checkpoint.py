"""The small run in checkpoints/ is read by this version: a change of format must not pass unseen."""

import json
from pathlib import Path

import numpy as np

from cda4rec_jax.runs.artifacts import load_trained
from cda4rec_jax.runtime.recommend import Recommender

FOLDER = Path(__file__).resolve().parents[2] / "checkpoints" / "synthetic-tiny"


def test_it_is_small():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) < 1_000_000


def test_it_names_no_path_of_the_machine_that_wrote_it():
    assert not list(FOLDER.rglob("commit_success.txt"))
    assert "out" not in json.loads((FOLDER / "data" / "metadata.json").read_text())["report"]


def test_it_recommends():
    trained = load_trained(FOLDER)
    user = trained.corpus.interactions.user_ids[0]
    with Recommender(trained) as recommender:
        found = recommender.recommend(user, link="wifi", consent="full", k=5)
    assert len(found.items) == 5
    scores = [item.score for item in found.items]
    assert np.all(np.diff(scores) <= 0)
