"""The command ``plan`` from its flags to its tables and JSON, and what bad input gets."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cda4rec_jax.cli import main

RUN = Path(__file__).resolve().parents[1] / "checkpoints" / "synthetic-tiny"
USER = "user-001"
Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Runs ``cda4rec`` on a terminal of 100 columns; gives exit code, stdout and stderr."""
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Traces of two requests, recorded by the command."""
    file = tmp_path_factory.mktemp("plan") / "traces.jsonl"
    assert main(["plan", "record", "--run", str(RUN), "--requests", "2", "--traces", str(file)]) == 0
    return file


def fits(text: str) -> bool:
    return max(map(len, text.splitlines())) <= 100 and "…" not in text


def test_explain_tells_terms_rules_and_flips_as_json(cli: Cli) -> None:
    flags = ("--run", RUN, "--user", USER, "--consent", "profile", "--free-memory-mb", 100)
    code, out, err = cli("plan", "explain", *flags, "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert told["context"]["consent"] == "PROFILE" and told["context"]["free_memory_mb"] == 100
    assert told["ranked"][0]["name"] == told["chosen"] and told["ranked"][1]["name"] == told["runner_up"]
    assert len(told["ranked"]) + len(told["forbidden"]) == 32
    assert {flip["axis"] for flip in told["flips"]} >= {"free_memory_mb", "consent", "link", "utility_per_ms", "cache_level"}
    assert all((flip["plan"] is None) == (flip["to"] is None) for flip in told["flips"])
    utilities = [terms["utility"] for terms in told["ranked"]]
    assert utilities == sorted(utilities, reverse=True)


@pytest.mark.parametrize("columns", [80, 100])
def test_explain_keeps_the_names_of_plans_whole(columns: int, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, _ = cli("plan", "explain", "--run", RUN, "--user", USER)
    assert code == 0 and max(map(len, out.splitlines())) <= columns
    assert out.count(" fresh-profile-500-device ") == (1 if columns == 100 else 2)
    assert " 0.3" in out and "mJ  exposed  up B" in out and "e+" not in out


def test_recommend_appends_a_trace_and_replay_reads_it(cli: Cli, traces: Path, tmp_path: Path) -> None:
    file, report = tmp_path / "traces.jsonl", tmp_path / "replay.json"
    file.write_bytes(traces.read_bytes())
    code, _, err = cli("recommend", "--run", RUN, "--user", USER, "--link", "offline", "--traces", file)
    assert (code, err) == (0, "")
    lines = file.read_text().splitlines()
    assert len(lines) == 3 and json.loads(lines[-1])["plan"].startswith("local-") and USER not in lines[-1]
    code, out, err = cli("plan", "replay", "--traces", file, "--run", RUN, "--json", report)
    assert (code, err) == (0, "")
    assert fits(out) and "equal plans: 3 of 3 (100.0%)" in out
    assert json.loads(report.read_text())["num_traces"] == 3


def test_diff_of_a_run_with_itself_agrees(cli: Cli, tmp_path: Path) -> None:
    report = tmp_path / "diff.json"
    code, out, err = cli("plan", "diff", "--run", RUN, "--other", RUN, "--requests", 100, "--json", report)
    assert code == 0
    assert all(line.startswith("requests of run ") for line in err.splitlines())  # told every ten seconds, on a slow machine
    assert max(map(len, (line for line in out.splitlines() if str(RUN) not in line))) <= 100
    assert "equal plans: 100.0%" in out and "link 3g" in out
    told = json.loads(report.read_text())
    assert told["all"]["agreement"] == 1.0 and told["pairs"] == []
    assert told["all"]["gain"]["low"] == told["all"]["gain"]["high"] == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("explain --run RUN --user nobody", "unknown user 'nobody'"),
        (f"explain --run RUN --user {USER} --round-trip-ms -3", "numbers of 0 or more, got round_trip_ms -3.0"),
        (f"explain --run RUN --user {USER} --link offline --round-trip-ms 9", "an offline device has no round_trip_ms: leave"),
        ("explain --run nowhere --user u", "There is no run at"),
        ("record --run RUN --traces FOLDER/t.jsonl --requests 0", "--requests must be above 0, got 0"),
        ("record --run RUN --traces FOLDER/no/t.jsonl", "cannot write traces to"),
        ("replay --run RUN --traces FOLDER/none.jsonl", "cannot read traces from"),
        ("replay --run RUN --traces FOLDER/bad.jsonl", "2 of 2 lines are no traces of version 1: line 1: "),
        ("replay --run RUN --traces FOLDER/bad.jsonl --json FOLDER/bad.jsonl", "is the file of the traces"),
        ("record --run RUN --traces FOLDER/other.json", "other.json holds something else than traces, which would be lost"),
        ("diff --run RUN --other RUN --json RUN/config.json", "config.json is a part of the run"),
        ("replay --run nowhere --traces nowhere --json FOLDER/no/replay.json", "Cannot write"),
        ("diff --run nowhere --other nowhere --json FOLDER/no/diff.json", "Cannot write"),
        (f"explain --run RUN --user {USER} --cache-age 2 --consent nothing", "no kept embedding of level nothing and age 2"),
        ("diff --run RUN --other FOLDER/none", "There is no run at"),
        ("diff --run RUN --other RUN --requests 1", "--requests is 1: expected at least 2"),
        ("diff --run RUN --other RUN --seed -1", "--seed must be 0 or more, got -1"),
    ],
)
def test_bad_input_gets_one_message_and_code_2(arguments: str, message: str, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{}\nnot json\n")
    (tmp_path / "other.json").write_text("{}")
    given = arguments.replace("RUN", str(RUN)).replace("FOLDER", str(tmp_path)).split()
    code, _, err = cli("plan", *given)
    assert code == 2 and "Traceback" not in err
    assert err.count("cda4rec: ") == 1 and message in " ".join(err.split())
    assert (tmp_path / "bad.jsonl").read_text() == "{}\nnot json\n" and (tmp_path / "other.json").read_text() == "{}"
