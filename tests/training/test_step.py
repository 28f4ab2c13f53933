"""The joint step: gradient accumulation, the dtype of compute, and how it is compiled."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cda4rec_jax.messages import SequenceBatch
from cda4rec_jax.runs import RunDirectory
from cda4rec_jax.runs.artifacts import load_corpus
from cda4rec_jax.training import RunConfig, StepConfig, Trainer
from cda4rec_jax.training.batches import TrainingSource, micro_batch, pad_rows
from cda4rec_jax.training.config import TrainConfig
from cda4rec_jax.training.mesh import make_mesh
from cda4rec_jax.training.step import compute_dtype, optimizers, trunk_gradient


@pytest.fixture
def make_trainer(tiny_baseline: Path, tmp_path: Path) -> Any:
    """A trainer at the start of ``tiny_baseline``, without dropout, with changes to its ``TrainConfig``."""
    run = RunDirectory.open(tiny_baseline)
    config = run.read_config("run", RunConfig)
    cloud = replace(config.system.cloud, decoder=replace(config.system.cloud.decoder, dropout_rate=0.0))

    def make(mesh: str | None = None, **changes: Any) -> Trainer:
        of_step = StepConfig(system=replace(config.system, cloud=cloud), train=replace(config.train, **changes))
        folder = RunDirectory.create(tmp_path / str(len(list(tmp_path.iterdir()))), {}, run.kind)
        return Trainer(load_corpus(run), of_step, config.packing, None, folder, mesh=None if mesh is None else make_mesh(mesh))

    return make


def loss_and_gradient(trainer: Trainer) -> tuple[float, Any]:
    """Of the first batch, at the start."""

    @jax.jit
    def gradient(state: Any, batch: Any, frozen: Any) -> Any:
        return trunk_gradient(state, batch, frozen, jax.random.key(0), trainer.graph, trainer.config, trainer.layout)

    (loss, _), found = gradient(trainer.state, trainer.layout.place_batch(trainer.source[0]), trainer._constants[0])
    return float(loss), trainer.layout.local({"trunk": found})["trunk"]


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    """Within a share of the largest value of each leaf."""

    def close(a: Any, b: Any) -> None:
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=tolerance * float(np.max(np.abs(b))) + 1e-9, rtol=0)

    jax.tree.map(close, actual, expected)


@pytest.fixture
def whole(make_trainer: Any) -> tuple[float, Any]:
    """Loss and gradient of the whole batch at once, in float32."""
    return loss_and_gradient(make_trainer())


@pytest.mark.parametrize("mesh", [None, "data=2"])
def test_the_gradient_of_four_parts_is_that_of_the_whole_batch(make_trainer: Any, whole: Any, mesh: str | None) -> None:
    loss, gradient = loss_and_gradient(make_trainer(mesh, accumulation_steps=4))
    np.testing.assert_allclose(loss, whole[0], rtol=1e-6)
    assert_close(gradient, whole[1], 1e-5)


def test_bfloat16_compute_gives_float32_gradients_near_those_of_float32(make_trainer: Any, whole: Any) -> None:
    trainer = make_trainer(compute_dtype="bfloat16")
    loss, gradient = loss_and_gradient(trainer)
    assert loss != whole[0]
    np.testing.assert_allclose(loss, whole[0], rtol=1e-3)
    assert_close(gradient, whole[1], 0.05)
    state, _ = trainer._joint(trainer.state, trainer.source[0], *trainer._constants)
    assert {leaf.dtype for leaf in jax.tree.leaves((state.trunk, state.average))} == {jnp.dtype(jnp.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.trunk_optimizer)} == {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}


def test_compute_is_float32_on_a_cpu_unless_told_otherwise() -> None:
    assert TrainConfig(epochs=1, rows_per_batch=1, learning_rate=1.0).compute_dtype == "auto"
    assert compute_dtype("auto") == jnp.float32
    assert compute_dtype("bfloat16") == jnp.bfloat16


def test_a_large_gradient_of_the_policy_does_not_slow_the_head() -> None:
    _, deciders = optimizers(TrainConfig(epochs=1, rows_per_batch=1, learning_rate=1.0), 10)
    params: Any = {"device": {"head": {"linear": jnp.ones(3)}}, "policy": {"tower": jnp.ones((2, 2))}}

    def moved(of_policy: tuple[float, float]) -> Any:
        """How far the head moves in a second step."""
        state: Any = deciders.init(params)
        updates: Any = None
        for policy_gradient, head_gradient in zip(of_policy, (0.1, 1.0), strict=True):
            gradient = {
                "device": {"head": {"linear": jnp.full(3, head_gradient)}},
                "policy": {"tower": jnp.full((2, 2), policy_gradient)},
            }
            updates, state = deciders.update(gradient, state, params)
        return updates["device"]["head"]["linear"]

    np.testing.assert_array_equal(moved((0.1, 0.1)), moved((0.1, 1e3)))


def test_a_step_takes_over_the_memory_of_its_state(make_trainer: Any) -> None:
    trainer = make_trainer()
    before = trainer.state
    trainer._joint(before, trainer.source[0], *trainer._constants)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.trunk))


def first_batch(source: TrainingSource) -> SequenceBatch:
    return source[0].cloud


def tokens(batch: SequenceBatch) -> list[list[tuple]]:
    """The rows, each token with its prefix's features in the place of their number."""
    rows = []
    for row in range(batch.targets.shape[0]):
        prefixes = [tuple(np.asarray(batch.prefixes[number]).tolist()) for number in np.asarray(batch.prefix_rows[row])]
        columns = (batch.item_indices, batch.segment_ids, batch.positions, batch.targets)
        rows.append(list(zip(*(np.asarray(column[row]).tolist() for column in columns), prefixes, strict=True)))
    return rows


def test_parts_of_a_batch_hold_its_rows_with_their_prefixes(make_trainer: Any) -> None:
    batch = first_batch(make_trainer().source)
    whole = tokens(batch)
    assert any(any(token[-1]) for row in whole for token in row)
    for number in range(4):
        assert tokens(micro_batch(batch, number, 4)) == whole[number::4]


def test_rows_are_padded_with_rows_without_a_token(make_trainer: Any) -> None:
    batch = first_batch(make_trainer().source)
    assert pad_rows(batch, 8) is batch
    padded = pad_rows(batch, 10)
    assert tokens(padded)[:24] == tokens(batch) and padded.targets.shape[0] == 30
    assert not np.any(padded.segment_ids[24:]) and not np.any(padded.prefix_rows[24:])
    assert padded.prefixes.shape[0] - 1 == 30 * (batch.prefixes.shape[0] - 1) // 24
