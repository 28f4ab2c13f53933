"""The joint step: gradient accumulation, the dtype of compute, and how it is compiled."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cda4rec_jax.kernels.linear_cross_entropy import linear_cross_entropy
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
    def gradient(state: Any, batch: Any, frozen: Any, shares: Any) -> Any:
        key, layout = jax.random.key(0), trainer.layout
        return trunk_gradient(state, batch, frozen, key, trainer.graph, trainer.config, layout, shares)

    batch, frozen = trainer.layout.place_batch(trainer.source[0]), trainer._constants[0]
    (loss, _), found = gradient(trainer.state, batch, frozen, trainer._placed_shares)
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


LOSSES = {
    "smoothed": {"label_smoothing": 0.1},
    "sampled": {"loss": "sampled", "sampled_items": 40, "label_smoothing": 0.1},
    "in-batch": {"loss": "in-batch"},
}


def test_the_default_loss_is_bit_for_bit_the_plain_cross_entropy(make_trainer: Any, whole: Any) -> None:
    """As before there were others: the same keys, the same products, no term of 0."""
    trainer = make_trainer()

    @jax.jit
    def expected(trunk: Any, batch: Any) -> Any:
        def loss(trunk: Any) -> Any:
            cloud = nnx.merge(trainer.graph, trunk, trainer.state.deciders, trainer.frozen).cloud
            text_key, cloud_key, _ = jax.random.split(jax.random.key(0), 3)
            vectors = cloud.items.vectors(text_key)
            hidden = cloud(batch.cloud, vectors, cloud_key)
            targets = batch.cloud.targets.reshape(-1)
            weights = (targets > 0).astype(jnp.float32)
            total = linear_cross_entropy(hidden.reshape(-1, hidden.shape[-1]), vectors, targets, weights)
            return total / jnp.maximum(jnp.sum(weights), 1.0)

        return jax.value_and_grad(loss)(trunk)

    value, gradient = expected(trainer.state.trunk, trainer.source[0])
    assert float(value) == whole[0] and trainer._placed_shares is None
    jax.tree.map(np.testing.assert_array_equal, gradient, whole[1])


def take_steps(trainer: Trainer, count: int) -> list[float]:
    """Losses of so many steps on the first batch."""
    losses = []
    for _ in range(count):
        trainer.state, values = trainer._joint(trainer.state, trainer.source[0], *trainer._constants, trainer._placed_shares)
        losses.append(float(values["loss"]))
    return losses


@pytest.mark.parametrize("name", LOSSES)
def test_steps_with_another_loss_learn(make_trainer: Any, whole: Any, name: str) -> None:
    losses = take_steps(make_trainer(**LOSSES[name]), 12)
    assert losses[0] != whole[0] and np.mean(losses[-3:]) < losses[0] - 0.1
    # The first step has a learning rate of 0, so that the second one sees the same weights: what differs is drawn.
    assert (losses[0] != losses[1]) == (name == "sampled")


def test_a_run_that_goes_on_draws_the_negatives_of_one_that_was_not_stopped(make_trainer: Any) -> None:
    stopped, resumed = (make_trainer(**LOSSES["sampled"]) for _ in range(2))
    take_steps(stopped, 2)
    resumed.state = jax.tree.map(jnp.copy, stopped.state)  # as a checkpoint has it
    assert take_steps(resumed, 2) == take_steps(stopped, 2)


@pytest.mark.parametrize("name", LOSSES)
def test_another_loss_is_on_a_mesh_what_it_is_on_one_device(make_trainer: Any, name: str) -> None:
    loss, gradient = loss_and_gradient(make_trainer(**LOSSES[name]))
    for mesh in ("data=2", "items=2"):
        found, on_mesh = loss_and_gradient(make_trainer(mesh, **LOSSES[name]))
        np.testing.assert_allclose(found, loss, rtol=2e-6)
        assert_close(on_mesh, gradient, 2e-5)


def test_many_draws_estimate_the_full_loss_and_its_gradient(make_trainer: Any, whole: Any) -> None:
    loss, gradient = loss_and_gradient(make_trainer(loss="sampled", sampled_items=50_000))
    np.testing.assert_allclose(loss, whole[0], rtol=1e-3)
    assert_close(gradient, whole[1], 0.05)


def test_both_agents_of_a_joint_run_learn_by_the_loss(tiny_run: Path, tmp_path: Path) -> None:
    run = RunDirectory.open(tiny_run)
    config, corpus = run.read_config("run", RunConfig), load_corpus(run)

    def losses(**changes: Any) -> dict[str, float]:
        step = StepConfig(system=config.system, train=replace(config.train, **changes))
        folder = RunDirectory.create(tmp_path / changes["loss"], {}, run.kind)
        trainer = Trainer(corpus, step, config.packing, None, folder)

        @jax.jit
        def parts(state: Any, batch: Any, frozen: Any, shares: Any) -> dict[str, Any]:
            inputs = (state, batch, frozen, jax.random.key(0), trainer.graph, trainer.config, trainer.layout, shares)
            return trunk_gradient(*inputs)[0][1]

        found = parts(trainer.state, trainer.source[0], trainer._constants[0], trainer._placed_shares)
        return {name: float(value) for name, value in found.items()}

    full, sampled = losses(loss="full"), losses(loss="sampled", sampled_items=20_000)
    assert {*full} == {*sampled} == {"cloud_loss", "device_loss"}
    for name, value in full.items():
        assert sampled[name] != value
        np.testing.assert_allclose(sampled[name], value, rtol=3e-3)


def test_a_configuration_that_was_saved_before_there_were_other_losses_is_read_as_that_of_the_full_one(
    tiny_baseline: Path, tmp_path: Path
) -> None:
    stored = json.loads((tiny_baseline / "config.json").read_text())
    for name in ("loss", "sampled_items", "label_smoothing"):
        del stored["config"]["run"]["train"][name]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    train = RunDirectory.open(tmp_path).read_config("run", RunConfig).train
    assert (train.loss, train.label_smoothing) == ("full", 0.0)
    assert train == RunDirectory.open(tiny_baseline).read_config("run", RunConfig).train


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
