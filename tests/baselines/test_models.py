"""What tokens may read: causal models, the bidirectional one, and that packing changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cda4rec_jax.baselines import BERT4RecConfig, GRU4RecConfig, HSTUConfig
from cda4rec_jax.baselines.bert4rec import BERT4Rec, draw_masks, masked_end_scores, masked_item_loss
from cda4rec_jax.baselines.gru4rec import GRU4Rec
from cda4rec_jax.baselines.hstu import HSTU
from cda4rec_jax.baselines.sequences import history_sequences, next_item_scores
from cda4rec_jax.data import Split
from cda4rec_jax.messages import SequenceBatch
from cda4rec_jax.training.losses import catalogue_loss

NUM_ITEMS = 30
SIZES = {"width": 16, "num_layers": 2, "history_length": 7, "row_tokens": 9, "dropout_rate": 0.0, "id_scale": 1.0}


def trained_like(model):
    """Layers start as the identity; these have weights as if they were trained."""
    rng = np.random.default_rng(1)
    noisy = jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32), nnx.state(model, nnx.Param))
    nnx.update(model, noisy)
    return model


@pytest.fixture(scope="module", params=["hstu", "gru4rec"])
def causal(request):
    if request.param == "hstu":
        return trained_like(HSTU(NUM_ITEMS, HSTUConfig(**SIZES), rngs=nnx.Rngs(0)))
    return trained_like(GRU4Rec(NUM_ITEMS, GRU4RecConfig(**SIZES, hidden=24), rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def bert():
    return trained_like(BERT4Rec(NUM_ITEMS, BERT4RecConfig(**SIZES, mlp_hidden=16), rngs=nnx.Rngs(0)))


def rows(*segments: list[int], row_tokens: int) -> SequenceBatch:
    """One packed row of segments, each given by its items; it begins with the token that predicts the first."""
    columns = np.zeros((4, 1, row_tokens), np.int32)
    first = 0
    for number, items in enumerate(segments, start=1):
        place = slice(first, first + len(items))
        columns[0, 0, place] = [0, *items[:-1]]
        columns[1, 0, place] = number
        columns[2, 0, place] = range(len(items))
        columns[3, 0, place] = items
        first += len(items)
    begins = np.where((columns[1] > 0) & (columns[2] == 0), columns[1], 0)
    return SequenceBatch(
        item_indices=columns[0],
        segment_ids=columns[1],
        positions=columns[2],
        targets=columns[3],
        prefix_rows=begins,
        prefixes=np.zeros((row_tokens, 1), np.float32),
    )


def hidden(model, batch: SequenceBatch) -> np.ndarray:
    return np.asarray(jax.jit(lambda batch: model(batch, model.items.vectors()))(batch))[0]


def restored(model, batch: SequenceBatch, masked: list[int]) -> np.ndarray:
    """BERT4Rec's hidden states of a row whose sequence is its targets."""
    is_masked = np.isin(np.arange(batch.targets.shape[1]), masked)[None]
    run = jax.jit(lambda *columns: model(*columns, model.items.vectors()))
    return np.asarray(run(batch.targets, is_masked, batch.segment_ids, batch.positions))[0]


def test_packed_segments_equal_segments_alone(causal):
    packed = hidden(causal, rows([3, 5, 7, 9], [5, 4, 8], row_tokens=9))
    np.testing.assert_allclose(packed[:4], hidden(causal, rows([3, 5, 7, 9], row_tokens=4)), atol=1e-5)
    np.testing.assert_allclose(packed[4:7], hidden(causal, rows([5, 4, 8], row_tokens=3)), atol=1e-5)
    assert np.isfinite(packed).all()


def test_a_token_reads_no_later_item(causal):
    before, after = (hidden(causal, rows([3, 5, 7, last, 2], row_tokens=5)) for last in (9, 11))
    np.testing.assert_allclose(before[:4], after[:4], atol=1e-6)
    assert np.abs(before[4] - after[4]).max() > 1e-3


def test_the_order_of_the_history_matters(causal):
    before, after = hidden(causal, rows([3, 5, 7, 1], row_tokens=4)), hidden(causal, rows([5, 3, 7, 1], row_tokens=4))
    assert np.abs(before[3] - after[3]).max() > 1e-3


def test_an_untrained_hstu_only_normalises():
    model = HSTU(NUM_ITEMS, HSTUConfig(**SIZES), rngs=nnx.Rngs(0))
    vectors = np.asarray(model.items.vectors())[[3, 5]]
    found = hidden(model, rows([3, 5, 7], row_tokens=3))[1:]
    np.testing.assert_allclose(found, vectors / np.sqrt(np.mean(vectors**2, axis=1, keepdims=True)), rtol=1e-3)


