"""What the README and the pages beside it tell a stranger to type, and where they send them, is there."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from cda4rec_jax.cli.app import parse
from cda4rec_jax.planner import PLANS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / name for name in ("README.md", "docs/commands.md", "docs/performance.md", "docs/results.md")]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
README = TEXTS[ROOT / "README.md"]
# A block with a language is something else: a figure, what a command prints.
BLOCKS = [
    block
    for text in TEXTS.values()
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    if not language
]
COMMANDS = sorted({line for block in BLOCKS for line in block.splitlines()})


def test_every_line_of_a_code_block_is_a_command_that_is_tested_here() -> None:
    assert len(COMMANDS) >= 15
    assert {line.split()[0] for line in COMMANDS} == {"make", "cda4rec"}


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("cda4rec")])
def test_every_cda4rec_command_parses(line: str) -> None:
    assert parse(shlex.split(line)[1:])


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("make")])
def test_every_make_target_exists_and_so_does_its_variable(line: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    _, target, *settings = line.split()
    assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    assert all(f"$({setting.split('=')[0]})" in makefile for setting in settings)


def test_the_example_in_python_recommends(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```$", README, re.M | re.S)
    monkeypatch.chdir(ROOT)
    named: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), named)
    name, num_bytes, titles = capsys.readouterr().out.split(maxsplit=2)
    assert name in {plan.name for plan in PLANS} and int(num_bytes) >= 0 and titles.startswith("['")
    scores = [item.score for item in named["found"].items]
    assert len(scores) == 10 and scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_or_a_heading_leads_somewhere(page: Path) -> None:
    missing = []
    for link in re.findall(r"\]\((?!https?://)([^)]+)\)", TEXTS[page]):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            missing.append(link)
    assert not missing


def test_every_file_that_is_named_exists() -> None:
    paths = re.findall(r"`((?:cda4rec_jax|tests|experiments|kernels)/[^`]*|\.ci/run)`", "\n".join(TEXTS.values()))
    assert len(paths) >= 20
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_every_plan_that_is_named_exists() -> None:
    named = set(re.findall(r"`((?:fresh|reuse|local|cloud)-[a-z0-9-]+)`", README))
    assert len(named) >= 4
    assert named <= {plan.name for plan in PLANS}


def _anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}
