"""A checkpoint gives back exactly what was saved, on other devices too, and a killed process never breaks the older one."""

import gc
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cda4rec_jax.errors import UserError
from cda4rec_jax.runs import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "run", {}, kind="joint")


def training_state(seed: int = 0) -> dict[str, Any]:
    """What a trainer saves: module state, optimiser state, a PRNG key, a step."""
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(seed))
    parameters = nnx.state(model)
    optimiser = optax.adamw(1e-3).init(parameters)
    rng = jax.random.key(seed, impl="unsafe_rbg")
    return {
        "model": parameters,
        "optimiser": optimiser,
        "rng": rng,
        "layers": [jnp.ones((2,), jnp.bfloat16)],
        "step": jnp.asarray(7),
    }


def assert_same(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_state_and_extras_come_back_exactly(run: RunDirectory) -> None:
    state = training_state()
    extras = {"data": {"next_index": 12, "inner": [1, None]}, "best": 1 / 3}
    run.save_checkpoint(7, state, extras)
    restored = RunDirectory.open(run.path).restore_latest(jax.eval_shape(training_state))
    assert restored is not None
    assert (restored.step, restored.extras) == (7, extras)
    assert_same(restored.state, state)
    jax.random.uniform(restored.state["rng"])


def test_no_checkpoint_yet_gives_none(run: RunDirectory) -> None:
    assert run.restore_latest(training_state()) is None


def test_the_last_two_checkpoints_stay_and_the_newest_is_restored(run: RunDirectory) -> None:
    for step in (5, 10, 100):
        run.save_checkpoint(step, {"a": jnp.full((2,), step)}, {})
    restored = run.restore_latest({"a": jnp.zeros((2,), int)})
    assert restored is not None and restored.step == 100 and restored.state["a"].tolist() == [100, 100]
    assert sorted(path.name for path in (run.path / "checkpoints").iterdir()) == ["10", "100"]


def test_saving_a_step_again_replaces_it(run: RunDirectory) -> None:
    for value in (1, 2):
        run.save_checkpoint(5, {"a": jnp.asarray(value)}, {"value": value})
    restored = run.restore_latest({"a": jnp.asarray(0)})
    assert restored is not None and (int(restored.state["a"]), restored.extras) == (2, {"value": 2})


def test_a_checkpoint_restores_onto_another_number_of_devices(run: RunDirectory) -> None:
    one, two = (Mesh(np.array(jax.devices()[:n]), "x", axis_types=(AxisType.Auto,)) for n in (1, 2))
    values = np.arange(8.0, dtype=np.float32).reshape(4, 2)
    for source, target in ((one, two), (two, one)):
        run.save_checkpoint(1, {"a": jax.device_put(values, NamedSharding(source, PartitionSpec("x")))}, {})
        wanted = NamedSharding(target, PartitionSpec("x"))
        restored = run.restore_latest({"a": jax.ShapeDtypeStruct((4, 2), jnp.float32, sharding=wanted)})
        assert restored is not None and restored.state["a"].sharding == wanted
        np.testing.assert_array_equal(np.asarray(restored.state["a"]), values)


def test_padding_may_differ_between_saving_and_restoring_and_nothing_else(run: RunDirectory) -> None:
    values = np.arange(10.0, dtype=np.float32).reshape(5, 2)
    true = {"a": jax.ShapeDtypeStruct((5, 2), jnp.float32)}
    run.save_checkpoint(1, {"a": jnp.pad(values, ((0, 1), (0, 0)))}, {}, true)
    for rows in (5, 6, 8):
        restored = run.restore_latest({"a": jax.ShapeDtypeStruct((rows, 2), jnp.float32)}, true)
        assert restored is not None
        np.testing.assert_array_equal(restored.state["a"], np.pad(values, ((0, rows - 5), (0, 0))))
    with pytest.raises(UserError, match=r"a is float32\[5, 2\], expected float32\[6, 2\]"):
        run.restore_latest({"a": jnp.zeros((6, 2))})


def test_every_difference_from_the_expected_state_is_named(run: RunDirectory) -> None:
    run.save_checkpoint(1, {"a": jnp.zeros((2,)), "b": {"c": jnp.zeros((3,))}, "old": jnp.zeros(())}, {})
    with pytest.raises(
        UserError, match=r"a is float32\[2\], expected int32\[2\]; b/c is .*\[3\].*\[4\]; new is missing; old is not"
    ):
        run.restore_latest({"a": jnp.zeros((2,), int), "b": {"c": jnp.zeros((4,))}, "new": jnp.zeros(())})


def test_damage_to_any_file_is_told_or_does_no_harm(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # Orbax leaves reads that nobody awaits any more
    weights = {"a": jnp.arange(4096.0), "b": {"c": jnp.ones((3,))}}
    folder, told = run.path / "weights" / "best", 0
    run.save_weights("best", weights)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for file in files:
        content = file.read_bytes()
        for damaged in (content[: len(content) // 2], b"", None):
            file.unlink() if damaged is None else file.write_bytes(damaged)
            try:
                assert_same(run.load_weights("best", weights), weights)
            except UserError as error:
                assert "is damaged" in str(error) and "train again" in str(error) and len(str(error)) < 500
                told += 1
            file.write_bytes(content)
    gc.collect()
    assert told >= 4, "the files that hold the arrays were not among these"
    assert_same(run.load_weights("best", weights), weights)


def test_paths_that_would_collide_are_refused(run: RunDirectory) -> None:
    with pytest.raises(ValueError, match="same path"):
        run.save_checkpoint(1, {"a/b": jnp.zeros(()), "a": {"b": jnp.zeros(())}}, {})


def test_weights_are_replaced_and_load_with_or_without_a_structure(run: RunDirectory) -> None:
    for value in (1.0, 2.0):
        run.save_weights("best", {"layers": [{"kernel": jnp.full((2, 2), value)}]})
    assert list(run.load_weights("best")) == ["layers/0/kernel"]
    loaded = run.load_weights("best", {"layers": [{"kernel": jax.ShapeDtypeStruct((2, 2), jnp.float32)}]})
    assert_same(loaded, {"layers": [{"kernel": jnp.full((2, 2), 2.0)}]})
    with pytest.raises(UserError, match="no weights 'last'"):
        run.load_weights("last")


def test_an_unfinished_save_is_ignored_and_cleared_by_the_next(run: RunDirectory) -> None:
    run.save_checkpoint(1, {"a": jnp.ones(())}, {})
    folder = run.path / "checkpoints"
    for name in ("2.unfinished.orbax-checkpoint-tmp", "2.unfinished", "0.removed"):
        shutil.copytree(folder / "1", folder / name)
        next((folder / name).rglob("manifest.ocdbt")).unlink()
    restored = run.restore_latest({"a": jnp.zeros(())})
    assert restored is not None and restored.step == 1
    run.save_checkpoint(2, {"a": jnp.ones(())}, {})
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]


SAVER = """
import sys
import jax.numpy as jnp
from cda4rec_jax.runs import RunDirectory
run = RunDirectory.open(sys.argv[1])
for step in range(int(sys.argv[2]), 10_000):
    run.save_checkpoint(step, {"a": jnp.full((64, 64), step), "b": jnp.asarray(step)}, {"step": step})
    run.save_weights("best", {"a": jnp.full((64,), step)})
    print(step, flush=True)
"""


def test_a_process_killed_while_saving_leaves_a_checkpoint_that_restores(run: RunDirectory) -> None:
    first = 0
    for delay_seconds in (0.03, 0.13):
        saver = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(run.path), str(first)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert saver.stdout is not None
        printed = int(saver.stdout.readline())
        time.sleep(delay_seconds)
        saver.send_signal(signal.SIGKILL)
        rest, errors = saver.communicate()
        assert not errors, "saving wrote to stderr"
        printed = max([printed, *map(int, rest.split())])
        restored = run.restore_latest({"a": jnp.zeros((64, 64), int), "b": jnp.asarray(0)})
        assert restored is not None and restored.step >= printed and restored.extras == {"step": restored.step}
        assert restored.state["b"] == restored.step and (restored.state["a"] == jnp.full((64, 64), restored.step)).all()
        assert run.load_weights("best")["a"][0] >= printed
        first = restored.step + 1
