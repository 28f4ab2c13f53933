"""The systems of ``cda4rec bench train``, each made ready to be timed, with its loss checked against ours."""

import importlib.metadata
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from cda4rec_jax.bench.layouts import Batches, GatheredBatch, gathered, num_real_tokens, padded_rows, segments_of
from cda4rec_jax.bench.train_systems import (
    LossFunction,
    Model,
    Program,
    decoded_loss,
    initial_state,
    loss_at_real_positions,
    loss_on_all_slots,
    our_loss_at_real_positions,
    packed_loss,
    packed_program,
    padded_program,
)
from cda4rec_jax.data.packing import Histories
from cda4rec_jax.messages import SequenceBatch
from cda4rec_jax.timing import usable_cores

OURS, OURS_PADDED = "ours, packed", "ours, padded"
XLA_MEMORY, TORCH_MEMORY = "XLA's plan", "torch profiler"
RECTOOLS_REMARK = (
    "RecTools: same events, width, layers, heads, history, dropout, batch, full cross-entropy over its items and Adam; not the same: its "
    "own blocks (LayerNorm, learned positions, no prefix token) and first weights, logits at every slot. Its losses are with dropout"
)


@dataclass(frozen=True, kw_only=True)
class EqualLoss:
    """Loss of a system without dropout, and of ours, on one batch from the same weights."""

    loss: float
    ours: float

    @property
    def difference(self) -> float:
        """How far they are apart."""
        return abs(self.loss - self.ours)


