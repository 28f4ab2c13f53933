"""The code of docs/planner.md and the cells of docs/planner.ipynb run as they stand, and do what the text says."""

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
TUTORIAL = (ROOT / "docs" / "planner.md").read_text(encoding="utf-8")
NOTEBOOK = json.loads((ROOT / "docs" / "planner.ipynb").read_text(encoding="utf-8"))
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TUTORIAL, re.MULTILINE | re.DOTALL)
CELLS = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
OWN = "fresh-recent-50-device"


def executed(folder: Path, program: str) -> str:
    """What a program prints that is run with ``folder`` as its working directory, and stands elsewhere, as an installed command does."""
    script = folder.parent / f"{folder.name}-program" / "program.py"
    script.parent.mkdir()
    script.write_text(program, encoding="utf-8")
    # A process of its own, as a user's is: data loaders map over batches in ways that break the annotations that tests check.
    done = subprocess.run([sys.executable, str(script)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def as_program(blocks: list[tuple[str, str]]) -> str:
    """Commands through the entry of the command line, and Python as it stands, in one process."""
    lines = ["from cda4rec_jax.cli import main"]
    for language, text in blocks:
        if language == "python":
            lines.append(text)
        else:
            lines += [f"assert main({shlex.split(command)[1:]!r}) == 0" for command in text.splitlines()]
    return "\n".join(lines)


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The folder after all of the tutorial's code has run, what it printed, and a decision on LTE and one on WiFi."""
    folder = tmp_path_factory.mktemp("tutorial")
    (_, module), *rest = BLOCKS
    (folder / "my_planner.py").write_text(module, encoding="utf-8")
    ask = "cda4rec recommend --run runs/mine --user user-001 --json --plan fresh-recent-50-device --link"
    marked = [("python", "print('#lte')"), ("sh", f"{ask} lte"), ("python", "print('#wifi')"), ("sh", f"{ask} wifi")]
    printed, answers = executed(folder, as_program([*rest, *marked])).split("#lte\n")
    lte, wifi = answers.split("#wifi\n")
    return SimpleNamespace(folder=folder, printed=printed, lte=json.loads(lte), wifi=json.loads(wifi))


def test_the_tutorials_planner_has_about_twenty_lines():
    body = [
        line for line in BLOCKS[0][1].splitlines() if line.strip() and not line.lstrip().startswith(('"""', "import", "from"))
    ]
    assert len(body) <= 20


def test_the_tutorial_trains_evaluates_and_explains_its_planner(tutorial):
    config = json.loads((tutorial.folder / "runs/mine/config.json").read_text())["config"]
    assert config["system"]["planner"]["target"] == "my_planner:LinearPlanner"
    assert f"{OWN} ('mobile_data',)\nLinearPlanner" in tutorial.printed
    assert "price of mobile data" in tutorial.printed
    results = json.loads((tutorial.folder / "runs/mine/results.json").read_text())
    assert f"fixed {OWN}" in [row["name"] for row in results["planners"]]
    assert "policy" in [row["name"] for row in results["planners"]]


def test_a_decision_is_the_sum_of_its_terms_with_the_own_one_among_them(tutorial):
    for answer, sign in ((tutorial.lte, -1), (tutorial.wifi, 0)):
        plan = answer["plan"]
        assert plan["name"] == plan["executed"] == OWN
        chosen = plan["chosen"]
        assert set(chosen["own"]) == {"mobile_data"}
        if sign:
            megabytes = (chosen["uplink_bytes"] + chosen["downlink_bytes"]) / 1e6
            assert chosen["own"]["mobile_data"] == pytest.approx(-0.05 * megabytes, rel=1e-4)
        else:
            assert chosen["own"]["mobile_data"] == 0
        terms = sum(chosen[name] for name in ("quality", "time", "energy", "exposure")) + chosen["own"]["mobile_data"]
        assert chosen["utility"] == pytest.approx(terms)
        assert chosen["logit"] == pytest.approx(terms / plan["tau"], rel=1e-3)


def test_a_run_whose_planner_is_gone_or_has_changed_is_refused(tutorial, monkeypatch):
    from cda4rec_jax.errors import UserError
    from cda4rec_jax.runs.artifacts import load_trained

    with pytest.raises(UserError, match="there is no module 'my_planner'"):
        load_trained(tutorial.folder / "runs/mine")
    other = tutorial.folder / "changed"
    other.mkdir()
    (other / "my_planner.py").write_text(BLOCKS[0][1].replace("RECENT, 50", "RECENT, 60"), encoding="utf-8")
    monkeypatch.syspath_prepend(other)
    monkeypatch.delitem(sys.modules, "my_planner", raising=False)
    with pytest.raises(UserError, match=r"has the plans fresh-recent-60-device.*trained with fresh-recent-50-device"):
        load_trained(tutorial.folder / "runs/mine")
    monkeypatch.delitem(sys.modules, "my_planner")


def test_every_file_that_the_tutorial_names_exists():
    links = re.findall(r"\]\((?!https?://)([^)]+)\)", TUTORIAL)
    assert len(links) >= 8
    assert not [link for link in links if not (ROOT / "docs" / link).exists()]


def test_the_notebook_is_plain_python_without_outputs():
    assert NOTEBOOK["nbformat"] == 4
    for cell in NOTEBOOK["cells"]:
        assert cell["id"]
        if cell["cell_type"] == "code":
            assert not cell["outputs"] and cell["execution_count"] is None
            ast.parse("".join(cell["source"]))


def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")  # which the notebook finds beside its folder
    program = "\n".join(["import matplotlib", "matplotlib.use('Agg')", *CELLS, "print('#figures', len(plt.get_fignums()))"])
    assert "#figures 2" in executed(folder, program)
