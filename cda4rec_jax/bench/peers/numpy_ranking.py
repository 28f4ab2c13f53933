"""The device's ranking as one would write it in NumPy, and what other peers share with it."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from cda4rec_jax.kernels.rank_candidates import RankerWeights
from cda4rec_jax.kernels.rank_candidates.reference import EPSILON, LARGEST, ROTARY_BASE

# From the tokens of a whole history, codes and scales of candidates' vectors, and features to the scores of the candidates.
Ranking = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def rotary_tables(num_tokens: int, head_size: int) -> tuple[Float[np.ndarray, "t half"], Float[np.ndarray, "t half"]]:
    """Cosines and sines of all positions."""
    frequencies = ROTARY_BASE ** (-np.arange(0, head_size, 2) / head_size)
    angles = np.arange(num_tokens)[:, None] * frequencies[None]
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


class NumpyRanking:
    """A full pass of ``num_tokens`` tokens, the last layer for its last token alone, and the head."""

    def __init__(self, weights: RankerWeights, num_tokens: int):
        self._weights, (cosines, sines) = weights, rotary_tables(num_tokens, weights.head_size)
        self._cosines, self._sines = cosines[:, None], sines[:, None]
        self._future = np.triu(np.full((num_tokens, num_tokens), -np.inf, np.float32), 1)

    def __call__(self, tokens: np.ndarray, vectors: np.ndarray, vector_scales: np.ndarray, features: np.ndarray) -> np.ndarray:
        """Scores, [c]."""
        weights = self._weights
        products = (vectors.astype(np.float32) @ self._state(tokens)) * vector_scales
        features = features.copy()
        features[:, weights.score_feature] = weights.score_scale * (products - products[0])
        gates = np.concatenate([features, np.ones_like(features[:, :1])], axis=1)[:, weights.gates]
        standard = np.clip((features - weights.mean) / weights.deviation, -LARGEST, LARGEST) * gates
        moderated = np.sum(standard[:, weights.moderating] * (standard @ weights.moderators.T), axis=1)
        return standard @ weights.linear + moderated + _silu(standard @ weights.hidden + weights.bias) @ weights.out_units

    def _state(self, x: np.ndarray) -> np.ndarray:
        weights, heads, kv_heads, size = (
            self._weights,
            self._weights.num_heads,
            self._weights.num_kv_heads,
            self._weights.head_size,
        )
        for layer in range(weights.num_layers):
            kernel, queries, rows = weights.qkv[layer], heads * size, slice(0, None)
            normed = _normed(x, weights.attention_norm[layer])
            key, value = np.split((normed @ kernel[:, queries:]).reshape(-1, 2 * kv_heads, size), 2, axis=1)
            if layer == weights.num_layers - 1:
                rows = slice(len(x) - 1, None)
                x, normed = x[rows], normed[rows]
            query = self._rotated((normed @ kernel[:, :queries]).reshape(-1, heads, size), rows)
            key = self._rotated(key, slice(0, None))
            key, value = (np.repeat(each, heads // kv_heads, axis=1).transpose(1, 0, 2) for each in (key, value))
            logits = query.transpose(1, 0, 2) @ key.transpose(0, 2, 1) * np.float32(size**-0.5) + self._future[rows]
            weight = np.exp(logits - logits.max(axis=-1, keepdims=True))
            mixed = weight @ value / weight.sum(axis=-1, keepdims=True)
            x = x + mixed.transpose(1, 0, 2).reshape(len(x), -1) @ weights.out[layer]
            gate, up = np.split(_normed(x, weights.mlp_norm[layer]) @ weights.gate_up[layer], 2, axis=1)
            x = x + (_silu(gate) * up) @ weights.down[layer]
        return _normed(x, weights.final_norm)[-1]

    def _rotated(self, x: np.ndarray, rows: slice) -> np.ndarray:
        first, second = np.split(x, 2, axis=-1)
        cos, sin = self._cosines[rows], self._sines[rows]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _normed(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(EPSILON)) * scale


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))
