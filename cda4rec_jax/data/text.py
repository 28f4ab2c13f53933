"""Text of items as frozen vectors, behind one protocol."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, runtime_checkable
from zlib import crc32

import numpy as np
from jaxtyping import Float32, UInt8, UInt16
from scipy.sparse import csr_array

from cda4rec_jax.messages import WORD_BUCKETS
from cda4rec_jax.nn import quantise_weights

CATEGORY_SEPARATOR = " | "
_SMALL_CORPUS = 2000  # below this many texts a word that occurs once may be all that tells an item from the others
_WORD = re.compile(r"\w+")


@runtime_checkable
class TextProvider(Protocol):
    """Gives every item of a catalogue a vector from its text alone, so that an item without interactions has one too."""

    @property
    def name(self) -> str:
        """Short name for results and run directories: what made the vectors, and their width."""
        ...

    def encode(self, texts: Sequence[str]) -> Float32[np.ndarray, "items z"]:
        """One row per text, finite, with mean row norm 1. Equal texts give equal rows, and the same call gives the same rows."""
        ...


def item_texts(titles: Sequence[str], categories: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """Text of each item: its title, and on a second line its categories joined by ``" | "`` (no second line without any)."""
    texts = []
    for title, names in zip(titles, categories, strict=True):
        line = " ".join(title.split())
        texts.append(line + "\n" + CATEGORY_SEPARATOR.join(names) if names else line)
    return tuple(texts)


@dataclass(frozen=True, kw_only=True)
class Combined:
    """Several providers side by side: their columns in turn, each provider with the same say.

    Every part has a mean row norm of 1 already, so none drowns another; the joined rows are divided by one number, so that the mean
    norm of those with text is 1 again.
    """

    providers: tuple[TextProvider, ...]

    @property
    def name(self) -> str:
        return "+".join(provider.name for provider in self.providers)

    def encode(self, texts: Sequence[str]) -> Float32[np.ndarray, "items z"]:
        """Rows of the width of all providers together."""
        return unit_mean_norm(np.concatenate([provider.encode(texts) for provider in self.providers], axis=1))


@dataclass(frozen=True, kw_only=True)
class TfidfSvd:
    """TF-IDF over words, word pairs and whole categories, then a partially whitened truncated SVD (scikit-learn; no weights).

    With P the principal components of the SVD scores of the tf-idf matrix (sublinear tf, unit rows), column j is
    ``P_j (var_j / var_1)^(-1/4)``: halfway between plain principal components, where a few broad categories drown the rest, and
    full whitening, which blows up noise. All rows are then divided by one number, so that the mean norm of rows with text is 1.

    It is fitted on the texts that it encodes: encode a catalogue in one call, since rows of two calls do not compare. In
    catalogues of 2,000 texts or more only tokens of at least two texts count. Texts without any token that counts give zero rows,
    and where the texts span fewer dimensions than asked for, the last columns are zero.
    """

    dimensions: int = 64
    seed: int = 0

    @property
    def name(self) -> str:
        return f"tfidf-svd-{self.dimensions}"

    def encode(self, texts: Sequence[str]) -> Float32[np.ndarray, "items z"]:
        """Rows of shape [len(texts), dimensions].

        Raises:
          ValueError: dimensions is below 1.
        """
        if self.dimensions < 1:
            raise ValueError(f"dimensions must be at least 1, got {self.dimensions}")
        vectors = np.zeros((len(texts), self.dimensions), np.float32)
        min_texts = 1 if len(texts) < _SMALL_CORPUS else 2
        text_counts = Counter(token for text in texts for token in set(_tokens(text)))
        vocabulary = sorted(token for token, count in text_counts.items() if count >= min_texts)
        rank = min(self.dimensions, len(texts) - 1, len(vocabulary) - 1)
        if rank < 1:
            return vectors
        # Imported where text is encoded: it takes a second and a half, and commands on a finished run need none of it.
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer

        vectoriser = TfidfVectorizer(
            analyzer=_tokens,  # pyright: ignore[reportArgumentType]  # a callable is documented
            vocabulary=vocabulary,
            lowercase=False,
            sublinear_tf=True,
        )
        weights = csr_array(vectoriser.fit_transform(texts))
        known = np.diff(weights.indptr) > 0
        scores = TruncatedSVD(rank, algorithm="randomized", random_state=self.seed).fit_transform(weights)
        whitened = partially_whitened(scores[known])
        vectors[known, : whitened.shape[1]] = unit_mean_norm(whitened)
        return vectors


def partially_whitened(scores: np.ndarray) -> np.ndarray:
    """Principal components of the rows, each divided by the square root of its relative standard deviation.

    ``scores`` is [rows, columns]; the result has a column for each direction that the rows vary in, largest variance first.
    """
    centred = scores - scores.mean(axis=0)
    variances, directions = np.linalg.eigh(centred.T @ centred / len(centred))
    # Largest variance first; directions that carry nothing must not be scaled up to noise.
    order = np.flatnonzero(variances > 1e-6 * variances[-1])[::-1]
    variances, directions = variances[order], directions[:, order]
    signs = np.sign(directions[np.abs(directions).argmax(axis=0), np.arange(len(order))])
    return centred @ (directions * signs) * (variances / variances[:1]) ** -0.25


def unit_mean_norm(rows: np.ndarray) -> np.ndarray:
    """The rows divided by one number, so that the mean norm of those that are not zero is 1; rows of rounding errors stay small."""
    norms = np.linalg.norm(rows, axis=1)
    return rows / max(norms[norms > 0].mean(), 1e-9) if norms.any() else rows


@dataclass(frozen=True, kw_only=True)
class ItemWords:
    """The most telling words of each title, heaviest first; row 0 is padding and all zero.

    ``ids`` hash the word, so that no vocabulary has to travel and a word means the same in every catalogue; 0 is none. ``weights``
    are the words' shares of the title's unit vector of TF-IDF, in the bytes of ``nn.quantise_weights``, so that
    summing products over equal words gives the cosine of two titles.
    """

    ids: UInt16[np.ndarray, "i w"]  # 1 to WORD_BUCKETS - 1
    weights: UInt8[np.ndarray, "i w"]


def item_words(titles: Sequence[str], *, max_words: int = 12) -> ItemWords:
    """Words of titles, weighted by ``(1 + log tf) (1 + log((1 + n) / (1 + df)))`` and scaled to unit norm.

    Only words of at least two titles count: no other can tell that two items are alike. Equal weights stand by word.

    Args:
      titles: of items 1, 2, ...
      max_words: words kept of each title. The norm is that of all its words.
    """
    words = [Counter(_WORD.findall(title.lower())) for title in titles]
    titles_with = Counter(word for counts in words for word in counts)
    ids = np.zeros((len(titles) + 1, max_words), np.uint16)
    weights = np.zeros(ids.shape)
    for row, counts in enumerate(words, start=1):
        weighted = {
            word: (1 + np.log(count)) * (1 + np.log((1 + len(titles)) / (1 + titles_with[word])))
            for word, count in counts.items()
            if titles_with[word] > 1
        }
        norm = np.sqrt(sum(weight**2 for weight in weighted.values()))
        kept = sorted(weighted, key=lambda word: (-weighted[word], word))[:max_words]
        ids[row, : len(kept)] = [1 + crc32(word.encode()) % (WORD_BUCKETS - 1) for word in kept]
        weights[row, : len(kept)] = [weighted[word] / norm for word in kept]
    return ItemWords(ids=ids, weights=quantise_weights(weights))


def _tokens(text: str) -> list[str]:
    """Words and word pairs of the title, and each category as one token."""
    title, _, categories = text.partition("\n")
    words = _WORD.findall(title.lower())
    pairs = [f"{first} {second}" for first, second in pairwise(words)]
    return words + pairs + [f"category:{name}" for name in categories.split(CATEGORY_SEPARATOR) if name]
