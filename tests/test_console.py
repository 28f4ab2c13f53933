"""What is shown of long work where there is no terminal."""

import io
import shlex

import pytest
from rich.console import Console

from cda4rec_jax.cli import console as views
from cda4rec_jax.cli.console import StagesView, TrainingView, in_shell
from cda4rec_jax.training import Progress


@pytest.mark.parametrize(("seconds", "expected"), [(-1.0, "building: 1 of 2,000\nbuilding: 2 of 2,000\n"), (60.0, "")])
def test_stages_are_told_on_standard_error_now_and_then(
    seconds: float, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(views, "PLAIN_LINE_SECONDS", seconds)
    results = io.StringIO()
    with StagesView(Console(file=results)) as view:
        for done in (1, 2):
            view.progress("building", done, 2000)
    assert results.getvalue() == ""
    assert capsys.readouterr().err == expected


def test_what_is_told_of_a_loss_is_that_of_what_is_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "PLAIN_LINE_SECONDS", -1.0)
    results = io.StringIO()
    view = TrainingView(Console(file=results))
    values = {"cloud_loss": 6.5, "device_loss": 0.25, "fusion_loss": 3.8, "decision_loss": 2300.0, "loss": 2310.55}
    for phase in ("joint", "planner", "policy"):
        view.watch(Progress(phase=phase, step=1, num_steps=9, values=values))
    lines = results.getvalue().splitlines()
    assert [line.partition(" of 9")[2] for line in lines] == [", loss 6.750", ", fusion loss 3.800", ""]


def test_a_command_to_copy_is_read_by_a_shell_as_it_is_meant() -> None:
    words = ("my runs/[one]", "--user", "O'Brien; ls", "--link", "3g")
    assert shlex.split(in_shell("cda4rec recommend --run", *words)) == ["cda4rec", "recommend", "--run", *words]
    assert in_shell("cda4rec train --out", "runs/a", "--resume") == "cda4rec train --out runs/a --resume"
