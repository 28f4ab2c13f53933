import jax.numpy as jnp
import numpy as np
import pytest

from cda4rec_jax.data.text import Combined, TextProvider, TfidfSvd, item_texts, item_words, partially_whitened
from cda4rec_jax.messages import WORD_BUCKETS
from cda4rec_jax.nn import dequantise_weights

_CATEGORIES = (("Audio", "Headphones"), ("Audio", "Speakers"), ("Kitchen", "Kettles"), ("Kitchen", "Mugs"))


def _catalogue(num_items=80, seed=0):
    rng = np.random.default_rng(seed)
    words = [f"word{index}" for index in range(40)]
    titles = [" ".join(rng.choice(words, 4)) for _ in range(num_items)]
    return item_texts(titles, [_CATEGORIES[index % 4] for index in range(num_items)])


def _cosine(a, b):
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def test_item_text_is_title_then_categories():
    assert item_texts(["A  red\nmug", "Plain"], [("Kitchen", "Mugs"), ()]) == ("A red mug\nKitchen | Mugs", "Plain")


def test_rows_have_the_asked_shape_and_mean_norm_one():
    provider: TextProvider = TfidfSvd(dimensions=16)
    vectors = provider.encode(_catalogue())
    assert vectors.shape == (80, 16)
    assert vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1).mean() == pytest.approx(1, abs=1e-5)
    assert provider.name == "tfidf-svd-16"


def test_the_same_seed_gives_the_same_rows_bit_for_bit():
    np.testing.assert_array_equal(TfidfSvd(dimensions=8).encode(_catalogue()), TfidfSvd(dimensions=8).encode(_catalogue()))


def test_items_of_one_category_are_nearer_than_others():
    vectors = TfidfSvd(dimensions=16).encode(_catalogue())
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    similarity = unit @ unit.T
    same = (np.arange(80)[:, None] % 4 == np.arange(80)[None, :] % 4) & ~np.eye(80, dtype=bool)
    assert similarity[same].mean() > similarity[~same & ~np.eye(80, dtype=bool)].mean() + 0.2


def test_equal_texts_give_equal_rows_whatever_their_case():
    vectors = TfidfSvd(dimensions=4).encode(["red mug\nMugs", "RED MUG\nMugs", "blue kettle\nKettles", "green pan\nPans"])
    assert _cosine(vectors[0], vectors[1]) == pytest.approx(1, abs=1e-4)
    assert _cosine(vectors[0], vectors[2]) < 0.5


def test_columns_are_uncorrelated_and_partially_whitened():
    vectors = TfidfSvd(dimensions=16).encode(_catalogue())
    covariance = np.cov(vectors, rowvar=False)
    np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-5)
    scores = np.random.default_rng(0).normal(size=(500, 4)) * np.array([[16.0, 4.0, 1.0, 0.0]])
    deviations = partially_whitened(scores).std(axis=0)
    assert len(deviations) == 3  # the empty direction is gone
    np.testing.assert_allclose(deviations / deviations[0], [1, 1 / 2, 1 / 4], rtol=0.1)


@pytest.mark.parametrize("texts", [["one"], ["", ""], ["same", "same"], ["a b", "c d", ""], []])
def test_few_words_give_padded_finite_rows(texts):
    vectors = TfidfSvd(dimensions=8).encode(texts)
    assert vectors.shape == (len(texts), 8)
    assert np.isfinite(vectors).all()


def test_a_text_without_words_gives_a_zero_row():
    vectors = TfidfSvd(dimensions=4).encode(["", "red mug", "blue mug", "green kettle"])
    assert not vectors[0].any()
    assert np.all(np.linalg.norm(vectors[1:], axis=1) > 0)


def test_a_large_catalogue_that_shares_no_word_gives_zero_rows():
    assert not TfidfSvd(dimensions=4).encode([f"title{index}" for index in range(2000)]).any()


def test_zero_dimensions_are_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        TfidfSvd(dimensions=0).encode(["a"])


def test_combined_providers_stand_side_by_side_with_the_same_say():
    parts = (TfidfSvd(dimensions=8), TfidfSvd(dimensions=4, seed=1))
    both: TextProvider = Combined(providers=parts)
    vectors = both.encode(_catalogue())
    assert both.name == "tfidf-svd-8+tfidf-svd-4"
    assert vectors.shape == (80, 12) and vectors.dtype == np.float32
    norms = [np.linalg.norm(block, axis=1).mean() for block in (vectors, vectors[:, :8], vectors[:, 8:])]
    assert norms[0] == pytest.approx(1, abs=1e-5)
    assert norms[1] == pytest.approx(norms[2], rel=1e-5)
    for block, part in zip((vectors[:, :8], vectors[:, 8:]), parts, strict=True):
        np.testing.assert_allclose(block / norms[1], part.encode(_catalogue()), rtol=1e-4, atol=1e-6)


def test_a_part_without_words_adds_nothing_to_the_combination():
    vectors = Combined(providers=(TfidfSvd(dimensions=4), TfidfSvd(dimensions=2))).encode(
        ["", "red mug", "blue mug", "green pot"]
    )
    assert not vectors[0].any()
    assert np.linalg.norm(vectors[1:], axis=1).mean() == pytest.approx(1, abs=1e-5)


def test_products_of_equal_words_sum_to_the_cosine_of_two_titles():
    titles = ["red lip stick", "red lip gloss", "red comb", "comb", "gloss stick"]
    words = item_words(titles)
    assert not words.ids[0].any()
    rows = np.zeros((len(titles) + 1, WORD_BUCKETS))
    np.put_along_axis(rows, words.ids.astype(int), np.asarray(dequantise_weights(jnp.asarray(words.weights))), axis=1)
    idf = {word: 1 + np.log(6 / (1 + count)) for word, count in {"red": 3, "lip": 2, "stick": 2, "gloss": 2, "comb": 2}.items()}
    norm = [np.sqrt(sum(idf[word] ** 2 for word in title.split())) for title in titles]
    expected = (idf["red"] ** 2 + idf["lip"] ** 2) / (norm[0] * norm[1])
    np.testing.assert_allclose(rows[1] @ rows[2], expected, atol=0.02)
    assert rows[1] @ rows[4] == 0


def test_words_of_one_title_only_are_left_out_and_the_heaviest_are_kept():
    words = item_words(["common unique rare", "common rare", "common", "common"], max_words=1)
    assert (words.ids[1] > 0).sum() == 1
    assert words.ids[1, 0] == words.ids[2, 0] != words.ids[3, 0]
    assert not item_words(["", "alone"]).ids.any()
