"""What the README tells a stranger to type, and where it sends them, is there."""

import re
import shlex
from pathlib import Path

import pytest

from cda4rec_jax.cli.app import parse
from cda4rec_jax.planner import PLANS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"^```\n(.*?)^```", README, re.MULTILINE | re.DOTALL) for line in block.splitlines()]


def test_every_line_of_a_code_block_is_a_command_that_is_tested_here() -> None:
    assert len(COMMANDS) >= 10
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


def test_every_file_that_is_named_exists() -> None:
    links = re.findall(r"\]\((?!https?://)([^)]+)\)", README)
    paths = re.findall(r"`((?:cda4rec_jax|tests|experiments|kernels)/[^`]*|\.ci/run)`", README)
    assert len(paths) >= 20
    missing = [path for path in {*links, *paths} if not (ROOT / path).exists()]
    assert not missing


def test_every_plan_that_is_named_exists() -> None:
    named = set(re.findall(r"`((?:fresh|reuse|local|cloud)-[a-z0-9-]+)`", README))
    assert len(named) >= 4
    assert named <= {plan.name for plan in PLANS}
