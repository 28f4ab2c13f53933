"""What is shown of long work where there is no terminal."""

import io

import pytest
from rich.console import Console

from cda4rec_jax.cli import console as views
from cda4rec_jax.cli.console import StagesView


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
