"""Experiments that train further systems, on tiny worlds."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from cda4rec_jax.data import load_prepared, prepare
from cda4rec_jax.data.text_vectors import TextVectors, save_text_vectors, text_hashes
from cda4rec_jax.errors import UserError
from cda4rec_jax.runs import RunDirectory

Scripts = Callable[[str], ModuleType]


def test_separate_deciders_get_the_steps_of_the_joint_ones(
    scripts: Scripts,
    options: Any,
    refits: list[dict[str, Any]],
    tiny_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(scripts("joint_vs_separate"), "DRAWS", 1)
    scripts("joint_vs_separate").main(options)
    result = json.loads((tmp_path / "joint-vs-separate-synthetic.json").read_text())
    for found in result["measures"].values():
        for arm in ("separate", "final-phase-only"):
            assert found[f"joint_minus_{arm}"]["mean"] == pytest.approx(found["joint"]["mean"] - found[arm]["mean"])
    assert "policy_utility" in result["measures"] and "no difference is shown" in result["verdict"]  # the stand-ins are copies
    assert result["verdict"] in (tmp_path / "joint-vs-separate-synthetic.md").read_text()
    steps = max(row["step"] for row in RunDirectory.open(tiny_run).metrics() if row["phase"] == "joint")
    asked = {one["out"].name: one for one in refits}
    assert asked["separate-0"]["practice_steps"] == steps == result["decider_steps"]["beside_the_trunks"]
    assert all(one["path"].name == "cda4rec-0" for one in refits)


@pytest.fixture(scope="session")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "other"
    prepare("synthetic:seed=3,users=60,items=80", folder)
    return folder


def test_a_model_of_text_transfers_to_a_catalogue_that_it_has_not_seen(
    scripts: Scripts, options: Any, small_world: Path, tmp_path: Path
):
    source = options.data
    result = scripts("transfer").main(replace(options, data=str(small_world)), target=source)
    assert (result["source"], result["dataset"]) == ("synthetic", "synthetic") and result["num_items"] > 80
    found = result["ndcg@10"]
    transferred = found["systems"]["text only, trained on the source"]["mean"]
    for name, difference in found["transferred_minus"].items():
        assert difference["mean"] == pytest.approx(transferred - found["systems"][name]["mean"])
    assert len(found["transferred_minus"]) == 4 and (tmp_path / "transfer-synthetic-to-synthetic.png").exists()


def test_text_vectors_of_two_models_are_refused(scripts: Scripts, options: Any, small_world: Path, tmp_path: Path):
    data, files = load_prepared(small_world), []
    for model in ("one", "other"):
        vectors = TextVectors(
            vectors=np.ones((data.num_items, 4), np.float32),
            item_ids=data.item_ids,
            text_hashes=text_hashes(data.titles),
            provider=model,
            dataset_fingerprint=data.fingerprint,
            model_fingerprint=model,
        )
        files.append(tmp_path / f"{model}.npz")
        save_text_vectors(files[-1], vectors)
    with pytest.raises(UserError, match="two models do not compare"):
        scripts("transfer").main(replace(options, data=str(small_world)), target=options.data, texts=tuple(files))
    with pytest.raises(UserError, match="name those of both, --texts"):
        scripts("transfer").main(replace(options, text=files[0]), target=options.data)