@dataclass(frozen=True, kw_only=True)
class Competitor:
    """A system, ready to be timed."""

    name: str
    version: str  # of all packages that it is made of
    against: str | None  # the system of ours with which it is compared; None for ours
    call: Callable[[int], float]  # one training step on the batch of that number; gives its real tokens
    temporary_bytes: int
    memory_by: str
    first_call_seconds: float  # compiling included
    equal_loss: EqualLoss | None  # None: cannot take our weights
    remark: Callable[[], str] = lambda: ""  # to be asked at the end
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all systems are given."""

    model: Model
    batches: Batches
    histories: Histories


Maker = Callable[[], Competitor]


def makers(peers: Sequence[str], setting: Setting) -> list[Maker]:
    """One function for each system, in the order of the table; ours come first."""
    check = _Check(setting.model)
    ours = partial(our_loss_at_real_positions, chunk_size=setting.model.config.train.loss_chunk)
    found: list[Maker] = [partial(_packed, setting, check), partial(_padded, setting, check, OURS_PADDED, ours)]
    if "jax" in peers:
        found += [
            partial(_padded, setting, check, "JAX, padded, loss at real positions", loss_at_real_positions),
            partial(_padded, setting, check, "JAX, padded, loss at every slot", loss_on_all_slots),
        ]
    if {"torch", "torch-compile", "rectools"} & set(peers):
        # torch's profiler, which measures memory, is talkative.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for peer, compiled in (("torch", False), ("torch-compile", True)):
        if peer in peers:
            name = "torch.compile" if compiled else "torch eager"
            found += [
                partial(_torch, setting, check, f"{name}, {layout}", packed=layout == "packed", compiled=compiled, loss=loss)
                for layout, loss in (("packed", "materialised"), ("padded", "materialised"))
            ]
    if "torch" in peers:
        name = "torch eager, packed, chunked loss"
        found.append(partial(_torch, setting, check, name, packed=True, compiled=False, loss="chunked"))
    if "rectools" in peers:
        found.append(partial(_rectools, setting))
    return found


class _Check:
    """Our loss on any rows, from the weights that all systems start with."""

    def __init__(self, model: Model):
        self._loss = jax.jit(partial(packed_loss, model))
        self._model = model

    def ours(self, rows: SequenceBatch) -> float:
        return float(self._loss(self._model.trunk, self._model.frozen, rows))


class _JaxTraining:
    """A program that trains, its state, and its batches on the device."""

    def __init__(self, model: Model, program: Program, batches: Sequence[Any], tokens: Sequence[int]):
        self._program, self._state = program, initial_state(model)
        self._batches, self._tokens = [jax.tree.map(jnp.asarray, batch) for batch in batches], tokens

    def call(self, number: int) -> float:
        place = number % len(self._batches)
        self._state, values = self._program.run(self._state, self._batches[place])
        jax.block_until_ready((self._state, values))
        return float(self._tokens[place])


def _versions(*distributions: str) -> str:
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in distributions)


def _packed(setting: Setting, check: _Check) -> Competitor:
    """The training step of this package; its loss is compared with that of the same segments on rows of their own."""
    batches = setting.batches.packed
    program = packed_program(setting.model, batches[0])
    training = _JaxTraining(setting.model, program, batches, [num_real_tokens(batch) for batch in batches])
    alone = padded_rows(segments_of(batches[0]), setting.batches.length)
    return Competitor(
        name=OURS,
        version=_versions("jax"),
        against=None,
        call=training.call,
        temporary_bytes=program.temporary_bytes,
        memory_by=XLA_MEMORY,
        first_call_seconds=program.compile_seconds,
        equal_loss=EqualLoss(loss=check.ours(batches[0]), ours=check.ours(alone)),
    )


def _padded(setting: Setting, check: _Check, name: str, loss: LossFunction) -> Competitor:
    model, batches = setting.model, setting.batches.padded
    program = padded_program(model, batches[0], loss)
    training = _JaxTraining(model, program, batches, [num_real_tokens(batch.rows) for batch in batches])
    without_dropout = jax.jit(lambda trunk, batch: decoded_loss(model, trunk, model.frozen, batch, loss, None))
    return Competitor(
        name=name,
        version=_versions("jax"),
        against=OURS,
        call=training.call,
        temporary_bytes=program.temporary_bytes,
        memory_by=XLA_MEMORY,
        first_call_seconds=program.compile_seconds,
        equal_loss=EqualLoss(loss=float(without_dropout(model.trunk, batches[0])), ours=check.ours(batches[0].rows)),
    )


def _torch(setting: Setting, check: _Check, name: str, *, packed: bool, compiled: bool, loss: Any) -> Competitor:
    from cda4rec_jax.bench.peers import torch_sasrec

    torch_sasrec.set_threads(usable_cores())
    config = setting.model.config
    batches = _packed_and_gathered(setting.batches.packed, exact=not compiled) if packed else setting.batches.padded
    trainer = torch_sasrec.TorchTrainer(
        config.system.cloud.decoder, config.train, setting.model.weights(), loss=loss, compiled=compiled
    )
    tensors = torch_sasrec.torch_batches(batches, packed=packed)
    equal = EqualLoss(loss=trainer.loss_without_dropout(tensors[0]), ours=check.ours(batches[0].rows))
    start = time.perf_counter()
    trainer.step(tensors[0])
    seconds = time.perf_counter() - start
    tokens = [num_real_tokens(batch.rows) for batch in batches]

    def call(number: int) -> float:
        place = number % len(tensors)
        trainer.step(tensors[place])
        return float(tokens[place])

    return Competitor(
        name=name,
        version=_versions("torch"),
        against=OURS if packed else OURS_PADDED,
        call=call,
        temporary_bytes=torch_sasrec.peak_step_bytes(trainer, tensors[1 % len(tensors)]),
        memory_by=TORCH_MEMORY,
        first_call_seconds=seconds,
        equal_loss=equal,
    )


def _packed_and_gathered(batches: Sequence[SequenceBatch], *, exact: bool) -> list[GatheredBatch]:
    """Packed batches with the places of real tokens, as many as there are or (for a compiler of fixed shapes) as any batch has."""
    most = None if exact else max(map(num_real_tokens, batches))
    return [gathered(batch, most) for batch in batches]


def _rectools(setting: Setting) -> Competitor:
    from cda4rec_jax.bench.peers import torch_sasrec
    from cda4rec_jax.bench.peers.rectools_sasrec import RecToolsTrainer

    torch_sasrec.set_threads(usable_cores())
    config, rows = setting.model.config, setting.batches.padded[0].rows.targets.shape[0]
    start = time.perf_counter()
    trainer = RecToolsTrainer(
        setting.histories, config.system.cloud.decoder, config.train, config.system.history_length, batch_size=rows
    )
    losses = [trainer.step().loss]
    seconds = time.perf_counter() - start

    def call(number: int) -> float:
        report = trainer.step()
        losses.append(report.loss)
        return float(report.tokens)

    return Competitor(
        name="RecTools, its own loop",
        version=_versions("rectools", "torch", "pytorch-lightning"),
        against=OURS_PADDED,
        call=call,
        temporary_bytes=trainer.peak_step_bytes(),
        memory_by=TORCH_MEMORY,
        first_call_seconds=seconds,
        equal_loss=None,
        remark=lambda: f"{RECTOOLS_REMARK}: {losses[0]:.3f} at the first step, {losses[-1]:.3f} at step {len(losses):,}",
        close=trainer.close,
    )
