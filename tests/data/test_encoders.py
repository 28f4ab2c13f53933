"""The BERT encoder equals a plain NumPy one, pads without a trace, and says what is wrong with the files it is given."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cda4rec_jax.data.encoders import BertSentences, SentenceEncoder
from cda4rec_jax.data.text import Combined, TextProvider, TfidfSvd
from cda4rec_jax.errors import UserError
from tests.data.tiny_bert import POSITIONS, VOCABULARY, WIDTH, WORDS, numpy_sentence_vector, write_tiny_bert


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a tiny encoder: never write to it."""
    return write_tiny_bert(tmp_path_factory.mktemp("models") / "tiny-bert")


@pytest.fixture(scope="module")
def encoder(folder: Path) -> BertSentences:
    return BertSentences(folder)


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """An encoder of its own for a test that damages it."""
    return write_tiny_bert(tmp_path / "broken")


def texts(lengths: list[int], seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, length)) for length in lengths]


def test_vectors_equal_a_plain_forward_pass_in_numpy(encoder: BertSentences, folder: Path) -> None:
    given = [*texts([1, 3, 7, 14, 15, 17, 18]), "", "Word3\nword4", "word1 unknown"]
    vectors = encoder.embed(given)
    expected = np.stack([numpy_sentence_vector(folder, text) for text in given])
    assert vectors.shape == (len(given), WIDTH) and vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)


def test_a_long_text_counts_up_to_the_positions_of_the_model(encoder: BertSentences, folder: Path) -> None:
    (long,) = texts([200])
    start = " ".join(long.split()[: POSITIONS - 2])
    np.testing.assert_array_equal(*encoder.embed([long, start]))
    np.testing.assert_allclose(encoder.embed([long])[0], numpy_sentence_vector(folder, long), atol=2e-6)


def test_neither_padding_nor_company_nor_order_changes_a_vector(encoder: BertSentences) -> None:
    given = texts([1, 2, 9, 14, 16, 18] * 30)
    together = encoder.embed(given)
    np.testing.assert_allclose(encoder.embed(given[::-1])[::-1], together, atol=1e-6)
    for row in (0, 3, 5):
        np.testing.assert_allclose(encoder.embed([given[row]])[0], together[row], atol=1e-6)


def test_equal_texts_get_equal_rows_bit_for_bit(encoder: BertSentences) -> None:
    given = texts([5] * 40)
    vectors = encoder.embed([*given, *given[::-1]])
    np.testing.assert_array_equal(vectors[:40], vectors[40:][::-1])


def test_no_text_gives_no_row(encoder: BertSentences) -> None:
    assert encoder.embed([]).shape == (0, WIDTH)


def test_every_bucket_compiles_once_and_progress_ends_at_all_different_texts(folder: Path) -> None:
    encoder, heard = BertSentences(folder), []
    compiled: Any = encoder._embed
    given = texts([1 + index % 14 for index in range(300)] + [16] * 10 + [18] * 200)
    encoder.embed(given, lambda done, total: heard.append((done, total)))
    encoder.embed(given[:3])
    assert compiled._cache_size() == 2  # 16 tokens, and the 20 positions of the model
    different = len(set(given))
    assert heard[-1] == (different, different) and len(heard) >= 4
    assert [done for done, _ in heard] == sorted({done for done, _ in heard})


def test_weights_of_half_the_bits_are_read(broken: Path) -> None:
    weights = load_file(broken / "model.safetensors")
    halves = {name: value.astype(ml_dtypes.bfloat16) if value.dtype == np.float32 else value for name, value in weights.items()}
    save_file(halves, broken / "model.safetensors")
    (text,) = texts([9])
    np.testing.assert_allclose(BertSentences(broken).embed([text])[0], numpy_sentence_vector(broken, text), atol=2e-6)


def rewrite_weights(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def test_tensors_that_do_not_fit_are_all_named(broken: Path) -> None:
    def change(weights: dict[str, np.ndarray]) -> None:
        del weights["encoder.layer.1.output.dense.bias"]
        weights["classifier.weight"] = np.zeros((2, WIDTH), np.float32)
        weights["encoder.layer.0.intermediate.dense.weight"] = np.zeros((WIDTH, 7), np.float32)

    rewrite_weights(broken, change)
    with pytest.raises(UserError) as error:
        BertSentences(broken)
    message = str(error.value)
    assert "encoder.layer.1.output.dense.bias is missing" in message
    assert "classifier.weight is not expected" in message
    assert "encoder.layer.0.intermediate.dense.weight is [16, 7], expected [32, 16]" in message


def test_tensors_that_no_sentence_needs_may_be_absent(broken: Path, encoder: BertSentences) -> None:
    rewrite_weights(broken, lambda weights: [weights.pop(name) for name in list(weights) if "pooler" in name or "_ids" in name])
    np.testing.assert_array_equal(BertSentences(broken).embed(texts([4])), encoder.embed(texts([4])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "roberta"}, "model_type is 'roberta', expected 'bert'"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu', expected 'gelu'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key', expected 'absolute'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, expected a whole number above 0"),
        ({"vocab_size": None}, "vocab_size is None, expected a whole number above 0"),
        ({"num_attention_heads": 3}, "3 heads do not divide a hidden_size of 16"),
        ({"num_hidden_layers": 1}, "encoder.layer.1.attention.output.LayerNorm.bias is not expected"),
        ({"num_hidden_layers": 3}, "; and 8 more. Copy both files of one BertModel"),
        ({"vocab_size": 7}, f"knows {len(VOCABULARY)} tokens, the model beside it 7"),
    ],
)
def test_another_architecture_is_refused(broken: Path, change: dict[str, object], message: str) -> None:
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError) as error:
        BertSentences(broken)
    assert message in str(error.value)


