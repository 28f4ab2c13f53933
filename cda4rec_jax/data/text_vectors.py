"""The vectors of a catalogue's texts as a file, so that training needs neither the model that made them nor its packages.

An ``.npz`` of arrays: ``vectors`` float32 [items, z]; ``item_ids``, the external ids of its rows; ``text_hashes``, what each row was
made from; and the strings ``provider``, ``dataset_fingerprint``, ``model_fingerprint``, beside the ``format`` of the file.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt64

from cda4rec_jax.data.interactions import Interactions
from cda4rec_jax.data.text import TextProvider, item_texts
from cda4rec_jax.errors import UserError

FORMAT = "cda4rec-text-1"
_STRINGS = ("format", "provider", "dataset_fingerprint", "model_fingerprint")
_HOW = "make the file with 'cda4rec encode SOURCE --model FOLDER --out FILE.npz'"


@dataclass(frozen=True, kw_only=True, eq=False)
class TextVectors:
    """A vector for each item of a dataset, and where it comes from.

    Attributes:
        vectors: one row per item, mean row norm 1.
        item_ids: external ids.
        text_hashes: of the text of each item, since datasets use the same ids for other items.
        provider: name of what made the vectors.
        dataset_fingerprint: of the interactions whose items were encoded.
        model_fingerprint: SHA-256 (hex) of the model's weights.
    """

    vectors: Float32[np.ndarray, "items z"]
    item_ids: tuple[str, ...]
    text_hashes: UInt64[np.ndarray, "items"]
    provider: str
    dataset_fingerprint: str
    model_fingerprint: str

    def rows(self, interactions: Interactions) -> Float32[np.ndarray, "items z"]:
        """The rows of these items, in their order. The dataset may be a part of the one that was encoded, such as its k-core.

        Raises:
            UserError: items have no vector, or had another text when they were encoded (both are counted, with examples).
        """
        place = {item: row for row, item in enumerate(self.item_ids)}
        found = [place.get(item, -1) for item in interactions.item_ids]
        hashes = text_hashes(item_texts(interactions.titles, interactions.categories))
        missing = [item for item, row in zip(interactions.item_ids, found, strict=True) if row < 0]
        changed = [
            item
            for item, row, text in zip(interactions.item_ids, found, hashes, strict=True)
            if row >= 0 and self.text_hashes[row] != text
        ]
        problems = [
            f"{len(items):,} of the {interactions.num_items:,} items of {interactions.name} {what} ({_examples(items)})"
            for items, what in ((missing, "have no vector"), (changed, "had another title or other categories"))
            if items
        ]
        if problems:
            raise UserError(f"text vectors ({self.provider}) of other items: {'; '.join(problems)}. For this dataset, {_HOW}")
        return self.vectors[np.array(found, np.int64)]


def encode_items(interactions: Interactions, provider: TextProvider, model_fingerprint: str) -> TextVectors:
    """The text of every item, encoded."""
    texts = item_texts(interactions.titles, interactions.categories)
    return TextVectors(
        vectors=provider.encode(texts),
        item_ids=interactions.item_ids,
        text_hashes=text_hashes(texts),
        provider=provider.name,
        dataset_fingerprint=interactions.fingerprint,
        model_fingerprint=model_fingerprint,
    )


def text_hashes(texts: Sequence[str]) -> UInt64[np.ndarray, "items"]:
    """64 bits of each text's SHA-256."""
    digests = b"".join(hashlib.sha256(text.encode()).digest()[:8] for text in texts)
    return np.frombuffer(digests, "<u8").astype(np.uint64)


def check_destination(file: Path) -> None:
    """Raise UserError unless vectors can be written there: over older vectors or nothing. Writes nothing."""
    if file.suffix != ".npz":
        raise UserError(f"text vectors are an .npz file, got {file}: give it a name that ends in .npz")
    if file.exists():
        load_text_vectors(file)
    folder = next(folder for folder in file.absolute().parents if folder.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"cannot write {file}: {folder} is no folder that can be written; choose another --out")


def save_text_vectors(file: Path, vectors: TextVectors) -> None:
    """Write the file, and its folder if need be; an older file stays until the new one is complete.

    Raises:
        UserError: it cannot be written.
    """
    arrays = {
        "format": FORMAT,
        "provider": vectors.provider,
        "dataset_fingerprint": vectors.dataset_fingerprint,
        "model_fingerprint": vectors.model_fingerprint,
        "item_ids": np.array(vectors.item_ids, np.str_),
        "text_hashes": vectors.text_hashes,
        "vectors": vectors.vectors,
    }
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as stream:
                np.savez(stream, **arrays)
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror or error}; choose another --out") from error


def load_text_vectors(file: Path) -> TextVectors:
    """Read the file.

    Raises:
        UserError: it is not there, is damaged, or holds something else.
    """
    if not file.is_file():
        what = "is a folder" if file.exists() else "does not exist"
        raise UserError(f"text vectors {file}: the file {what}; {_HOW}")
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            arrays = dict(stored)
    except Exception as error:  # NumPy raises zip, zlib, value and end-of-file errors on what is no archive of arrays
        raise UserError(f"{file} cannot be read as text vectors ({error}): {_HOW}") from error
    strings = {name: str(arrays.get(name, "")) for name in _STRINGS}
    if strings["format"] != FORMAT or not {"vectors", "item_ids", "text_hashes"} <= arrays.keys():
        raise UserError(
            f"{file} holds no text vectors of format {FORMAT!r}, but {', '.join(sorted(arrays)) or 'nothing'}: {_HOW}"
        )
    vectors, ids, hashes = arrays["vectors"], arrays["item_ids"], arrays["text_hashes"]
    if (
        vectors.dtype != np.float32
        or vectors.ndim != 2
        or not len(vectors) == len(ids) == len(hashes)
        or not np.isfinite(vectors).all()
    ):
        raise UserError(f"{file} is damaged: {len(ids)} items and vectors {vectors.dtype}{list(vectors.shape)}: {_HOW}")
    return TextVectors(
        vectors=vectors,
        item_ids=tuple(ids.tolist()),
        text_hashes=hashes,
        provider=strings["provider"],
        dataset_fingerprint=strings["dataset_fingerprint"],
        model_fingerprint=strings["model_fingerprint"],
    )


def _examples(items: Sequence[str]) -> str:
    return ", ".join(items[:3]) + (", ..." if len(items) > 3 else "")
