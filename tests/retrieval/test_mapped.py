"""What the memory-mapped index does beyond the contract of every index: it streams, stays in its files, and says what is wrong."""

from pathlib import Path

import numpy as np
import pytest

from cda4rec_jax.errors import UserError
from cda4rec_jax.kernels.topk_dot.native import native_problem
from cda4rec_jax.retrieval import ExactIndex, MappedIndex, QuantisedIndex, load_index, mapped

pytestmark = pytest.mark.skipif(native_problem() is not None, reason="there is no C++ compiler here")


def make_vectors(rows: int = 150, width: int = 8) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(rows, width)).astype(np.float32)


@pytest.mark.parametrize("cuts", [(), (1, 2), (7, 16, 48, 149)], ids=str)
def test_rows_that_come_in_any_pieces_give_the_table_of_all(cuts: tuple[int, ...], tmp_path: Path) -> None:
    vectors = make_vectors()
    index = MappedIndex.build_streamed(np.split(vectors, cuts), tmp_path)
    whole = QuantisedIndex.build(vectors)._table
    for name in ("items", "codes", "scales", "residuals", "norms"):
        np.testing.assert_array_equal(getattr(index._table, name), getattr(whole, name), err_msg=name)
    assert index.num_items == 149


def test_the_search_reads_the_files_and_no_copy_of_them(tmp_path: Path) -> None:
    """Otherwise serving 10 million items would take their whole table into memory."""
    MappedIndex.build_streamed([make_vectors()], tmp_path)
    index = MappedIndex.load(tmp_path)
    assert isinstance(index._rows.vectors, np.memmap)
    assert index._table.items.unsafe_buffer_pointer() == index._rows.vectors.ctypes.data
    maps = Path("/proc/self/maps")
    if maps.is_file():
        codes = [line for line in maps.read_text().splitlines() if line.endswith(str(tmp_path / "codes.npy"))]
        first, last = (int(address, 16) for address in codes[0].split()[0].split("-"))
        assert first <= index._table.codes.unsafe_buffer_pointer() < last


def test_changes_leave_the_files_that_were_opened_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "CHUNK_ROWS", 32)
    vectors = make_vectors()
    MappedIndex.build_streamed([vectors], tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    index = MappedIndex.load(tmp_path)
    items = np.array([160, 31, 32, 5])
    index.upsert(items, 9 * vectors[items % 150])
    index.delete(np.array([7]))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    exact = ExactIndex.build(vectors)
    exact.upsert(items, 9 * vectors[items % 150])
    exact.delete(np.array([7]))
    index.save(tmp_path)
    for opened in (index, load_index(tmp_path)):
        for found, expected in zip(opened.search(vectors[:9], 140), exact.search(vectors[:9], 140), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_an_index_that_is_served_survives_that_its_folder_gets_another(tmp_path: Path) -> None:
    """Files that are cut off under a process that has them mapped end it, and files that are written over change its answers."""
    vectors = make_vectors(40_000)
    MappedIndex.build_streamed([vectors], tmp_path / "index")
    served, expected = MappedIndex.load(tmp_path / "index"), ExactIndex.build(vectors).search(vectors[:9], 20)
    for count, write in ((20, MappedIndex.build_streamed), (30, lambda chunks, path: MappedIndex.build(chunks[0]).save(path))):
        write([make_vectors(count)], tmp_path / "index")
        assert load_index(tmp_path / "index").num_items == count - 1
        for found, wanted in zip(served.search(vectors[:9], 20), expected, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-5)
    served.save(tmp_path / "index")
    np.testing.assert_array_equal(load_index(tmp_path / "index").search(vectors[:9], 20)[0], expected[0])


def test_bad_pieces_and_damaged_folders_raise(tmp_path: Path) -> None:
    vectors = make_vectors()
    with pytest.raises(UserError, match="widths 8 and 5"):
        MappedIndex.build_streamed([vectors, vectors[:, :5]], tmp_path)
    with pytest.raises(UserError, match="NaN"):
        MappedIndex.build_streamed([vectors, np.full((1, 8), np.nan, np.float32)], tmp_path)
    with pytest.raises(UserError, match="0 rows; expected row 0"):
        MappedIndex.build_streamed([], tmp_path)
    with pytest.raises(UserError, match="is no index"):
        MappedIndex.load(tmp_path)
    MappedIndex.build_streamed([vectors], tmp_path)
    np.save(tmp_path / "norms.npy", np.zeros(3, np.float32))
    with pytest.raises(UserError, match=r"norms.npy is missing or damaged \(shape \(3,\), expected \(160,\)\)"):
        MappedIndex.load(tmp_path)
    (tmp_path / "codes.npy").unlink()
    with pytest.raises(UserError, match=r"codes.npy is missing"):
        MappedIndex.load(tmp_path)
    ExactIndex.build(vectors).save(tmp_path)
    with pytest.raises(UserError, match="implementation 'exact'; expected 'mapped'"):
        MappedIndex.load(tmp_path)
