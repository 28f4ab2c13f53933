"""Training batches as a grain source: a pure function of (seed, step), so that an iterator's position is a single number."""

from dataclasses import dataclass

import grain.python as grain
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from cda4rec_jax.array_typing import Array
from cda4rec_jax.data.interactions import Interactions
from cda4rec_jax.data.packing import PackedEpoch, PackingConfig
from cda4rec_jax.data.splits import train_lengths
from cda4rec_jax.messages import HistoryBatch, SequenceBatch
from cda4rec_jax.pipeline.corpus import Corpus

MIN_EVENTS_KEPT = 2  # training events of a user that the trunks need at least


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """What one joint step reads."""

    cloud: SequenceBatch
    device: SequenceBatch | None
    withheld: HistoryBatch | None


@dataclass(frozen=True, kw_only=True)
class WithheldEvents:
    """The newest training events of some users, which teach the head and the planner only."""

    counts: Int[np.ndarray, "users"]  # of each user of the corpus
    users: Int[np.ndarray, "n"]  # of each event
    positions: Int[np.ndarray, "n"]

    def __len__(self) -> int:
        return len(self.users)


def withheld_events(interactions: Interactions, share: float, per_user: int, seed: int) -> WithheldEvents:
    """The last ``per_user`` training events of a seeded share of the users; fewer of those with few events."""
    lengths = train_lengths(interactions)
    drawn = np.random.default_rng([seed, 17]).random(len(lengths)) < share
    counts = np.where(drawn, np.clip(lengths - MIN_EVENTS_KEPT, 0, per_user), 0)
    users = np.repeat(np.arange(len(lengths)), counts)
    place = np.arange(len(users)) - np.repeat(np.cumsum(counts) - counts, counts)
    return WithheldEvents(counts=counts, users=users, positions=lengths[users] - 1 - place)


def micro_batch(batch: SequenceBatch, part: Array | int, parts: int) -> SequenceBatch:
    """Part ``part`` of the rows, which are cut into ``parts`` equal parts; usable in a compiled function.

    It has the rows part, part + parts, part + 2 parts, ..., so that a device that holds a stretch of the rows holds some of every part.
    """
    rows = batch.targets.shape[0]
    per_row = (batch.prefixes.shape[0] - 1) // rows  # rows of `prefixes`, after its first, go to the rows of tokens in order

    def dealt(values: Array) -> Array:
        return jnp.take(values.reshape(rows // parts, parts, *values.shape[1:]), part, axis=1)

    fields = {name: dealt(value) for name, value in vars(batch).items() if name != "prefixes"}
    kept = jnp.arange(rows // parts)[:, None]
    moved = fields["prefix_rows"] - (kept * parts + part - kept) * per_row
    fields["prefix_rows"] = jnp.where(fields["prefix_rows"] > 0, moved, 0)
    prefixes = dealt(batch.prefixes[1:].reshape(rows, per_row, -1)).reshape(rows // parts * per_row, -1)
    return SequenceBatch(prefixes=jnp.pad(prefixes, ((1, 0), (0, 0))), **fields)


def pad_rows(batch: SequenceBatch, multiple: int) -> SequenceBatch:
    """With empty rows at the end, so that there is a multiple of ``multiple``."""
    rows = batch.targets.shape[0]
    padding = -rows % multiple
    if not padding:
        return batch
    prefixes = padding * ((batch.prefixes.shape[0] - 1) // rows)
    sizes = {name: prefixes if name == "prefixes" else padding for name in vars(batch)}
    return SequenceBatch(**{name: np.pad(value, ((0, sizes[name]), (0, 0))) for name, value in vars(batch).items()})


class TrainingSource:
    """Random access to the batches of a whole training run (grain's ``RandomAccessDataSource``)."""

    def __init__(
        self,
        corpus: Corpus,
        packing: PackingConfig,
        *,
        rows_per_batch: int,
        epochs: int,
        seed: int,
        withheld: WithheldEvents | None,
        withheld_per_step: int,
        decider_interval: int,
        stored_events: int,
        rows_multiple: int = 1,
    ):
        self._corpus, self._packing, self._rows, self._seed = corpus, packing, rows_per_batch, seed
        self._withheld = withheld
        self._withheld_per_step, self._decider_interval = withheld_per_step, decider_interval
        self._stored_events, self._rows_multiple = stored_events, rows_multiple
        self._histories = corpus.training_histories(None if withheld is None else withheld.counts)
        self._category_counts = self._histories.category_counts()
        self._epoch: tuple[int, PackedEpoch, PackedEpoch | None] | None = None
        cloud, device = self._packed(0)
        self.steps_per_epoch = max(1, cloud.num_rows // rows_per_batch)
        # The same number of steps covers the device's rows, which are fewer: it is trained at FULL only.
        self._device_rows = 0 if device is None else -(-device.num_rows // self.steps_per_epoch)
        self._num_steps = epochs * self.steps_per_epoch
        self.targets_per_epoch = cloud.num_targets

    def __len__(self) -> int:
        return self._num_steps

    def __getitem__(self, index: int) -> TrainingBatch:
        epoch, place = divmod(int(index), self.steps_per_epoch)
        cloud, device = self._packed(epoch)
        decides = self._withheld is not None and len(self._withheld) > 0 and int(index) % self._decider_interval == 0
        return TrainingBatch(
            cloud=cloud.batch(place * self._rows, self._rows),
            device=None if device is None else self._device_batch(device, place),
            withheld=self.withheld_batch(int(index), self._withheld_per_step) if decides else None,
        )

    def _device_batch(self, device: PackedEpoch, place: int) -> SequenceBatch:
        return pad_rows(device.batch(place * self._device_rows, self._device_rows), self._rows_multiple)

    def withheld_batch(self, step: int, size: int) -> HistoryBatch:
        """Pasts of users before ``size`` withheld events; drawn for each step alone."""
        assert self._withheld is not None
        drawn = np.random.default_rng([self._seed, 29, step]).choice(len(self._withheld), size)
        return self._corpus.histories(self._withheld.users[drawn], self._withheld.positions[drawn], self._stored_events)

    def _packed(self, epoch: int) -> tuple[PackedEpoch, PackedEpoch | None]:
        if self._epoch is None or self._epoch[0] != epoch:
            rng = np.random.default_rng([self._seed, 43, epoch])
            shared = (self._histories, self._category_counts, self._packing, rng)
            cloud = PackedEpoch(*shared, all_levels=True)
            device = None if self._withheld is None else PackedEpoch(*shared, all_levels=False)
            self._epoch = (epoch, cloud, device)
        return self._epoch[1], self._epoch[2]


def batch_iterator(source: TrainingSource) -> grain.DatasetIterator:
    """Batches in order from a reading thread ahead of the training step; ``get_state`` and ``set_state`` are exact."""
    dataset = grain.MapDataset.source(source)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
