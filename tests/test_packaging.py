"""What is installed is what is in the repository, from a wheel and an sdist, and never from a checkout without symbolic links."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import cda4rec_jax

ROOT = Path(__file__).resolve().parents[1]
KERNEL_FILES = {
    f"cda4rec_jax/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").rglob("*.*") if path.suffix in (".py", ".cc", ".h")
}
MODULES = {str(path.relative_to(ROOT)) for pattern in ("*.py", "times_*.json") for path in (ROOT / "cda4rec_jax").rglob(pattern)}
MODULES |= KERNEL_FILES
BUILD = """
import sys
from setuptools import build_meta
folder = sys.argv[1]  # building replaces sys.argv
build_meta.build_wheel(folder)
build_meta.build_sdist(folder)
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that packaging reads, so that building leaves nothing in the repository."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("cda4rec_jax", "kernels"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def dist(checkout: Path) -> Path:
    """A folder with a wheel and an sdist, built by the backend alone: no isolation, no network."""
    folder = checkout / "dist"
    folder.mkdir()
    built = subprocess.run([sys.executable, "-c", BUILD, str(folder)], cwd=checkout, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


def test_kernels_is_a_committed_relative_symlink() -> None:
    assert (ROOT / "cda4rec_jax" / "kernels").is_symlink()
    assert (ROOT / "cda4rec_jax" / "kernels").readlink() == Path("../kernels")
    assert not (ROOT / "kernels" / "__init__.py").exists(), (
        "a top-level package `kernels` shadows the one that transformers imports"
    )


def test_wheel_holds_every_module_and_the_type_marker(dist: Path) -> None:
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    assert KERNEL_FILES and MODULES | {"cda4rec_jax/py.typed"} <= names
    assert all(name.startswith("cda4rec_jax") for name in names), "the wheel installs something beside the package"


def test_sdist_holds_every_module_the_type_marker_and_the_license(dist: Path) -> None:
    with tarfile.open(next(dist.glob("*.tar.gz"))) as sdist:
        names = {member.name.partition("/")[2] for member in sdist.getmembers() if member.isfile()}
    assert MODULES | {"cda4rec_jax/py.typed", "LICENSE", "README.md"} <= names


def test_an_installed_wheel_imports_with_its_kernels(dist: Path, tmp_path: Path) -> None:
    wheel = next(dist.glob("*.whl"))
    install = ["-m", "pip", "install", "-q", "--no-deps", "--no-index", "--disable-pip-version-check", "--target", str(tmp_path)]
    subprocess.run([sys.executable, *install, str(wheel)], check=True, capture_output=True)
    program = (
        "import cda4rec_jax, cda4rec_jax.kernels.linear_cross_entropy as k; print(cda4rec_jax.__file__, k.__file__, sep='\\n')"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    output = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    assert all(Path(line).is_relative_to(tmp_path) for line in output.stdout.split())


def test_a_checkout_without_symlinks_fails_at_import_and_names_the_cause(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "cda4rec_jax", tmp_path / "cda4rec_jax", symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "cda4rec_jax" / "kernels").unlink()
    (tmp_path / "cda4rec_jax" / "kernels").write_text("../kernels")  # what git leaves where core.symlinks is false
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    failed = subprocess.run(
        [sys.executable, "-c", "import cda4rec_jax"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert failed.returncode == 1
    assert "ImportError" in failed.stderr and "without symbolic links" in failed.stderr


def test_the_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    newest = re.search(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert newest is not None and newest.group(1) == project["version"] == cda4rec_jax.__version__
