"""Sentence vectors (Reimers and Gurevych, arXiv 1908.10084): the mean of the token states, divided by its norm."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float, Float32, Int

from cda4rec_jax.data.encoders.bert import load_bert, read_bert_config
from cda4rec_jax.data.encoders.folder import POOLING, TOKENIZER, check_folder, read_json, read_tokenizer, weights_fingerprint
from cda4rec_jax.data.text import partially_whitened, unit_mean_norm
from cda4rec_jax.errors import UserError

# Lengths to which texts are padded: one program each. Finer steps compute fewer padded tokens and compile more programs.
BUCKETS = (16, 24, 32, 48, 64, 96, 128)
TOKENS_PER_BATCH = 2048

Progress = Callable[[int, int], None]  # texts done, all texts


class BertSentences:
    """A BERT-family sentence encoder from a folder with ``config.json``, ``tokenizer.json`` and ``model.safetensors``.

    ``width`` is the size of its vectors, ``fingerprint`` the SHA-256 (hex) of its weights. The folder is only read. What the
    tokenizer's file says about padding and truncation is not used: a text counts up to 128 tokens, or the model's positions.

    Raises:
        UserError: a file is missing, is damaged, or is of a model that this is not; an optional package is not installed.
    """

    def __init__(self, folder: Path | str):
        folder = Path(folder).expanduser()
        check_folder(folder)
        config = read_bert_config(folder)
        _check_pooling(folder)
        self._max_tokens = min(BUCKETS[-1], config.max_positions)
        self._tokenizer = read_tokenizer(folder)
        if self._tokenizer.get_vocab_size() > config.vocabulary:
            raise UserError(
                f"{folder / TOKENIZER} knows {self._tokenizer.get_vocab_size():,} tokens, the model beside it {config.vocabulary:,}: "
                "copy both files of one model"
            )
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(self._max_tokens)
        graph, self._weights = nnx.split(load_bert(folder, config))

        def embed(weights: Any, tokens: Int[Array, "b l"], lengths: Int[Array, "b"]) -> Float[Array, "b d"]:
            real = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
            states = nnx.merge(graph, weights)(tokens, real)
            total = jnp.einsum("bld,bl->bd", states, real.astype(states.dtype))
            return total / jnp.maximum(jnp.linalg.norm(total, axis=-1, keepdims=True), 1e-12)

        self._embed = jax.jit(embed)
        self.width = config.width
        self.fingerprint = weights_fingerprint(folder)

    def embed(self, texts: Sequence[str], progress: Progress = lambda done, total: None) -> Float32[np.ndarray, "texts d"]:
        """One row of norm 1 per text. Equal texts get equal rows, bit for bit, and are computed once."""
        different = list(dict.fromkeys(texts))
        tokens = [encoding.ids for encoding in self._tokenizer.encode_batch(different)]
        lengths = np.array([len(ids) for ids in tokens], np.int32)
        rows = np.zeros((len(different), self.width), np.float32)
        done = 0
        for bucket, shorter in zip(BUCKETS, (0, *BUCKETS), strict=False):
            members = np.flatnonzero((lengths > shorter) & (lengths <= bucket))
            batch_size, padded = TOKENS_PER_BATCH // bucket, min(bucket, self._max_tokens)
            for start in range(0, len(members), batch_size):
                batch = members[start : start + batch_size]
                # A batch that is not full keeps its shape: the rows left over hold one token, of the id 0.
                ids, real = np.zeros((batch_size, padded), np.int32), np.ones(batch_size, np.int32)
                real[: len(batch)] = lengths[batch]
                for row, text in enumerate(batch):
                    ids[row, : lengths[text]] = tokens[text]
                rows[batch] = np.asarray(self._embed(self._weights, ids, real))[: len(batch)]
                done += len(batch)
                progress(done, len(different))
        place = {text: row for row, text in enumerate(different)}
        return rows[np.array([place[text] for text in texts], np.int64)]


class SentenceEncoder:
    """The text provider: sentence vectors, then their first ``dimensions`` partially whitened principal components.

    Sentence vectors are crowded: most of their norm is what all texts of a catalogue share. Centring takes that away, and the
    partial whitening is the one of ``TfidfSvd``. As there, the components are fitted on the texts that are encoded, so rows of two
    calls do not compare; blank texts get zero rows, and where the texts span fewer dimensions, the last columns are zero.
    """

    def __init__(self, folder: Path | str, dimensions: int, progress: Progress = lambda done, total: None):
        """Read the model.

        Args:
            folder: as for ``BertSentences``; its name goes into the name of the provider.
            dimensions: of the vectors, from 1 to the width of the model.
            progress: hears of the texts done while ``encode`` works.

        Raises:
            UserError: as ``BertSentences``; or ``dimensions`` is out of range.
        """
        self.sentences = BertSentences(folder)
        if not 1 <= dimensions <= self.sentences.width:
            raise UserError(
                f"{folder} gives vectors of {self.sentences.width}: take 1 to {self.sentences.width} dimensions, not {dimensions}"
            )
        self.name = f"{Path(folder).expanduser().absolute().name}-{dimensions}"
        self._dimensions = dimensions
        self._progress = progress

    def encode(self, texts: Sequence[str]) -> Float32[np.ndarray, "items z"]:
        """Rows of shape [len(texts), dimensions]."""
        vectors = np.zeros((len(texts), self._dimensions), np.float32)
        known = np.array([bool(text.strip()) for text in texts], np.bool_)
        if not known.any():
            return vectors
        rows = self.sentences.embed([text for text in texts if text.strip()], self._progress)
        whitened = partially_whitened(rows.astype(np.float64))[:, : self._dimensions]
        vectors[known, : whitened.shape[1]] = whitened
        return unit_mean_norm(vectors)


def _check_pooling(folder: Path) -> None:
    """Where the folder says how to pool, it must say the mean: other pooling gives other vectors without any error."""
    file = folder / POOLING
    if file.is_file() and not read_json(file).get("pooling_mode_mean_tokens"):
        raise UserError(
            f"{file} does not set pooling_mode_mean_tokens: only encoders that take the mean of their tokens can be read"
        )
