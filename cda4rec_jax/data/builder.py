"""The TFDS dataset of prepared interactions: one example per user, as ArrayRecord, written and read without TensorFlow."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds

from cda4rec_jax.data.interactions import Interactions
from cda4rec_jax.data.prepared import Progress

SPLIT = "users"
USERS_PER_REPORT = 256


def _features() -> tfds.features.FeaturesDict:
    return tfds.features.FeaturesDict(
        {
            "user_index": tfds.features.Scalar(np.int64),
            "items": tfds.features.Tensor(shape=(None,), dtype=np.int32),
            # Unencoded floats are stored in 32 bits, too few for unix seconds.
            "timestamps": tfds.features.Tensor(shape=(None,), dtype=np.float64, encoding="zlib"),
        }
    )


class _LocalInfo(tfds.core.DatasetInfo):
    """Metadata that nobody looks for elsewhere: TFDS would leave an empty temporary folder behind each time it is asked to."""

    def initialize_from_bucket(self) -> None: ...


class PreparedInteractions(tfds.core.GeneratorBasedBuilder):
    """Writes each user's items and timestamps, in the order of the users."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, interactions: Interactions, progress: Progress | None = None, **kwargs: Any) -> None:
        self._interactions = interactions
        self._progress = progress
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return _LocalInfo(builder=self, features=_features(), disable_shuffling=True)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager  # there is nothing to download
        return {SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        data = self._interactions
        for user in range(data.num_users):
            events = slice(data.offsets[user], data.offsets[user + 1])
            yield user, {"user_index": user, "items": data.items[events], "timestamps": data.timestamps[events]}
            written = user + 1
            if self._progress and (written % USERS_PER_REPORT == 0 or written == data.num_users):
                self._progress(written, data.num_users)

    # TFDS would print that it downloads.
    def _log_download_bytes(self) -> None: ...

    def _log_download_done(self) -> None: ...


def write_users(interactions: Interactions, folder: Path, progress: Progress | None) -> None:
    """Writes the ArrayRecord dataset into a folder. ``progress`` is told the users written and all users, up to the end.

    Raises:
        OSError: if the folder cannot be written.
    """
    tfds.disable_progress_bar()  # the caller shows progress, or wants none
    builder = PreparedInteractions(interactions=interactions, progress=progress, data_dir=folder, file_format="array_record")
    with tempfile.TemporaryDirectory() as downloads:
        builder.download_and_prepare(download_dir=downloads)


def read_users(folder: Path) -> list[dict[str, Any]]:
    """The examples of a dataset that ``write_users`` wrote, in the order of the users.

    Raises:
        OSError, RuntimeError, ValueError: if files are missing or damaged.
    """
    builder = tfds.builder_from_directory(folder / PreparedInteractions.name / str(PreparedInteractions.VERSION))
    records = grain.sources.ArrayRecordDataSource([str(path) for path in builder.info.splits[SPLIT].filepaths])
    decode = _features().deserialize_example_np
    # In one batch, in half of the time. The types of grain's source know neither its batches nor its length.
    return [decode(record) for record in records.__getitems__(range(len(records)))]  # type: ignore[arg-type]
