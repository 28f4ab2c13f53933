"""Where compiled programs are kept, with a home directory and without one."""

import os
import stat
import tempfile
from pathlib import Path
from typing import NoReturn

import pytest

from cda4rec_jax.cli import process
from cda4rec_jax.errors import UserError
from cda4rec_jax.kernels import native_build
from cda4rec_jax.user_cache import cache_folder


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """As a container's user without an entry and without $HOME; gives the folder for temporary files."""

    def fail() -> NoReturn:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", fail)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_the_variable_comes_first_and_then_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "cda4rec_jax"
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert cache_folder() == Path("/home/somebody/.cache/cda4rec_jax")


def test_without_a_home_a_temporary_folder_of_this_user_alone_is_taken(homeless: Path) -> None:
    expected = homeless / f"cda4rec_jax-{os.getuid()}"
    for _ in range(2):
        assert cache_folder() == expected and stat.S_IMODE(expected.stat().st_mode) == 0o700
    assert process._cache_folder().is_relative_to(expected)


def test_a_temporary_folder_that_others_could_write_is_refused_and_told(homeless: Path) -> None:
    folder = homeless / f"cda4rec_jax-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(UserError, match="is not this user's alone: set XDG_CACHE_HOME"):
        cache_folder()
    native_build._told.cache_clear()
    problem = native_build.provide(Path(native_build.__file__).parent / "topk_dot" / "native.cc", {})
    assert problem is not None and ("set XDG_CACHE_HOME" in problem or "no C++ compiler" in problem)
