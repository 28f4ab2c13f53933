"""Training on several devices gives what one device gives, in one process and in two, and goes on with another number of them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from cda4rec_jax.errors import UserError
from cda4rec_jax.runs import RunDirectory
from cda4rec_jax.training.mesh import Layout, make_mesh, parse_mesh, rows_multiple
from tests.devices import DEADLINE_S, environment, outputs_of_job

PROGRAM = "import sys; from cda4rec_jax.cli import main; sys.exit(main())"
STOPPED = """
import signal, sys
from cda4rec_jax.cli import console, main

shown = console.TrainingView.watch

def watch(view, progress):
    shown(view, progress)
    if progress.values and progress.step == 40:
        signal.raise_signal(signal.SIGINT)

console.TrainingView.watch = watch
sys.exit(main() != 130)
"""
EIGHT, TWO_BY_FOUR = ("data=8", "items=8"), "data=4,items=2"


@pytest.fixture(scope="module")
def eight(tiny_run: Path, tiny_baseline: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What ``eight_devices.py`` found."""
    script = Path(__file__).with_name("eight_devices.py")
    command = [sys.executable, str(script), str(tiny_run), str(tiny_baseline), str(tmp_path_factory.mktemp("eight"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, env=environment(8))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("mesh", [*EIGHT, TWO_BY_FOUR])
def test_losses_and_weights_on_a_mesh_are_those_of_one_device(eight: dict[str, Any], mesh: str) -> None:
    found = eight["few_steps"]
    np.testing.assert_allclose(found[mesh]["losses"], found["one"], rtol=2e-6)
    assert len({*found["one"]}) == 3
    assert found[mesh]["weights_apart"] < 2e-5


@pytest.mark.parametrize(("mesh", "parts"), [("data=8", 1), ("items=8", 8), (TWO_BY_FOUR, 2)])
def test_ids_their_moments_their_average_and_text_are_divided_and_nothing_else(
    eight: dict[str, Any], mesh: str, parts: int, tiny_baseline: Path
) -> None:
    shards = eight["few_steps"][mesh]["shards"]
    if parts == 1:
        assert not shards
        return
    ids = RunDirectory.open(tiny_baseline).load_weights("final")["cloud/items/ids/value"]
    rows = -(-ids.shape[0] // parts)
    held = [shape for name, shape in shards.items() if "items/ids" in name]
    assert held == [[rows, ids.shape[1]]] * 4  # weights, average, and both moments
    others = [shape for name, shape in shards.items() if "items/ids" not in name]
    assert others == [[rows, 1]]  # text


def test_no_device_gathers_the_item_table_to_train_on_it(eight: dict[str, Any]) -> None:
    assert {*eight["few_steps"]["collectives"]} == {"all-reduce"}


def test_the_deciders_learn_on_a_mesh_as_on_one_device(eight: dict[str, Any], tiny_run: Path) -> None:
    rows = RunDirectory.open(tiny_run).metrics()
    expected = next(row for row in rows if row["phase"] == "joint" and row["step"] == 10)
    assert len(eight["deciders"]) >= 7
    for name, value in eight["deciders"].items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, err_msg=name)


def test_a_run_goes_on_with_the_same_losses_on_two_devices_and_then_on_one(eight: dict[str, Any], tiny_baseline: Path) -> None:
    found, expected = eight["resumed"]["metrics"], RunDirectory.open(tiny_baseline).metrics()
    joint = [[(row["step"], row["loss"]) for row in rows if row["phase"] == "joint"] for rows in (found, expected)]
    assert joint[0][-1][0] > 50
    np.testing.assert_allclose(*joint, rtol=1e-5)
    assert len(found) == len(expected)
    final = RunDirectory.open(tiny_baseline).load_weights("final")["cloud/items/ids/value"]
    assert eight["resumed"]["ids"] == [list(final.shape)]


def test_the_step_is_traced_once_whatever_the_devices_and_however_many_epochs(eight: dict[str, Any]) -> None:
    assert eight["resumed"]["traces"] == [1, 1, 1]


def test_a_mesh_of_more_devices_than_there_are_is_refused(eight: dict[str, Any]) -> None:
    assert "data=9 takes 9 devices: choose sizes whose product is at most 8" in eight["refused"]
    assert "xla_force_host_platform_device_count=9" in eight["refused"]


def test_a_mesh_is_read_in_any_order_and_an_axis_may_be_left_out() -> None:
    assert parse_mesh("items=2,data=4") == {"data": 4, "items": 2} == parse_mesh("data=4,items=2")
    assert parse_mesh("items=3") == {"data": 1, "items": 3}


@pytest.mark.parametrize("text", ["", "data", "data=0", "data=-1", "data=2,data=2", "rows=2", "data=2,", "data=²"])
def test_a_mesh_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"expected data=N, items=N, or data=N,items=N"):
        parse_mesh(text)


def test_rows_that_do_not_divide_are_refused_with_what_to_do() -> None:
    mesh = make_mesh("data=2")
    assert rows_multiple(mesh, 12, 3) == 6
    with pytest.raises(UserError, match=r"15 rows a batch .* data=2 .* a multiple of 6, or a mesh with data=1 or 5"):
        rows_multiple(mesh, 15, 3)


def test_what_is_placed_comes_back_without_padding() -> None:
    layout = Layout(make_mesh("items=2"), num_rows=5)
    tree = {"items": {"ids": np.arange(10.0, dtype=np.float32).reshape(5, 2)}, "scale": np.float32(3)}
    placed = layout.place(tree)
    assert placed["items"]["ids"].shape == (6, 2) and not np.any(placed["items"]["ids"][5])
    jax.tree.map(np.testing.assert_array_equal, layout.local(placed), tree)


def test_two_processes_train_as_one_does_and_one_goes_on_where_they_stopped(
    tiny_run: Path, tiny_baseline: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    data = ["--preset", "sasrec-tiny", "--data", str(tiny_run / "data")]
    arguments = ["train", *data, "--out", str(run), "--mesh", "data=2,items=2"]

    def command(coordinator: str, number: int) -> list[str]:
        job = ["--coordinator", coordinator, "--num-processes", "2", "--process-id", str(number)]
        return [sys.executable, "-c", STOPPED, *arguments, *job]

    told = outputs_of_job(command, devices=2)
    assert told[0] and not told[1]
    assert RunDirectory.open(run).metrics()[-1]["step"] == 40
    alone = [sys.executable, "-c", PROGRAM, "train", "--resume", "--out", str(run)]
    subprocess.run(alone, check=True, capture_output=True, timeout=DEADLINE_S, env=environment(1))
    one, two = (RunDirectory.open(path) for path in (tiny_baseline, run))
    rows = [[(row["step"], row["phase"], row.get("loss", row.get("ndcg@10"))) for row in each.metrics()] for each in (two, one)]
    values = [np.asarray([row[2] for row in each], np.float64) for each in rows]
    assert [row[:2] for row in rows[0]] == [row[:2] for row in rows[1]]
    np.testing.assert_allclose(*values, rtol=1e-5)
    weights, expected = (each.load_weights("final") for each in (two, one))
    assert weights.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(weights[name], expected[name], atol=1e-4, err_msg=name)
