"""The decoder of this package in stock PyTorch, to be timed against: the same mathematics, from the same weights.

Everything is what a careful PyTorch author would write: scaled_dot_product_attention, rms_norm, cross_entropy at real positions only,
and the fused AdamW. It needs the extra ``bench``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]

from cda4rec_jax.bench.layouts import GatheredBatch
from cda4rec_jax.bench.peers.torch_memory import MemoryProfile
from cda4rec_jax.messages import SequenceBatch
from cda4rec_jax.nn import DecoderConfig
from cda4rec_jax.training import TrainConfig

ROTARY_BASE = 10_000.0
Loss = Literal["materialised", "chunked"]


@dataclass(frozen=True, kw_only=True)
class TorchBatch:
    """A ``SequenceBatch`` as tensors, and what is derived from it once by whoever loads data."""

    item_indices: Any
    positions: Any
    prefix_rows: Any
    prefixes: Any
    mask: Any  # bool [r, 1, t, t], True where a token reads another; None: causal over the whole row
    real: Any  # places of real tokens in the flattened rows
    targets: Any  # of these, as classes: item index less one, and -1 where there is none


def torch_batch(batch: GatheredBatch, *, packed: bool) -> TorchBatch:
    """Tensors of one batch.

    Padding lies behind the real tokens of a padded row, so that a causal mask alone hides it; packed rows need the mask of segments.
    """
    rows: SequenceBatch = batch.rows
    ids = np.asarray(rows.segment_ids)
    mask = None
    if packed:
        causal = np.tril(np.ones((ids.shape[1], ids.shape[1]), bool))
        # Padding reads itself, since a row of the mask that is all False has no softmax.
        mask = torch.from_numpy((ids[:, :, None] == ids[:, None, :]) & causal)[:, None]
    indices = {name: _long(getattr(rows, name)) for name in ("item_indices", "positions", "prefix_rows")}
    return TorchBatch(
        prefixes=torch.from_numpy(np.array(rows.prefixes)),
        mask=mask,
        real=_long(batch.positions),
        targets=_long(batch.targets) - 1,
        **indices,
    )


class TorchSASRec(torch.nn.Module):
    """Pre-norm decoder with RMSNorm, rotary positions and SwiGLU; ``forward`` gives the mean cross-entropy over all items."""

    def __init__(self, config: DecoderConfig, weights: Mapping[str, np.ndarray], loss: Loss):
        super().__init__()
        if config.num_kv_heads != config.num_heads:
            raise ValueError("the torch peer has no grouped queries")
        self.config, self.loss = config, loss
        self.weights = torch.nn.ParameterDict(
            {name.replace(".", "_"): torch.nn.Parameter(torch.from_numpy(np.array(value))) for name, value in weights.items()}
        )
        head_size = config.width // config.num_heads
        self.register_buffer("frequencies", ROTARY_BASE ** (-torch.arange(0, head_size, 2) / head_size), persistent=False)

    def forward(self, batch: TorchBatch) -> Any:
        """Mean next-item cross-entropy at the real positions."""
        width, weights = self.config.width, self.weights
        x = F.embedding(batch.item_indices, weights["ids"], padding_idx=0) * width**0.5
        is_prefix = (batch.prefix_rows > 0).to(x.dtype)
        x = x + F.embedding(batch.prefix_rows, batch.prefixes @ weights["prefix"]) * is_prefix[..., None]
        angles = (batch.positions[..., None] * self.frequencies)[:, None]
        rotation = torch.cos(angles), torch.sin(angles)
        x = self._dropout(x)
        for layer in range(self.config.num_layers):
            x = x + self._dropout(self._attention(self._norm(x, f"{layer}_attention_norm"), layer, rotation, batch.mask))
            x = x + self._dropout(self._mlp(self._norm(x, f"{layer}_mlp_norm"), layer))
        hidden = self._norm(x, "final_norm").reshape(-1, width)[batch.real]
        classes = weights["ids"][1:]
        if self.loss == "chunked":
            options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=128, chunking_method=None)
            return F.linear_cross_entropy(hidden, classes, batch.targets, ignore_index=-1, options=options)
        return F.cross_entropy(hidden @ classes.T, batch.targets, ignore_index=-1)

    def _dropout(self, x: Any) -> Any:
        return F.dropout(x, self.config.dropout_rate, self.training)

    def _norm(self, x: Any, name: str) -> Any:
        return F.rms_norm(x, (self.config.width,), self.weights[name], eps=1e-6)

    def _attention(self, x: Any, layer: int, rotation: tuple[Any, Any], mask: Any) -> Any:
        rows, length, width = x.shape
        heads = self.config.num_heads
        qkv = (x @ self.weights[f"{layer}_qkv"]).view(rows, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        query, key = (_rotate(part, *rotation) for part in qkv[:2])
        dropout_rate = self.config.attention_dropout_rate if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, qkv[2], mask, dropout_rate, is_causal=mask is None)
        return mixed.transpose(1, 2).reshape(rows, length, width) @ self.weights[f"{layer}_out"]

    def _mlp(self, x: Any, layer: int) -> Any:
        gate, up = (x @ self.weights[f"{layer}_gate_up"]).chunk(2, dim=-1)
        return (F.silu(gate) * up) @ self.weights[f"{layer}_down"]


class TorchTrainer:
    """One system: the model, its optimiser, and its batches."""

    def __init__(
        self,
        decoder: DecoderConfig,
        train: TrainConfig,
        weights: Mapping[str, np.ndarray],
        *,
        loss: Loss = "materialised",
        compiled: bool,
    ):
        self.model = TorchSASRec(decoder, weights, loss)
        self._forward = torch.compile(self.model, dynamic=False) if compiled else self.model
        self._clip_norm = train.clip_norm
        parameters = list(self.model.parameters())
        groups = [
            {"params": [one for one in parameters if one.ndim > 1], "weight_decay": train.weight_decay},
            {"params": [one for one in parameters if one.ndim <= 1], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(groups, lr=train.learning_rate, betas=(0.9, 0.98), fused=True)

    def step(self, batch: TorchBatch) -> float:
        """Forward, backward, clipping and update; gives the loss, which waits for everything."""
        self.model.train()
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._forward(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._clip_norm)
        self._optimizer.step()
        return float(loss.detach())

    def loss_without_dropout(self, batch: TorchBatch) -> float:
        """The loss of the weights at hand, by the very program that trains where that can be."""
        self.model.eval()
        with torch.no_grad():
            return float(self._forward(batch))


def peak_step_bytes(trainer: TorchTrainer, batch: TorchBatch) -> int:
    """Most memory that tensors of one step held at a time, by torch's profiler."""
    with MemoryProfile() as profile:
        trainer.step(batch)
    return profile.peak_bytes()


def set_threads(threads: int) -> None:
    """Let torch compute with so many threads."""
    torch.set_num_threads(threads)


def version() -> str:
    """Of torch."""
    return torch.__version__


def _rotate(x: Any, cos: Any, sin: Any) -> Any:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _long(array: Any) -> Any:
    return torch.from_numpy(np.asarray(array).astype(np.int64))


def torch_batches(batches: Sequence[GatheredBatch], *, packed: bool) -> list[TorchBatch]:
    """``torch_batch`` of each."""
    return [torch_batch(batch, packed=packed) for batch in batches]
