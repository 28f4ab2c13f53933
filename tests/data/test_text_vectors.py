"""A file of text vectors gives every item its own row, and never the row of another item that has its id."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cda4rec_jax.data import Interactions, k_core, read_interactions
from cda4rec_jax.data.text import TfidfSvd
from cda4rec_jax.data.text_vectors import TextVectors, check_destination, encode_items, load_text_vectors, save_text_vectors
from cda4rec_jax.errors import UserError


@pytest.fixture(scope="module")
def world() -> Interactions:
    return read_interactions("synthetic:users=60,items=80")


@pytest.fixture(scope="module")
def vectors(world: Interactions) -> TextVectors:
    return encode_items(world, TfidfSvd(dimensions=8), "0" * 64)


def test_a_file_gives_back_what_was_written(vectors: TextVectors, world: Interactions, tmp_path: Path) -> None:
    file = tmp_path / "new" / "vectors.npz"
    for _ in range(2):
        check_destination(file)
        save_text_vectors(file, vectors)
    stored = load_text_vectors(file)
    np.testing.assert_array_equal(stored.vectors, vectors.vectors)
    np.testing.assert_array_equal(stored.text_hashes, vectors.text_hashes)
    assert (stored.item_ids, stored.provider) == (world.item_ids, "tfidf-svd-8")
    assert (stored.dataset_fingerprint, stored.model_fingerprint) == (world.fingerprint, "0" * 64)
    assert [path.name for path in file.parent.iterdir()] == ["vectors.npz"]


def test_rows_follow_the_items_of_a_part_of_the_dataset(vectors: TextVectors, world: Interactions) -> None:
    core, _ = k_core(world, 12)
    assert core.num_items < world.num_items
    rows = vectors.rows(core)
    for row, item in zip(rows, core.item_ids, strict=True):
        np.testing.assert_array_equal(row, vectors.vectors[world.item_ids.index(item)])


def test_items_without_a_vector_or_with_another_text_are_counted_and_named(vectors: TextVectors, world: Interactions) -> None:
    other = replace(
        world,
        name="shop",
        item_ids=("new-1", *world.item_ids[1:]),
        titles=(*world.titles[:2], "Another thing", *world.titles[3:]),
    )
    with pytest.raises(UserError) as error:
        vectors.rows(other)
    message = str(error.value)
    assert f"1 of the {world.num_items} items of shop have no vector (new-1)" in message
    assert f"1 of the {world.num_items} items of shop had another title or other categories ({world.item_ids[2]})" in message


def test_a_file_that_holds_something_else_is_refused_and_never_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "x.npz"
    for content in (b"PK\x03\x04", b"precious", b""):
        file.write_bytes(content)
        for check in (load_text_vectors, check_destination):
            with pytest.raises(UserError, match=r"x\.npz cannot be read as text vectors"):
                check(file)
        assert file.read_bytes() == content
    np.savez(file, statistics=np.zeros(3))
    with pytest.raises(UserError, match=r"x\.npz holds no text vectors .* but statistics: make the file with 'cda4rec encode"):
        check_destination(file)
    with pytest.raises(UserError, match="the file does not exist"):
        load_text_vectors(tmp_path / "none.npz")
    with pytest.raises(UserError, match="the file is a folder"):
        load_text_vectors(tmp_path)


def test_vectors_that_contradict_their_items_are_refused(vectors: TextVectors, tmp_path: Path) -> None:
    file = tmp_path / "x.npz"
    for wrong in (vectors.vectors[1:], vectors.vectors * np.float32("nan"), vectors.vectors.astype(np.float64)):
        save_text_vectors(file, vectors)
        with np.load(file) as stored:
            arrays: dict[str, Any] = {**stored, "vectors": wrong}
        np.savez(file, **arrays)
        with pytest.raises(UserError, match=r"x\.npz is damaged"):
            load_text_vectors(file)


def test_a_place_that_cannot_be_written_is_refused(vectors: TextVectors, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    below = tmp_path / "file" / "below.npz"
    for refuse in (check_destination, lambda file: save_text_vectors(file, vectors)):
        with pytest.raises(UserError, match="cannot write"):
            refuse(below)
    with pytest.raises(UserError, match=r"ends in \.npz"):
        check_destination(tmp_path / "vectors.npy")
    assert (tmp_path / "file").read_text() == "precious"