def test_other_pooling_than_the_mean_is_refused(broken: Path, encoder: BertSentences) -> None:
    (broken / "1_Pooling").mkdir()
    pooling = broken / "1_Pooling" / "config.json"
    pooling.write_text('{"pooling_mode_mean_tokens": true}')
    np.testing.assert_array_equal(BertSentences(broken).embed(texts([4])), encoder.embed(texts([4])))
    pooling.write_text('{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}')
    with pytest.raises(UserError, match="only encoders that take the mean"):
        BertSentences(broken)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_file_that_is_missing_or_damaged_is_named(broken: Path, name: str) -> None:
    (broken / name).write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UserError, match=rf"cannot read \S+{name}.*copy the model's file again"):
        BertSentences(broken)
    (broken / name).unlink()
    with pytest.raises(UserError, match=f"lacks {name}"):
        BertSentences(broken)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no model folder \S+none: expected a folder with config\.json"):
        BertSentences(tmp_path / "none")


@pytest.mark.parametrize("module", ["tokenizers", "safetensors.numpy"])
def test_an_absent_package_is_named_with_the_command_that_installs_it(
    folder: Path, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"{module.split('.')[0]}, which is not installed: pip install 'cda4rec_jax\[text\]'"):
        BertSentences(folder)


def test_the_provider_keeps_the_protocol(folder: Path, encoder: BertSentences) -> None:
    provider = SentenceEncoder(folder, 6)
    assert isinstance(provider, TextProvider) and provider.name == "tiny-bert-6"
    given = [*texts([6] * 60), " ", ""]
    vectors = provider.encode([*given, given[0]])
    assert vectors.shape == (63, 6) and vectors.dtype == np.float32
    assert not vectors[60:62].any(), "a blank text says nothing"
    np.testing.assert_array_equal(vectors[0], vectors[62])
    assert np.linalg.norm(vectors[np.r_[:60, 62]], axis=1).mean() == pytest.approx(1, abs=1e-5)
    covariance = np.cov(vectors[np.r_[:60, 62]], rowvar=False)
    np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-5)
    assert (np.diff(np.diag(covariance)) < 0).all()
    assert provider.encode([]).shape == (0, 6) and not provider.encode(["one"]).any()


def test_the_provider_stands_beside_another(folder: Path) -> None:
    vectors = Combined(providers=(SentenceEncoder(folder, 6), TfidfSvd(dimensions=8))).encode(texts([6] * 60))
    assert vectors.shape == (60, 14)
    assert np.linalg.norm(vectors, axis=1).mean() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("dimensions", [0, 17])
def test_more_dimensions_than_the_model_has_are_refused(folder: Path, dimensions: int) -> None:
    with pytest.raises(UserError, match=f"take 1 to 16 dimensions, not {dimensions}"):
        SentenceEncoder(folder, dimensions)


# From BertModel of transformers 5.23 on torch 2.13 (CPU, float32), each text alone, tokenized by tokenizers 0.23: mean of the last
# states, divided by its norm; the first four numbers of each, and the products of the three.
GOLDEN_TEXTS = [
    "Toy Story (1995)\nAnimation | Children's | Comedy",
    "Virgin Argan Oil ~ 2 Fl Oz.\nBeauty | Skin Care | Body | Moisturizers | Oils",
    "Déjà vu",
]
GOLDEN_START = [
    [-0.08772575, 0.03191987, 0.03872542, -0.03852700],
    [-0.02245314, -0.04542921, -0.00737517, 0.06632044],
    [-0.08362274, 0.00628661, 0.07010222, 0.06800714],
]
GOLDEN_PRODUCTS = [[1, -0.06126467, 0.16475829], [-0.06126467, 1, 0.06531464], [0.16475829, 0.06531464, 1]]


def test_all_minilm_l6_v2_gives_the_golden_numbers() -> None:
    if "CDA4REC_MINILM" not in os.environ:
        pytest.skip("no real weights: set CDA4REC_MINILM to a folder with the files of all-MiniLM-L6-v2")
    vectors = BertSentences(os.environ["CDA4REC_MINILM"]).embed(GOLDEN_TEXTS)
    np.testing.assert_allclose(vectors[:, :4], GOLDEN_START, atol=1e-6)
    np.testing.assert_allclose(vectors @ vectors.T, GOLDEN_PRODUCTS, atol=1e-6)
