"""Every experiment tells its options on the command line."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import tyro

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
NAMES = sorted(path.stem for path in EXPERIMENTS.glob("*.py") if "    run_script(main, " in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_help_tells_all_options_of_an_experiment(
    name: str, scripts: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        tyro.cli(scripts(name).main, args=["--help"], config=scripts("harness").COMMAND_LINE)
    assert stopped.value.code == 0
    assert "--out PATH" in capsys.readouterr().out
