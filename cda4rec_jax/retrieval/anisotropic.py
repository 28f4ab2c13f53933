"""Anisotropic product quantisation: codes that keep the scores of the items that a query ranks high.

Guo et al., "Accelerating Large-Scale Inference with Anisotropic Vector Quantization", ICML 2020, arXiv 1908.10396. An error along an item's
own vector changes the item's score for exactly the queries that it suits; an error across it changes the scores for others. So the first
weighs more. A vector is cut into blocks of 2 dimensions, and each block is one of 16 centres: 4 bits, two blocks in a byte.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Key, UInt8

BLOCK = 2  # dimensions
BITS = 4
CENTRES = 1 << BITS
ENCODE_CHUNK = 16384  # items whose codes are sought at a time

Blocks = Float[Array, "blocks n 2"]
Codebooks = Float[Array, "blocks centres 2"]


def parallel_weight(threshold: float, width: int) -> float:
    """``eta = h_parallel / h_orthogonal = (d - 1) T^2 / (1 - T^2)``, at least 1 (the paper's limit for ``w(t) = [t >= T]``).

    Args:
      threshold: T, as a share of the greatest score that an item can have, |q| |x|. The paper recommends .2.
      width: d, dimensions of an item vector.
    """
    return max(1.0, (width - 1) * threshold**2 / (1 - threshold**2))


def score_aware_loss(
    vectors: Float[Array, "n d"], approximations: Float[Array, "n d"], weight: float | Float[Array, ""]
) -> Float[Array, "n"]:
    """``weight |r_parallel|^2 + |r_orthogonal|^2`` of the residual ``r = x - x~``, whose parts are along and across x.

    A zero vector has no direction: its whole residual counts as across.
    """
    residuals = vectors - approximations
    along = jnp.sum(residuals * directions_of(vectors), axis=1)
    return jnp.sum(jnp.square(residuals), axis=1) + (weight - 1) * jnp.square(along)


def directions_of(vectors: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """``x / |x|``; 0 where x is."""
    norms = jnp.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / jnp.where(norms > 0, norms, 1)


@partial(jax.jit, static_argnames=("iterations",))
def learn_codebooks(
    residuals: Float[Array, "n d"],
    directions: Float[Array, "n d"],
    weight: float | Float[Array, ""],
    iterations: int,
    key: Key[Array, ""],
) -> Codebooks:
    """Centres by coordinate descent on the summed loss: ``iterations`` sweeps of plain k-means (weight 1), then as many with ``weight``.

    A sweep goes through the blocks. In each it gives every item the centre of least loss, the codes of its other blocks as they are, and
    then every centre the place of least loss; both are exact, so no sweep makes the sum of losses greater.

    Args:
      residuals: What is quantised, ``x - c`` of each item x and the centroid c of its leaf.
      directions: ``x / |x|``.
      weight: eta, ``parallel_weight``.
    """
    parts, towards = _blocks(residuals), _blocks(directions)
    drawn = jax.random.choice(key, residuals.shape[0], (CENTRES,), replace=residuals.shape[0] < CENTRES)
    state = (parts[:, drawn], jnp.zeros(parts.shape[:2], jnp.int32))
    for eta in (1.0, weight):
        state = jax.lax.fori_loop(0, iterations, lambda _, at, eta=eta: _sweep(at, parts, towards, eta, learn=True), state)
    return state[0]


@partial(jax.jit, static_argnames=("sweeps",))
def encode(
    codebooks: Codebooks,
    residuals: Float[Array, "n d"],
    directions: Float[Array, "n d"],
    weight: float | Float[Array, ""],
    sweeps: int,
) -> UInt8[Array, "n bytes"]:
    """Codes of least loss by coordinate descent from the nearest centres; byte j holds those of block 2j (low half) and 2j + 1."""

    def one(item: tuple[Float[Array, "d"], Float[Array, "d"]]) -> UInt8[Array, "bytes"]:
        parts, towards = (_blocks(vector[None]) for vector in item)
        nearest = _sweep((codebooks, jnp.zeros(parts.shape[:2], jnp.int32)), parts, towards, 1.0, learn=False)
        _, codes = jax.lax.fori_loop(0, sweeps, lambda _, at: _sweep(at, parts, towards, weight, learn=False), nearest)
        pairs = jnp.pad(codes[:, 0], (0, codes.shape[0] % 2)).reshape(-1, 2).astype(jnp.uint8)
        return pairs[:, 0] | pairs[:, 1] << BITS

    return jax.lax.map(one, (residuals, directions), batch_size=ENCODE_CHUNK)


def decode(codebooks: Codebooks, codes: UInt8[Array, "n bytes"], width: int) -> Float[Array, "n d"]:
    """The residuals that codes stand for."""
    halves = jnp.stack([codes & (CENTRES - 1), codes >> BITS], axis=2).reshape(codes.shape[0], -1)[:, : codebooks.shape[0]]
    parts = jnp.take_along_axis(codebooks, halves.T[:, :, None].astype(jnp.int32), axis=1)
    return parts.transpose(1, 0, 2).reshape(codes.shape[0], -1)[:, :width]


def code_scores(
    codebooks: Codebooks, codes: UInt8[Array, "leaves bytes capacity"], query: Float[Array, "d"]
) -> Float[Array, "leaves capacity"]:
    """``q . r~`` of every residual r~ that the codes stand for: for each block, the query's score of that block's centre.

    A lookup becomes 15 selections among 16 numbers by the 4 bits of the code. They run on whole vectors of items, where a gather takes one
    number at a time and a product with an indicator matrix reads and multiplies 16 times as much; so it is no slower than a product with
    8-bit vectors on a CPU, and reads a quarter of their bytes, which is what bounds an accelerator.
    """
    padding = BLOCK * codebooks.shape[0] - query.shape[0]
    table = jnp.einsum("ncx,nx->nc", codebooks, jnp.pad(query, (0, padding)).reshape(-1, BLOCK))
    scores = jnp.zeros((codes.shape[0], codes.shape[2]), query.dtype)
    for block in range(codebooks.shape[0]):
        values = list(table[block])
        for bit in range(BITS):
            is_set = (codes[:, block // 2] >> (bit + BITS * (block % 2))) & 1 == 1
            values = [jnp.where(is_set, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
        scores += values[0]
    return scores


def _blocks(vectors: Float[Array, "n d"]) -> Blocks:
    """Blocks first; an odd width is padded with 0, which no loss depends on."""
    count, width = vectors.shape
    return jnp.pad(vectors, ((0, 0), (0, width % BLOCK))).reshape(count, -1, BLOCK).transpose(1, 0, 2)


def _sweep(
    state: tuple[Codebooks, Int[Array, "blocks n"]],
    parts: Blocks,
    towards: Blocks,
    weight: float | Float[Array, ""],
    *,
    learn: bool,
) -> tuple[Codebooks, Int[Array, "blocks n"]]:
    """Codes, and where it learns also centres, of least loss ``|r - r~|^2 + (weight - 1) ((r - r~) . x / |x|)^2``, block by block.

    With r and x a block's part of the residual and of the direction, and o the error along x of all other blocks, the loss of a centre c
    is ``|r - c|^2 + (w - 1) (o + x . (r - c))^2`` but for a constant. So the best centre for many items solves
    ``sum (I + (w - 1) x x^T) c = sum r + (w - 1) x (o + x . r)``.
    """
    codebooks, codes = state
    chosen = jnp.take_along_axis(codebooks, codes[:, :, None], axis=1)
    along = jnp.sum((parts - chosen) * towards, axis=(0, 2))

    def settle(
        along: Float[Array, "n"], block: tuple[Array, Array, Array, Array]
    ) -> tuple[Float[Array, "n"], tuple[Array, Array]]:
        centres, code, part, toward = block
        others = along - jnp.sum((part - centres[code]) * toward, axis=1)
        errors = part[:, None] - centres[None]
        shifts = others[:, None] + jnp.einsum("ncx,nx->nc", errors, toward)
        code = jnp.argmin(jnp.sum(jnp.square(errors), axis=2) + (weight - 1) * jnp.square(shifts), axis=1).astype(jnp.int32)
        if learn:
            centres = _best_centres(centres, code, part, toward, others, weight)
        return others + jnp.sum((part - centres[code]) * toward, axis=1), (centres, code)

    _, settled = jax.lax.scan(settle, along, (codebooks, codes, parts, towards))
    return settled


def _best_centres(
    centres: Float[Array, "centres 2"],
    code: Int[Array, "n"],
    part: Float[Array, "n 2"],
    toward: Float[Array, "n 2"],
    others: Float[Array, "n"],
    weight: float | Float[Array, ""],
) -> Float[Array, "centres 2"]:
    """The centres of least loss for these codes; one that no item has stays where it is."""
    inside = (code[:, None] == jnp.arange(CENTRES)[None]).astype(part.dtype)
    sizes = jnp.sum(inside, axis=0)
    outer = jnp.einsum("nc,nx,ny->cxy", inside, toward, toward)
    wanted = part + (weight - 1) * toward * (others + jnp.sum(part * toward, axis=1))[:, None]
    empty = sizes == 0
    matrix = jnp.where(empty, 1, sizes)[:, None, None] * jnp.eye(BLOCK)[None] + (weight - 1) * outer
    target = jnp.where(empty[:, None], centres, inside.T @ wanted)
    return jnp.linalg.solve(matrix, target[:, :, None])[:, :, 0]
