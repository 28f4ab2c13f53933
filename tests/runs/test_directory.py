"""The run directory keeps what it is given, refuses what it cannot read, and never loses what it had."""

import dataclasses
import enum
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from cda4rec_jax.errors import UserError
from cda4rec_jax.runs import RunDirectory


class Colour(enum.StrEnum):
    RED = "red"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    sizes: tuple[int, ...] = (1, 2)
    colour: Colour = Colour.RED


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    rate: float
    inner: Inner = Inner()
    folder: str | None = None


def make_run(path: Path, **options: bool) -> RunDirectory:
    return RunDirectory.create(path, {"outer": Outer(rate=0.1)}, kind="joint", **options)


def test_configurations_come_back_as_the_dataclasses_they_were(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    run = RunDirectory.open(tmp_path / "run")
    assert run.kind == "joint"
    assert run.read_config("outer", Outer) == Outer(rate=0.1)
    assert run.created_by["jax"]


def test_a_configuration_that_does_not_fit_names_the_file_and_the_field(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", {"outer": {"rate": "fast"}}, kind="joint")
    with pytest.raises(UserError, match=r"config\.json.*rate"):
        run.read_config("outer", Outer)
    with pytest.raises(UserError, match=r"no configuration 'other', only outer"):
        run.read_config("other", Outer)


def test_create_refuses_an_existing_run_and_leaves_it_as_it_was(tmp_path: Path) -> None:
    make_run(tmp_path / "run").write_json("results", {"ndcg": 0.5})
    with pytest.raises(UserError, match="--resume"):
        make_run(tmp_path / "run")
    assert RunDirectory.open(tmp_path / "run").read_json("results") == {"ndcg": 0.5}


def test_overwrite_replaces_a_run_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    make_run(tmp_path / "run").write_json("results", {})
    run = make_run(tmp_path / "run", overwrite=True)
    assert not run.has("results.json")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("fails", ["write", "rename"])
def test_a_run_stays_where_the_one_that_would_replace_it_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    make_run(tmp_path / "run").write_json("results", {"ndcg": 0.5})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    real_rename = Path.rename

    def rename(self: Path, target: Path) -> Path | None:
        return full() if ".begun-" in self.name else real_rename(self, target)

    if fails == "write":
        monkeypatch.setattr("cda4rec_jax.runs.directory._write_json", full)
    else:
        monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(UserError, match="No space left"):
        make_run(tmp_path / "run", overwrite=True)
    assert RunDirectory.open(tmp_path / "run").read_json("results") == {"ndcg": 0.5}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_made_of_another_does_not_replace_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    run = make_run(tmp_path / "run" / "inside")
    for out in ("~/run/inside", tmp_path / "run" / ".." / "run", tmp_path):
        with pytest.raises(UserError, match="is the run itself or holds it"):
            run.apart(out)
    assert run.apart("~/run/inside-2") == run.path.with_name("inside-2")


def test_a_run_that_a_killed_process_put_aside_is_named(tmp_path: Path) -> None:
    make_run(tmp_path / "run").path.rename(tmp_path / ".run.replaced-123")
    (tmp_path / ".run.replaced-124").mkdir()  # of which nothing is left
    with pytest.raises(UserError, match=r"an earlier one is kept in .*/\.run\.replaced-123: rename it back"):
        RunDirectory.open(tmp_path / "run")


@pytest.mark.parametrize("overwrite", [False, True])
def test_create_refuses_a_directory_of_something_else(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not empty and holds no run"):
        make_run(tmp_path, overwrite=overwrite)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_create_takes_an_empty_directory_and_one_where_creation_was_interrupted(tmp_path: Path) -> None:
    (tmp_path / ".config.json.17.tmp").write_text("{")
    assert make_run(tmp_path).kind == "joint"


def test_an_unwritable_place_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot create the run directory"):
        make_run(tmp_path / "file" / "run")
    with pytest.raises(UserError, match="Not a directory"):
        make_run(tmp_path / "file")


def test_open_refuses_what_is_missing_or_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no run at"):
        RunDirectory.open(tmp_path / "missing")
    with pytest.raises(UserError, match="is not a run directory"):
        RunDirectory.open(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "no format_version"),
        ('{"format_version": 2}', "lacks config, kind, versions"),
        ('{"format_version": 99, "versions": {"cda4rec_jax": "7.0"}}', r"format 99.*reads format 2.*7\.0"),
    ],
)
def test_open_refuses_a_damaged_configuration_or_another_version(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        RunDirectory.open(tmp_path)


def test_json_keeps_numbers_exactly_and_takes_numpy_and_dataclasses(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    values = {
        "third": 1 / 3,
        "single": np.float32(0.1),
        "row": np.arange(3),
        "inner": Inner(),
        "where": tmp_path,
        "none": float("nan"),
    }
    run.write_json("results", values)
    expected = {"third": 1 / 3, "single": float(np.float32(0.1)), "row": [0, 1, 2], "where": str(tmp_path), "none": None}
    assert run.read_json("results") == {**expected, "inner": {"sizes": [1, 2], "colour": "red"}}
    assert json.loads((tmp_path / "results.json").read_text()) == run.read_json("results")


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.write_json("results", {"ndcg": 1})
    run.save_arrays("statistics", {"counts": np.arange(3)})
    with pytest.raises(TypeError, match="cannot store object"):
        run.write_json("results", {"ndcg": object()})
    with pytest.raises(ValueError, match="allow_pickle"):
        run.save_arrays("statistics", {"counts": np.array([object()])})
    assert run.read_json("results") == {"ndcg": 1}
    assert run.load_arrays("statistics")["counts"].tolist() == [0, 1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "results.json", "statistics.npz"]


def test_arrays_come_back_with_their_types(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    arrays = {"weights": np.arange(6, dtype=np.uint8).reshape(2, 3), "names": np.array(["a", "bc"])}
    run.save_arrays("statistics", arrays)
    for name, array in run.load_arrays("statistics").items():
        np.testing.assert_array_equal(array, arrays[name], strict=True)


def test_missing_or_damaged_files_are_named(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with pytest.raises(UserError, match=r"has no results\.json"):
        run.read_json("results")
    (tmp_path / "statistics.npz").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(UserError, match=r"statistics\.npz is damaged"):
        run.load_arrays("statistics")


def test_what_is_missing_is_trained_on_only_where_training_has_not_ended(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for advice in ("--resume", "restore it, or train again"):
        for read in (partial(run.read_json, "planner"), partial(run.load_arrays, "text"), partial(run.load_weights, "final")):
            with pytest.raises(UserError, match=advice):
                read()
        run.write_json("training", {"seconds": 1.0})


def test_metrics_are_appended_and_truncated_to_a_step(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert run.metrics() == []
    for step in range(4):
        run.append_metric({"step": step, "loss": np.float32(step) / 3})
    run.truncate_metrics(1)
    run.append_metric({"step": 2, "loss": 9.0})
    assert [row["step"] for row in run.metrics()] == [0, 1, 2]
    assert run.metrics()[1]["loss"] == float(np.float32(1) / 3)


def test_a_line_of_metrics_that_a_crash_cut_off_is_dropped(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.append_metric({"step": 1})
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 2, "lo')
    assert run.metrics() == [{"step": 1}]
    run.truncate_metrics(1)
    run.append_metric({"step": 2})
    assert run.metrics() == [{"step": 1}, {"step": 2}]


def test_a_damaged_line_of_metrics_is_named_by_number(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(UserError, match="line 2 is damaged"):
        run.metrics()


def test_a_row_of_metrics_needs_a_step(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a step"):
        make_run(tmp_path).append_metric({"loss": 1.0})