def test_heads_of_hstu_divide_its_width():
    with pytest.raises(ValueError, match="num_heads 3 must divide width 64"):
        HSTUConfig(num_heads=3)


def test_bert4rec_reads_both_sides_of_a_mask(bert):
    plain = restored(bert, rows([3, 5, 7, 9], row_tokens=4), [2])[2]
    for other in ([4, 5, 7, 9], [3, 5, 7, 8]):
        assert np.abs(restored(bert, rows(other, row_tokens=4), [2])[2] - plain).max() > 1e-3


def test_bert4rec_never_reads_a_masked_item(bert):
    found = [restored(bert, rows([3, 5, item, 9], row_tokens=4), [2]) for item in (7, 8)]
    np.testing.assert_array_equal(found[0], found[1])


def test_bert4rec_reads_its_own_segment_only(bert):
    packed = restored(bert, rows([3, 5, 7, 9], [5, 4, 8], row_tokens=9), [1, 6])
    np.testing.assert_allclose(packed[:4], restored(bert, rows([3, 5, 7, 9], row_tokens=4), [1]), atol=1e-5)
    np.testing.assert_allclose(packed[4:7], restored(bert, rows([5, 4, 8], row_tokens=3), [2]), atol=1e-5)
    assert np.isfinite(packed).all()


def test_masks_fall_on_real_tokens_in_the_wanted_share():
    segments = jnp.asarray(np.tile([1, 1, 1, 1, 2, 2, 2, 0, 0], (400, 1)))
    all_drawn = np.asarray(draw_masks(jax.random.key(0), segments, mask_share=0.4, last_item_share=0.0))
    assert not all_drawn[:, 7:].any() and all_drawn[:, :7].mean() == pytest.approx(0.4, abs=0.03)
    last_alone = np.asarray(draw_masks(jax.random.key(0), segments, mask_share=0.4, last_item_share=1.0))
    np.testing.assert_array_equal(last_alone, np.tile([False] * 3 + [True] + [False] * 2 + [True] + [False] * 2, (400, 1)))


def test_masked_item_loss_is_the_mean_over_all_masks(bert):
    batch = jax.tree.map(lambda leaf: np.tile(leaf, (20, 1)), rows([3, 5, 7, 9], [5, 4, 8], row_tokens=9))
    shares = {"mask_share": 0.3, "last_item_share": 0.2}

    @jax.jit
    def losses(batch, key):
        masked = draw_masks(jax.random.split(key)[0], batch.segment_ids, **shares)
        vectors = bert.items.vectors()
        states = bert(batch.targets, masked, batch.segment_ids, batch.positions, vectors)
        expected = catalogue_loss(states, vectors, jnp.where(masked, batch.targets, 0), 128)
        return masked_item_loss(bert, batch, key, **shares), expected

    np.testing.assert_allclose(*losses(batch, jax.random.key(3)), rtol=1e-5)


def test_scores_of_a_request_follow_from_its_newest_events(causal, bert, corpus_of):
    corpus = corpus_of([[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [4, 5, 6]], NUM_ITEMS)
    users = np.arange(2)
    long = corpus.histories(users, corpus.target_positions(Split.TEST), 20)
    short = corpus.histories(users, corpus.target_positions(Split.TEST), 7)
    next_item = jax.jit(lambda history: next_item_scores(causal, history, history_length=7))
    masked_end = jax.jit(lambda history: masked_end_scores(bert, history, history_length=7))
    for score in (next_item, masked_end):
        np.testing.assert_allclose(score(long), score(short), atol=1e-4)
    alone = hidden(causal, rows([4, 5, 6], row_tokens=3))[2]
    np.testing.assert_allclose(next_item(short)[1], causal.items.vectors() @ alone, atol=1e-4)
    sequences, num_tokens = history_sequences(long, NUM_ITEMS, 7)
    np.testing.assert_array_equal(sequences.item_indices[0], [0, 5, 6, 7, 8, 9, 10, 11])
    np.testing.assert_array_equal(num_tokens, [8, 3])


def test_bert4rec_scores_the_item_after_the_history(bert, corpus_of):
    corpus = corpus_of([[4, 5, 6], [1, 2, 3, 4, 5]], NUM_ITEMS)
    history = corpus.histories(np.arange(2), corpus.target_positions(Split.TEST), 7)
    alone = restored(bert, rows([4, 5, 9], row_tokens=3), [2])[2]
    np.testing.assert_allclose(masked_end_scores(bert, history, history_length=7)[0], bert.items.vectors() @ alone, atol=1e-4)
