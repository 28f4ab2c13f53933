"""Prepared folders: exact, atomic, versioned, and without TensorFlow."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cda4rec_jax.data import builder, load_prepared, prepare, read_interactions, write_prepared
from cda4rec_jax.data.synthetic import SyntheticConfig, synthetic_world
from cda4rec_jax.errors import UserError

INTER = "user_id:token\titem_id:token\ttimestamp:float\n"


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A RecBole folder: 8 users, 6 items, one of them rare, unix seconds with fractions."""
    folder = tmp_path / "shop"
    folder.mkdir()
    rows = [f"u{user}\ti{(user + 2 * j) % 5}\t{1_700_000_000 + 1000 * user + j + 0.125}\n" for user in range(8) for j in range(5)]
    (folder / "shop.inter").write_text(INTER + "".join(rows) + "u0\trare\t1800000000.5\n")
    items = "".join(f"i{j}\tItem é {j}\tAll | Kind {j % 2}\n" for j in range(5))
    (folder / "shop.item").write_text("item_id:token\ttitle:token_seq\tcategories:token_seq\n" + items, encoding="utf-8")
    (folder / "shop.user").write_text("user_id:token\tage:float\nu1\t30\n")
    return folder


def test_a_prepared_folder_gives_back_exactly_what_was_prepared(shop: Path, tmp_path: Path) -> None:
    report = prepare(str(shop), tmp_path / "out", k_core=1)
    raw, loaded = read_interactions(str(shop)), read_interactions(str(tmp_path / "out"))
    assert loaded.fingerprint == raw.fingerprint == report.fingerprint
    assert loaded.name == "shop"
    np.testing.assert_array_equal(loaded.timestamps, raw.timestamps, strict=True)
    np.testing.assert_array_equal(loaded.items, raw.items, strict=True)
    assert (tmp_path / "out").rename(tmp_path / "moved").exists()
    assert load_prepared(tmp_path / "moved").fingerprint == raw.fingerprint


def test_the_report_tells_what_was_dropped_and_progress_reaches_the_end(shop: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = prepare(str(shop), tmp_path / "out", k_core=5, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (8, 8)
    assert report.lines() == [
        f"read {shop}: 8 users, 6 items, 41 interactions",
        "kept 1 items: without a title: the title is empty (rare)",
        "dropped 1 items: outside the 5-core",
        "dropped 1 interactions: outside the 5-core",
        "timestamps: unix seconds, 2023-11-14 to 2023-11-15",
        f"wrote {tmp_path / 'out'}: 8 users, 5 items, 40 interactions (5-core, fingerprint {report.fingerprint[:12]})",
    ]


def test_preparing_again_replaces_the_dataset_and_leaves_nothing_behind(shop: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = prepare(str(shop), out, k_core=1)
    second = prepare(str(shop), out, k_core=5)
    assert load_prepared(out).fingerprint == second.fingerprint != first.fingerprint
    assert len(list(out.iterdir())) == 2


def test_a_failed_preparation_leaves_the_old_dataset_whole(shop: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = prepare(str(shop), out, k_core=1)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(str(shop), out, k_core=5, progress=interrupt)
    (shop / "shop.inter").write_text(INTER + "u1\ti1\tnan\n")
    with pytest.raises(UserError, match="line 2"):
        prepare(str(shop), out)
    assert load_prepared(out).fingerprint == first.fingerprint
    assert len(list(out.iterdir())) == 2


def test_left_overs_of_a_killed_preparation_do_not_stop_the_next(shop: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "data-0123abcd").mkdir(parents=True)
    prepare(str(shop), tmp_path / "out")
    assert not (tmp_path / "out" / "data-0123abcd").exists()


def test_a_folder_that_holds_something_else_is_not_touched(shop: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds shop.inter, shop.item, shop.user, no prepared dataset: choose an empty"):
        prepare(str(shop), shop)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="it is a file"):
        prepare(str(shop), tmp_path / "notes.txt")
    with pytest.raises(UserError, match=r"cannot write to .*: Not a directory"):
        prepare(str(shop), tmp_path / "notes.txt" / "out")


def test_a_write_that_fails_is_told_with_its_reason(shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(builder, "write_users", full)
    with pytest.raises(UserError, match=r"cannot write to .*: No space left on device"):
        prepare(str(shop), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_another_version_says_what_to_do(shop: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(str(shop), out)
    metadata = json.loads((out / "metadata.json").read_text())
    (out / "metadata.json").write_text(json.dumps(metadata | {"version": 99}))
    with pytest.raises(
        UserError, match=r"format version 99, this program reads version 1: prepare it again with 'cda4rec prepare"
    ):
        load_prepared(out)
    prepare(str(shop), out)
    assert load_prepared(out).num_users == 8


def test_damage_is_noticed(shop: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(str(shop), out)
    good = (out / "metadata.json").read_text()
    changed = json.loads(good)
    changed["titles"][0] = "another title"
    for content, message in ((json.dumps(changed), "has fingerprint"), (good[:100], "is not JSON"), ("[]", "not of format")):
        (out / "metadata.json").write_text(content)
        with pytest.raises(UserError, match=message):
            read_interactions(str(out))
    (out / "metadata.json").write_text(good)
    records = next(out.rglob("*.array_record*"))
    records.write_bytes(records.read_bytes()[:50])
    with pytest.raises(UserError, match="is damaged"):
        load_prepared(out)
    records.unlink()
    with pytest.raises(UserError, match="is damaged"):
        load_prepared(out)


def test_neither_writing_nor_reading_needs_tensorflow_or_a_network_or_prints(shop: Path, tmp_path: Path) -> None:
    script = f"""
import socket, sys
def refuse(*args): raise AssertionError("a connection was tried")
socket.socket.connect = refuse
from cda4rec_jax.data import load_prepared, prepare
prepare({str(shop)!r}, {str(tmp_path / "out")!r})
assert load_prepared({str(tmp_path / "out")!r}).num_users == 8
assert "tensorflow" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", "")


def test_interactions_in_memory_are_written_as_they_are(tmp_path: Path) -> None:
    data = synthetic_world(SyntheticConfig(num_users=5, num_items=64)).interactions
    assert len(np.unique(data.items)) < data.num_items  # some items have no event
    report = write_prepared(data, tmp_path / "data", "a world")
    assert report.before == report.after and report.findings == () and report.source == "a world"
    assert load_prepared(tmp_path / "data").fingerprint == data.fingerprint
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(UserError, match="no prepared dataset"):
        write_prepared(data, tmp_path / "other", "a world")
