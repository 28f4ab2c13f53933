"""Text providers with pretrained weights, read from a local folder in the format of Hugging Face.

- ``SentenceEncoder``: the provider: a BERT-family sentence encoder, then partially whitened principal components.
- ``BertSentences``: the encoder itself: texts to unit vectors.
"""

from cda4rec_jax.data.encoders.sentence import BertSentences, SentenceEncoder

__all__ = ["BertSentences", "SentenceEncoder"]
