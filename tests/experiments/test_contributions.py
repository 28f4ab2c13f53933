"""Contributions of the parts, on a tiny run."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cda4rec_jax.agents.device import FEATURES
from cda4rec_jax.errors import UserError

Scripts = Callable[[str], ModuleType]


def test_effects_are_the_arithmetic_of_the_cells_and_a_removed_part_has_a_row(
    scripts: Scripts, options: Any, refits: list[dict[str, Any]], tmp_path: Path
):
    group = "features: text"
    scripts("contributions").main(options, parts=("text", group))
    result = json.loads((tmp_path / "contributions-synthetic.json").read_text())
    assert [row["condition"] for row in result["by_consent"]] == ["profile", "recent", "full"]
    assert [row["condition"] for row in result["by_staleness"]] == ["0", "1", "3", "5", "10"]
    for row in (*result["by_consent"], *result["by_staleness"]):
        for metric in ("ndcg@10", "hit_rate@10"):
            found = row[metric]
            both, cloud, device, neither = (found["cells"][name]["mean"] for name in ("both", "cloud", "device", "neither"))
            assert found["interaction"]["mean"] == pytest.approx(both - cloud - device + neither)
            assert found["effect_of_cloud"]["mean"] == pytest.approx((both - device + cloud - neither) / 2)
            assert found["effect_of_device"]["mean"] == pytest.approx((both - cloud + device - neither) / 2)
            assert found["interaction"]["low"] <= found["interaction"]["mean"] <= found["interaction"]["high"]
    text, features = result["ablations"]
    assert text["part"] == "text" and text["ndcg@10"]["contribution"]["mean"] == 0.0  # the stand-in has text
    found = features["ndcg@10"]
    assert features["part"] == group and features["with"] == "final-phase-only"
    again, without = refits
    assert again["out"].name == "final-phase-only-0" and "system" not in again
    assert without["out"].name == "features-without-text-0" and without["path"].name == "cda4rec-0"
    assert set(without["system"].without_features) == {"text_last", "text_short", "text_long"}
    assert found["contribution"]["mean"] == pytest.approx(found["with"]["mean"] - found["without"]["mean"])
    page = (tmp_path / "contributions-synthetic.md").read_text()
    assert "interaction" in page and group in page and (tmp_path / "contributions-synthetic.png").stat().st_size > 10_000


def test_every_feature_but_the_indicator_belongs_to_one_group(scripts: Scripts):
    groups = scripts("contributions").feature_groups()
    whole = groups.pop("features: all of the device")
    assert sorted(name for names in groups.values() for name in names) == sorted(set(FEATURES) - {"structured_present"})
    assert set(whole) < set(FEATURES)


def test_an_unknown_part_is_refused(scripts: Scripts, options: Any):
    with pytest.raises(UserError, match="unknown parts"):
        scripts("contributions").main(options, parts=("packaging",))


def test_padded_rows_hold_one_history_and_a_batch_as_many_targets(scripts: Scripts, options: Any):
    import numpy as np

    from cda4rec_jax.data.packing import PackedEpoch
    from cda4rec_jax.pipeline.corpus import Corpus

    study = scripts("harness").Study(options)
    padded = scripts("contributions").padded(study, study.config)
    text = np.zeros((study.interactions.num_items + 1, 1), np.float32)
    histories = Corpus(interactions=study.interactions, text=text).training_histories()
    targets = {}
    for config in (padded, study.config):
        epoch = PackedEpoch(histories, histories.category_counts(), config.packing, np.random.default_rng(0), all_levels=True)
        batches = [epoch.batch(row, config.train.rows_per_batch) for row in range(0, epoch.num_rows, config.train.rows_per_batch)]
        targets[config] = np.mean([np.count_nonzero(batch.targets) for batch in batches[:-1]])
        assert (max(int(batch.segment_ids.max()) for batch in batches) == 1) == config.packing.padded
    assert targets[padded] == pytest.approx(targets[study.config], rel=0.1)
