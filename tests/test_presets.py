"""Which configuration a name and a data source get."""

from dataclasses import replace
from pathlib import Path

import pytest

from cda4rec_jax.data import prepare
from cda4rec_jax.errors import UserError
from cda4rec_jax.presets import PRESETS, amazon_beauty, ml_1m, preset, sasrec, tiny


def test_auto_takes_the_preset_that_is_named_like_the_data() -> None:
    assert preset("auto", "/anywhere/ml-1m") == ml_1m()
    assert preset("auto", "elsewhere/amazon-beauty/") == amazon_beauty()
    assert preset("auto", "synthetic:users=50") == PRESETS["synthetic"]()


def test_sasrec_has_the_sizes_of_the_preset_that_the_data_or_the_name_says() -> None:
    assert preset("sasrec", "/anywhere/ml-1m") == sasrec(ml_1m())
    assert preset("sasrec-tiny", "/anywhere/ml-1m") == sasrec(tiny())
    baseline = preset("sasrec", "/anywhere/ml-1m")
    assert baseline.system.device is None and baseline.text_dimensions == 0
    assert baseline.system.cloud.history_length == ml_1m().system.cloud.history_length


def test_other_data_gets_a_preset_that_fits_its_size(tmp_path: Path) -> None:
    prepare("synthetic:users=300,items=150", tmp_path / "popular")
    prepare("synthetic:users=300,items=600,min_events=90", tmp_path / "long")
    popular, long = (preset("auto", str(tmp_path / name)) for name in ("popular", "long"))
    assert popular.system.cloud.history_length == 50 < long.system.cloud.history_length
    assert popular.packing.history_length == 50 and long.packing.history_length == long.system.cloud.history_length
    assert popular.train.epochs == 25, "little data is passed over many times"
    assert popular.train.withheld_share == long.train.withheld_share == 1.0, "few users withhold all they can"
    assert popular.train.withheld_events == 1 < long.train.withheld_events <= 4, "up to 3% of long histories"
    assert preset("sasrec", str(tmp_path / "long")) == sasrec(long)


def test_an_unknown_preset_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match=r"unknown preset 'ml1m': did you mean 'ml-1m'\? choose one of .*sasrec-NAME"):
        preset("ml1m")
    with pytest.raises(UserError, match="unknown preset 'books'"):
        preset("sasrec-books")
    with pytest.raises(UserError, match="does not exist"):
        preset("auto", "nowhere")


def test_agents_read_no_more_events_than_a_request_may_release_and_a_baseline_reads_what_it_likes() -> None:
    system = tiny().system
    assert system.device is not None
    long = {"cloud": replace(system.cloud, history_length=201), "device": replace(system.device, history_length=201)}
    with pytest.raises(ValueError, match=r"history_length is 201: .* at most 200 ids"):
        replace(system, **long)
    assert replace(system, cloud=long["cloud"], device=None).history_length == 201
