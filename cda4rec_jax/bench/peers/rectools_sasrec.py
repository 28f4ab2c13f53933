"""SASRec of RecTools with its own data preparation, Lightning module and Lightning loop, to be timed against. Needs the extra ``bench``.

RecTools trains in a thread of its own, which a gate stops before and after every step, so that it can take turns with other systems.
"""

import itertools
import logging
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd  # pyright: ignore[reportMissingImports]
import pytorch_lightning as lightning  # pyright: ignore[reportMissingImports]
import rectools  # pyright: ignore[reportMissingImports]
from rectools import Columns  # pyright: ignore[reportMissingImports]
from rectools.dataset import Dataset  # pyright: ignore[reportMissingImports]
from rectools.models import SASRecModel  # pyright: ignore[reportMissingImports]
from rectools.models.nn.transformers.sasrec import SASRecDataPreparator  # pyright: ignore[reportMissingImports]

from cda4rec_jax.bench.peers.torch_memory import MemoryProfile
from cda4rec_jax.data.packing import Histories
from cda4rec_jax.nn import DecoderConfig
from cda4rec_jax.training import TrainConfig

NUM_BATCHES = 16  # that rotate
PATIENCE_SECONDS = 600.0  # to wait for one step


class Cycle:
    """The same batches again and again. (Lightning would take a list apart.)"""

    def __init__(self, batches: list[dict[str, Any]]):
        self._batches = batches

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return itertools.cycle(self._batches)


class CollatedBatches(SASRecDataPreparator):
    """The first batches of RecTools' own loader, collated before the clock runs."""

    def get_dataloader_train(self) -> Cycle:
        """Batches of equal size, without end."""
        batches = list(itertools.islice(super().get_dataloader_train(), NUM_BATCHES))
        return Cycle([batch for batch in batches if len(batch["x"]) == self.batch_size] or batches)


class Gate(lightning.Callback):
    """Lets one training step pass at a time."""

    def __init__(self) -> None:
        self.loss, self.tokens, self.peak_bytes = float("nan"), 0, 0
        self.error: BaseException | None = None
        self.profile_next = False
        self._profile: MemoryProfile | None = None
        self._closed = False
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Gate":
        return self  # RecTools copies the trainer that it is given

    def pass_one(self) -> None:
        """Let one step happen and wait for its end. Raises RuntimeError where training has died."""
        self._go.release()
        if not self._done.acquire(timeout=PATIENCE_SECONDS) or self.error is not None:
            raise RuntimeError("RecTools stopped training") from self.error

    def close(self) -> None:
        """Let training end."""
        self._closed = True
        self._go.release()

    def fail(self, error: BaseException) -> None:
        """Tell the one who waits."""
        self.error = error
        self._done.release()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> int | None:
        """Wait for the turn."""
        self._go.acquire()
        if self._closed:
            trainer.should_stop = True
            return -1  # skips the rest of the epoch
        if self.profile_next:
            self._profile = MemoryProfile()
            self._profile.__enter__()
        return None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Tell that the step is done."""
        self.loss = float(outputs["loss"])
        self.tokens = int((batch["y"] > 0).sum())
        if self._profile is not None:
            self._profile.__exit__(None, None, None)
            self.peak_bytes, self._profile, self.profile_next = self._profile.peak_bytes(), None, False
        self._done.release()


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One step: real tokens, and the loss with dropout."""

    tokens: int
    loss: float


class RecToolsTrainer:
    """One RecTools model in training."""

    def __init__(self, histories: Histories, decoder: DecoderConfig, train: TrainConfig, history_length: int, batch_size: int):
        self._gate = Gate()
        for name in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.ERROR)
        self._model = SASRecModel(
            n_blocks=decoder.num_layers,
            n_heads=decoder.num_heads,
            n_factors=decoder.width,
            dropout_rate=decoder.dropout_rate,
            session_max_len=history_length,
            loss="softmax",
            lr=train.learning_rate,
            batch_size=batch_size,
            data_preparator_type=CollatedBatches,
            get_trainer_func=self._trainer,
        )
        self._dataset = Dataset.construct(_interactions(histories))
        self.num_items = int(self._dataset.item_id_map.size)
        self._thread = threading.Thread(target=self._train, name="rectools", daemon=True)
        self._thread.start()

    def step(self) -> StepReport:
        """One training step of RecTools on its next batch."""
        self._gate.pass_one()
        return StepReport(tokens=self._gate.tokens, loss=self._gate.loss)

    def peak_step_bytes(self) -> int:
        """Most memory that tensors of one step held at a time, by torch's profiler."""
        self._gate.profile_next = True
        self._gate.pass_one()
        return self._gate.peak_bytes

    def close(self) -> None:
        """End training."""
        self._gate.close()
        self._thread.join(timeout=PATIENCE_SECONDS)

    def _trainer(self) -> Any:
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "logger": False}
        return lightning.Trainer(max_epochs=1, accelerator="cpu", devices=1, callbacks=[self._gate], **quiet)

    def _train(self) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._model.fit(self._dataset)
        except BaseException as error:  # whatever it is, the thread that waits must hear of it
            self._gate.fail(error)


def version() -> str:
    """Of RecTools."""
    return rectools.__version__


def _interactions(histories: Histories) -> pd.DataFrame:
    """The training events of all users, in their order."""
    users = np.repeat(np.arange(len(histories.lengths)), histories.lengths)
    first = np.cumsum(histories.lengths) - histories.lengths
    place = np.arange(len(users)) - first[users]
    return pd.DataFrame(
        {
            Columns.User: users,
            Columns.Item: histories.items[histories.offsets[:-1][users] + place],
            Columns.Weight: 1.0,
            Columns.Datetime: pd.Timestamp("2000-01-01") + pd.to_timedelta(place, unit="s"),
        }
    )
