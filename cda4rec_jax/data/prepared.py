"""The prepared folder: ``metadata.json`` names the data folder beside it that holds the ArrayRecord dataset.

Replacing ``metadata.json`` is the one step that makes a new dataset the current one, so a folder is at every moment the old
dataset or the new one, whole. Data folders that no metadata names are left-overs of an interrupted preparation.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cda4rec_jax.data.interactions import Interactions
from cda4rec_jax.errors import UserError

FORMAT = "cda4rec-prepared"
VERSION = 1
METADATA = "metadata.json"
DATA_FOLDER = re.compile(r"data-[0-9a-f]{8}")

Progress = Callable[[int, int], None]  # users written, all users


def recognises(folder: Path) -> bool:
    """Whether the folder holds a prepared dataset, of any version."""
    return (folder / METADATA).exists() and any(DATA_FOLDER.fullmatch(path.name) for path in folder.iterdir())


def load_prepared(folder: str | Path) -> Interactions:
    """Reads a prepared folder: exactly the interactions that were written, with the same fingerprint. TensorFlow is not imported.

    Raises:
        UserError: if the folder is no prepared dataset, is of another version, or is damaged.
    """
    from cda4rec_jax.data.builder import read_users  # takes seconds to import, and raw sources do without

    folder = Path(folder)
    metadata = _read_metadata(folder)
    try:
        users = read_users(folder / metadata["data"])
        lengths = np.array([len(user["items"]) for user in users], np.int64)
        data = Interactions(
            name=metadata["name"],
            user_ids=tuple(metadata["user_ids"]),
            item_ids=tuple(metadata["item_ids"]),
            offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
            items=np.concatenate([user["items"] for user in users]),
            timestamps=np.concatenate([user["timestamps"] for user in users]),
            has_timestamps=metadata["has_timestamps"],
            titles=tuple(metadata["titles"]),
            categories=tuple(tuple(names) for names in metadata["categories"]),
            user_attributes={name: tuple(values) for name, values in metadata["user_attributes"].items()},
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"prepared dataset {folder} is damaged ({error}): prepare it again") from error
    expected = str(metadata.get("fingerprint"))
    if data.fingerprint != expected:
        raise UserError(
            f"prepared dataset {folder} is damaged: its content has fingerprint {data.fingerprint[:12]}, "
            f"expected {expected[:12]}: prepare it again"
        )
    return data


def _read_metadata(folder: Path) -> dict[str, Any]:
    again = "prepare it again with 'cda4rec prepare SOURCE --out DIR'"
    try:
        metadata = json.loads((folder / METADATA).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{folder} is no prepared dataset: cannot read {METADATA} ({error.strerror}): {again}") from error
    except ValueError as error:
        raise UserError(f"prepared dataset {folder} is damaged: {METADATA} is not JSON ({error}): {again}") from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise UserError(f"{folder} is no prepared dataset: {METADATA} is not of format {FORMAT!r}: {again}")
    if metadata.get("version") != VERSION:
        found = metadata.get("version")
        raise UserError(f"prepared dataset {folder} has format version {found}, this program reads version {VERSION}: {again}")
    return metadata


def metadata_of(data: Interactions, data_folder: str) -> dict[str, Any]:
    """What ``load_prepared`` needs besides the ArrayRecord files."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "data": data_folder,
        "name": data.name,
        "fingerprint": data.fingerprint,
        "has_timestamps": data.has_timestamps,
        "user_ids": data.user_ids,
        "item_ids": data.item_ids,
        "titles": data.titles,
        "categories": data.categories,
        "user_attributes": data.user_attributes,
    }
