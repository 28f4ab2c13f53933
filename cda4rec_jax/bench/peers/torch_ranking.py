"""The device's ranking in PyTorch, to be timed against. Needs the extra ``bench``."""

from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch.nn import functional  # pyright: ignore[reportMissingImports]

from cda4rec_jax.bench.peers.numpy_ranking import Ranking, rotary_tables
from cda4rec_jax.kernels.rank_candidates import RankerWeights
from cda4rec_jax.kernels.rank_candidates.reference import EPSILON, LARGEST


class _Ranker(torch.nn.Module):
    """A full pass of ``num_tokens`` tokens, the last layer for its last token alone, and the head."""

    def __init__(self, weights: RankerWeights, num_tokens: int):
        super().__init__()
        names = (
            "attention_norm",
            "qkv",
            "out",
            "mlp_norm",
            "gate_up",
            "down",
            "final_norm",
            "linear",
            "moderators",
            "hidden",
            "bias",
            "out_units",
        )
        for name in (*names, "mean", "deviation", "score_scale"):
            self.register_buffer(name, torch.from_numpy(np.array(getattr(weights, name), np.float32)))
        for name in ("gates", "moderating"):
            self.register_buffer(name, torch.from_numpy(np.array(getattr(weights, name), np.int64)))
        for name, table in zip(("cosines", "sines"), rotary_tables(num_tokens, weights.head_size), strict=True):
            self.register_buffer(name, torch.from_numpy(table))
        self.heads, self.kv_heads, self.size = weights.num_heads, weights.num_kv_heads, weights.head_size
        self.score_feature = weights.score_feature

    def forward(self, x: Any, vectors: Any, vector_scales: Any, features: Any) -> Any:
        queries, last = self.heads * self.size, len(self.qkv) - 1
        for layer in range(last + 1):
            normed = functional.rms_norm(x, x.shape[-1:], self.attention_norm[layer], EPSILON)
            pairs = (normed @ self.qkv[layer][:, queries:]).view(-1, 2 * self.kv_heads, self.size).transpose(0, 1)
            key, value = pairs.chunk(2)
            start = 0
            if layer == last:
                start = len(x) - 1
                x, normed = x[start:], normed[start:]
            query = (normed @ self.qkv[layer][:, :queries]).view(-1, self.heads, self.size).transpose(0, 1)
            query, key = self._rotated(query, start), self._rotated(key, 0)
            shared = {"is_causal": layer < last, "enable_gqa": self.heads != self.kv_heads}
            mixed = functional.scaled_dot_product_attention(query[None], key[None], value[None], **shared)[0]
            x = x + mixed.transpose(0, 1).reshape(len(x), -1) @ self.out[layer]
            wide = functional.rms_norm(x, x.shape[-1:], self.mlp_norm[layer], EPSILON) @ self.gate_up[layer]
            gate, up = wide.chunk(2, dim=1)
            x = x + (functional.silu(gate) * up) @ self.down[layer]
        state = functional.rms_norm(x, x.shape[-1:], self.final_norm, EPSILON)[0]
        products = (vectors.float() @ state) * vector_scales
        features = features.clone()
        features[:, self.score_feature] = self.score_scale * (products - products[0])
        gates = functional.pad(features, (0, 1), value=1.0)[:, self.gates]
        standard = torch.clamp((features - self.mean) / self.deviation, -LARGEST, LARGEST) * gates
        moderated = (standard[:, self.moderating] * (standard @ self.moderators.T)).sum(1)
        hidden = functional.silu(torch.addmm(self.bias, standard, self.hidden))
        return standard @ self.linear + moderated + hidden @ self.out_units

    def _rotated(self, x: Any, start: int) -> Any:
        first, second = x.chunk(2, dim=-1)
        cos, sin = self.cosines[start:], self.sines[start:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def torch_ranking(weights: RankerWeights, num_tokens: int, example: tuple[np.ndarray, ...], *, threads: int) -> Ranking:
    """Scores of candidates, by the traced and frozen module; ``example`` are inputs."""
    torch.set_num_threads(threads)
    with torch.inference_mode():
        inputs = tuple(map(torch.from_numpy, example))
        program = torch.jit.freeze(torch.jit.trace(_Ranker(weights, num_tokens).eval(), inputs))

        def run(*given: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                return program(*map(torch.from_numpy, given)).numpy()

        return run
