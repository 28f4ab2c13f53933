"""``cda4rec bench train`` without torch: what it measures, what it writes, and what it refuses."""

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from cda4rec_jax.bench import peers, train
from cda4rec_jax.bench.layouts import gathered, packed_rows, padded_rows, segments_of
from cda4rec_jax.bench.train_accelerator import (
    ACCELERATOR_PRESETS,
    AcceleratorPreset,
    lower_step,
    measure_accelerator,
    model_flops,
)
from cda4rec_jax.bench.train_competitors import Competitor, EqualLoss
from cda4rec_jax.bench.train_systems import (
    decoded_loss,
    loss_at_real_positions,
    loss_on_all_slots,
    make_model,
    our_loss_at_real_positions,
    packed_batches,
    packed_loss,
)
from cda4rec_jax.cli import main
from cda4rec_jax.data import read_interactions
from cda4rec_jax.errors import UserError
from cda4rec_jax.nn import DecoderConfig
from cda4rec_jax.pipeline.corpus import Corpus
from cda4rec_jax.presets import preset
from cda4rec_jax.timing import TimingConfig
from tests.bench.test_layouts import make_segment

SOURCE = "synthetic:users=60,items=64"
FEW_ROUNDS = TimingConfig(rounds=3, block_seconds=1e-6, warm_up_turns=2, attempts=1)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs ``cda4rec bench train``, which must exit with 2; gives its one message."""

    def run(*arguments: object) -> str:
        assert main(["bench", "train", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert error.count("cda4rec: ") == 1 and "Traceback" not in error
        return " ".join(error.split())

    return run


def tiny_setting() -> tuple[Any, list, int]:
    """A model, packed batches, and the length of a padded row."""
    config, interactions = preset("sasrec-tiny"), read_interactions(SOURCE)
    corpus = Corpus(interactions=interactions, text=np.zeros((interactions.num_items + 1, 1), np.float32), ids_only=True)
    packed, num_steps = packed_batches(corpus, config, count=2)
    return make_model(config, corpus.text, corpus.prefix_size, num_steps), packed, config.packing.history_length + 1


def test_every_layout_and_every_way_to_the_loss_gives_the_same_number() -> None:
    model, packed, length = tiny_setting()
    ours = jax.jit(partial(packed_loss, model))(model.trunk, model.frozen, packed[0])
    batch = gathered(padded_rows(segments_of(packed[0]), length))
    for loss in (loss_at_real_positions, loss_on_all_slots, partial(our_loss_at_real_positions, chunk_size=64)):
        padded = jax.jit(lambda trunk, batch, loss=loss: decoded_loss(model, trunk, model.frozen, batch, loss, None))
        assert float(padded(model.trunk, batch)) == pytest.approx(float(ours), abs=1e-5)


def test_no_matrix_of_the_compared_model_is_zero_or_the_comparison_would_not_see_it() -> None:
    model, _, _ = tiny_setting()
    weights = model.weights()
    assert len(weights) == 3 + 6 * 2
    assert all(np.any(value != 0) for value in weights.values())
    assert not weights["ids"][0].any(), "row 0 is padding"


def test_the_command_writes_json_and_chart_and_prints_what_is_not_installed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "installed", lambda peer: peer == "jax")
    monkeypatch.setattr("cda4rec_jax.timing.TimingConfig", lambda rounds: dataclasses.replace(FEW_ROUNDS, rounds=rounds))
    arguments = ["--preset", "sasrec-tiny", "--data", SOURCE, "--rounds", "3", "--out", str(tmp_path)]
    assert main(["bench", "train", *arguments]) == 0
    told = capsys.readouterr().out
    assert "ours, packed" in told and "null" in told and "not installed: torch, torch-compile, rectools" in told
    found = json.loads((tmp_path / "train-synthetic.json").read_text())
    assert found["not_installed"] == ["torch", "torch-compile", "rectools"]
    assert found["threads"] >= 1 and found["provenance"]["versions"]["jax"]
    assert 0 < found["padded"]["fill"] < found["packed"]["fill"] <= 1
    assert found["loss_temporary_bytes"]["ours"] > 0
    systems, measured = found["systems"], found["measurement"]
    assert len(systems) == 4 == len(measured["rates"])
    assert all(one["equal_loss"]["difference"] <= 1e-4 and one["temporary_bytes"] > 0 for one in systems.values())
    for one in systems.values():
        assert one["threads"] >= 1 and one["version"].startswith("jax ") and one["first_call_seconds"] > 0
        assert (
            one["latency"]["count"] >= 3 and 0 < one["latency"]["p50_ms"] <= one["latency"]["p95_ms"] <= one["latency"]["p99_ms"]
        )
    assert len(measured["comparisons"]) == 3 and all(one["ratio"]["median"] > 0 for one in measured["comparisons"])
    assert (tmp_path / "train-synthetic.png").read_bytes().startswith(b"\x89PNG")


def test_a_system_with_another_loss_is_refused() -> None:
    def system(loss: float) -> Competitor:
        told = {"version": "", "temporary_bytes": 0, "memory_by": "", "first_call_seconds": 0.0}
        return Competitor(name="one", against=None, call=float, equal_loss=EqualLoss(loss=loss, ours=2.0), **told)

    train._require_equal_loss(system(2.00005))
    for loss in (2.001, float("nan")):
        with pytest.raises(UserError, match=r"'one' has loss .* they must agree to 0.0001"):
            train._require_equal_loss(system(loss))


def test_a_peer_that_is_asked_for_and_missing_is_an_error_that_names_the_extra(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda package: None if package != "jax" else object())
    message = refused("--peers", "jax", "torch")
    assert "peer torch needs torch, which is not installed: pip install 'cda4rec_jax[bench]'" in message
    assert "--no-deps rectools" in refused("--peers", "rectools")
    assert "unknown peer tensorflow: choose from jax, torch, torch-compile, rectools" in refused("--peers", "tensorflow")


def test_bad_input_gets_one_message_and_nothing_is_written(refused: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ("--peers", "jax", "--out", out)
    assert "2 rounds says nothing" in refused("--rounds", 2, *flags)
    assert "trains both agents: the benchmark takes sasrec, or sasrec-tiny" in refused("--preset", "tiny", *flags)
    assert "unknown preset 'gpu-255'" in refused("--preset", "gpu-255", *flags)
    assert "does not exist" in refused("--data", tmp_path / "nowhere", *flags)
    assert "--lower-only is for the presets gpu-256, gpu-1024" in refused("--lower-only", *flags)
    assert "leave --data, --peers and --same-allocator out" in refused("--preset", "gpu-256", *flags)
    assert "is for accelerators" in refused("--preset", "gpu-256", "--out", out)
    assert not out.exists()
    (tmp_path / "file").write_text("")
    assert "name another --out" in refused("--preset", "sasrec-tiny", "--peers", "jax", "--out", tmp_path / "file" / "below")


def small(name: str, num_layers: int = 1) -> AcceleratorPreset:
    """A preset of fewer layers, items and rows."""
    found = ACCELERATOR_PRESETS[name]()
    system, config = found.config.system, found.config
    decoder = dataclasses.replace(
        system.cloud.decoder, num_layers=num_layers, width=64, num_heads=1, num_kv_heads=1, mlp_hidden=64
    )
    return dataclasses.replace(
        found,
        num_items=500,
        config=dataclasses.replace(
            config,
            system=dataclasses.replace(system, cloud=dataclasses.replace(system.cloud, decoder=decoder, history_length=63)),
            packing=dataclasses.replace(config.packing, history_length=63, row_tokens=64),
            train=dataclasses.replace(config.train, rows_per_batch=2, loss_chunk=64),
        ),
    )


@pytest.mark.parametrize("name", ["gpu-256", "gpu-1024"])
def test_the_step_of_a_gpu_preset_lowers_for_cuda_without_one(name: str) -> None:
    found = ACCELERATOR_PRESETS[name]()
    decoder = dataclasses.replace(found.config.system.cloud.decoder, num_layers=1)
    cloud = dataclasses.replace(found.config.system.cloud, decoder=decoder)
    config = dataclasses.replace(found.config, system=dataclasses.replace(found.config.system, cloud=cloud))
    lowered = lower_step(name, AcceleratorPreset(config=config, num_items=found.num_items))
    assert lowered.platform == "cuda" and lowered.program_bytes > 10_000
    assert lowered.tokens_per_step == 8 * 2048
    # The loss alone needs 6 operations for each token, item and channel.
    assert lowered.flops_per_step > 6 * 8 * 2048 * found.num_items * decoder.width


def test_lower_only_needs_no_accelerator(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "train", "--preset", "gpu-256", "--lower-only"]) == 0
    assert "lowered for cuda" in capsys.readouterr().out


def test_operations_of_a_model_are_counted_by_hand() -> None:
    decoder = DecoderConfig(width=4, num_layers=2, num_heads=2, num_kv_heads=1, mlp_hidden=3, dropout_rate=0.0)
    segments = [[make_segment(2, 1), make_segment(1, 3)]]
    weights = 2 * (4 * (2 + 2) * 2 + 4 * 4 + 3 * 4 * 3) + 4 * 7
    reads = 1 + 2 + 1
    assert model_flops(decoder, packed_rows(segments, 4), 7) == 6 * (3 * weights + 2 * 2 * 4 * reads)


def test_the_share_of_the_matrix_rate_is_measured_in_turns() -> None:
    found = measure_accelerator("small", small("gpu-256"), FEW_ROUNDS, matmul_size=64).json()
    assert found["tokens_per_step"] == 128 and found["threads"] >= 1 and found["version"].startswith("jax ")
    step = found["calls"]["training step"]
    assert step["steps"] == 8 and step["latency"]["count"] == 9, (
        "three rounds with one turn against the product and two of the null"
    )
    assert found["tokens_per_second"] == pytest.approx(found["flops_per_second"] / found["flops_per_step"] * 128)
    ratio = found["flops_per_second"] / found["matmul_flops_per_second"]
    assert ratio / 4 < found["share_of_matmul_rate"]["median"] < 4 * ratio  # steps of so few tokens are noisy
