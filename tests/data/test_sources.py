"""Where interactions may come from."""

from pathlib import Path

import pytest

from cda4rec_jax.data import read_interactions
from cda4rec_jax.errors import UserError


def refusal(source: str) -> str:
    with pytest.raises(UserError) as caught:
        read_interactions(source)
    return str(caught.value)


def test_an_unknown_source_is_refused_with_what_was_found(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    assert "holds notes.txt: expected 'synthetic', a prepared folder" in refusal(str(tmp_path))
    assert "is a file: expected" in refusal(str(tmp_path / "notes.txt"))
    assert "does not exist: expected" in refusal(str(tmp_path / "nowhere"))


def test_the_synthetic_world_takes_settings_by_full_or_short_name() -> None:
    data = read_interactions("synthetic:seed=3,users=40,num_items=70")
    assert (data.num_users, data.num_items) == (40, 70)
    assert data.fingerprint == read_interactions("synthetic:users=40,items=70,seed=3").fingerprint
    assert data.fingerprint != read_interactions("synthetic:users=40,items=70,seed=4").fingerprint


def test_wrong_synthetic_settings_are_all_told() -> None:
    message = refusal("synthetic:user=40,items=many,drift=x,qqq=1")
    assert "unknown setting 'user': did you mean 'users'?" in message
    assert "items must be a whole number, got 'many'" in message
    assert "drift must be a number, got 'x'" in message
    assert "unknown setting 'qqq': expected one of seed, num_users" in message
