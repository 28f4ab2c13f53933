"""The scripts that start runs: they are right for bash, and every command that they would run is one that there is."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from cda4rec_jax.bench.kernels import KERNELS
from cda4rec_jax.cli.app import parse
from cda4rec_jax.cli.bench import Bench, BenchKernels, BenchPlan, BenchRank, BenchRetrieval, BenchTrain
from cda4rec_jax.cli.commands import Evaluate
from cda4rec_jax.cli.train import Train

RUNS = Path(__file__).resolve().parents[2] / "experiments" / "runs"
SCRIPTS = sorted(RUNS.glob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_parses_stops_at_errors_and_says_how_it_is_used(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True).returncode == 0
    text = script.read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n#") and "\nset -euo pipefail\n" in text
    assert os.access(script, os.X_OK)
    without = subprocess.run(["bash", str(script)], capture_output=True, text=True)
    assert without.returncode != 0 and "usage:" in without.stderr


def commands(script: str, folder: Path, *arguments: str, **environment: str) -> list[list[str]]:
    """What the script runs of ``cda4rec`` on a machine of 8 devices, where everything that it calls is a stand-in."""
    log, stand_ins = folder / "log", folder / "bin"
    copy = folder / "checkout" / "experiments" / "runs" / script
    tools = copy.parents[2] / ".venv" / "bin"
    for made in (copy.parent, tools, stand_ins):
        made.mkdir(parents=True)
    shutil.copy(RUNS / script, copy)
    bodies = {
        stand_ins / "python3": "",
        tools
        / "python": 'case "$*" in *device_count*) echo 8 ;; *default_backend*) echo gpu ;; "-m pytest "*) [ "$FAILS" != tests ] ;; '
        '*test,bench*) [ "$FAILS" != peers ] ;; esac',
        tools / "cda4rec": f'printf "%q " "$@" >> {log} && echo >> {log} && echo told && [ "$2" != "$FAILS" ] && '
        'if [ "$2" = "$HANGS" ]; then exec sleep 60; fi',
    }
    for path, body in bodies.items():
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    path = f"{stand_ins}:{os.environ['PATH']}"
    environment = {"FAILS": "", "HANGS": ""} | environment | {"PATH": path}
    log.touch()
    done = subprocess.run(["bash", str(copy), *arguments], cwd=folder, env=os.environ | environment)
    assert done.returncode == (1 if environment["FAILS"] or "BUDGET_S" in environment else 0)
    return [shlex.split(line) for line in log.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("script", ["gpu.sh", "tpu.sh"])
def test_the_accelerator_scripts_train_over_all_devices_and_evaluate(script: str, tmp_path: Path) -> None:
    train, evaluate, bench = map(
        parse, commands(script, tmp_path, "my data/shop", "my run", "--epochs", "3", "--mesh", "data=4,items=2")
    )
    assert isinstance(train, Train) and isinstance(evaluate, Evaluate)
    assert isinstance(bench, Bench) and isinstance(bench.benchmark, BenchTrain)
    assert (train.data, train.out, train.epochs, train.mesh, train.rows_per_batch) == (
        "my data/shop",
        Path("my run"),
        3,
        "data=4,items=2",
        128,
    )
    assert evaluate.run_directory == train.out


def test_a_run_directory_is_made_up_and_a_resumed_run_keeps_its_rows(tmp_path: Path) -> None:
    train = parse(commands("gpu.sh", tmp_path / "one", "synthetic")[0])
    assert isinstance(train, Train) and (train.out, train.mesh) == (Path("runs/synthetic-gpu"), "data=8")
    again = parse(commands("gpu.sh", tmp_path / "two", "synthetic", "run", "--resume")[0])
    assert isinstance(again, Train) and again.resume and again.rows_per_batch is None


def test_hosts_of_one_tpu_slice_train_together(tmp_path: Path) -> None:
    (train,) = map(parse, commands("tpu.sh", tmp_path, "synthetic", HOSTS="4"))
    assert isinstance(train, Train) and train.distributed and train.mesh == "data=8"


PARTS = ("kernels", "train-gpu-256", "train-gpu-1024", "crossover", "retrieval", "rank", "plan", "tests")


@pytest.mark.parametrize(
    ("fails", "told"),
    [
        ("", ()),
        ("tests", ("tests: failed, see tests.log",)),
        ("kernels", ("kernels: failed, see kernels.log",)),
        ("train", ("train-gpu-256: failed", "train-gpu-1024: failed")),
        ("peers", ("torch and other peers are missing",)),
    ],
)
def test_every_part_runs_on_a_gpu_and_what_failed_is_told(
    fails: str, told: tuple[str, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "my results"
    parsed = map(parse, commands("gpu_bench.sh", tmp_path, "my results", FAILS=fails))
    ran = [command.benchmark for command in parsed if isinstance(command, Bench)]
    error = capfd.readouterr().err
    assert all(words in error for words in told) and error.count("not done") == len(told)
    kinds = [BenchKernels, BenchTrain, BenchTrain, BenchRetrieval, BenchRetrieval, BenchRank, BenchPlan]
    assert [type(one) for one in ran] == kinds and {one.out for one in ran} == {out}
    assert [one.preset for one in ran if isinstance(one, BenchTrain)] == ["gpu-256", "gpu-1024"]
    kernels, crossover = ran[0], ran[3]
    assert isinstance(kernels, BenchKernels) and set(kernels.only or ()) == set(KERNELS)
    assert isinstance(crossover, BenchRetrieval) and crossover.crossover and not crossover.items and not crossover.exact
    assert {path.name for path in out.iterdir()} == {f"{part}.log" for part in PARTS}
    assert (out / "plan.log").read_text() == "told\n"


def test_the_parts_on_a_gpu_have_ten_minutes_together() -> None:
    text = (RUNS / "gpu_bench.sh").read_text(encoding="utf-8")
    limits = re.findall(r"^(?:JAX_PLATFORMS=\S+ )?part (\S+) (\d+) ", text, re.MULTILINE)
    assert [name for name, _ in limits] == list(PARTS) and sum(int(limit) for _, limit in limits) <= 600


def test_a_part_that_hangs_is_ended_and_what_had_no_time_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ran = commands("gpu_bench.sh", tmp_path / "hangs", "out", HANGS="kernels", BUDGET_S="10")
    error = capfd.readouterr().err
    assert ran[0][1] == "kernels" and re.search("kernels: out of time after [23] s; the folder has what it had written", error)
    assert (tmp_path / "hangs" / "out" / "kernels.log").read_text() == "told\n"
    assert not commands("gpu_bench.sh", tmp_path / "none", "out", BUDGET_S="0")
    error = capfd.readouterr().err
    assert all(f"{part}: no time was left for it" in error for part in PARTS)
