"""Baselines in the harness of the system: the same data, split, packed rows, early stopping and ranking of the whole catalogue.

``BASELINES[name](corpus, config, watch)`` fits one with a config of class ``CONFIGS[name]``; ``catalogue_ranks`` ranks the targets of any
of them. SASRec with full cross-entropy is preset ``sasrec``.
"""

from collections.abc import Callable

from cda4rec_jax.baselines.bert4rec import BERT4RecConfig, fit_bert4rec
from cda4rec_jax.baselines.cooccurrence import CooccurrenceConfig, fit_cooccurrence
from cda4rec_jax.baselines.ease import EASEConfig, fit_ease
from cda4rec_jax.baselines.fit import FitConfig
from cda4rec_jax.baselines.gru4rec import GRU4RecConfig, fit_gru4rec
from cda4rec_jax.baselines.gsasrec import GSASRecConfig, fit_gsasrec
from cda4rec_jax.baselines.hstu import HSTUConfig, fit_hstu
from cda4rec_jax.baselines.lsc4rec import LSC4RecConfig, fit_lsc4rec
from cda4rec_jax.baselines.popularity import PopularityConfig, fit_popularity
from cda4rec_jax.baselines.protocol import Recommender, Watch, catalogue_ranks
from cda4rec_jax.baselines.sasrec_bce import SASRecBCEConfig, fit_sasrec_bce
from cda4rec_jax.baselines.sequences import TransformerConfig

BASELINES: dict[str, Callable[..., Recommender]] = {
    "popularity": fit_popularity,
    "cooccurrence": fit_cooccurrence,
    "ease": fit_ease,
    "gru4rec": fit_gru4rec,
    "sasrec-bce": fit_sasrec_bce,
    "gsasrec": fit_gsasrec,
    "bert4rec": fit_bert4rec,
    "hstu": fit_hstu,
    "lsc4rec": fit_lsc4rec,
}

CONFIGS: dict[str, type] = {
    "popularity": PopularityConfig,
    "cooccurrence": CooccurrenceConfig,
    "ease": EASEConfig,
    "gru4rec": GRU4RecConfig,
    "sasrec-bce": SASRecBCEConfig,
    "gsasrec": GSASRecConfig,
    "bert4rec": BERT4RecConfig,
    "hstu": HSTUConfig,
    "lsc4rec": LSC4RecConfig,
}

__all__ = [
    "BASELINES",
    "CONFIGS",
    "BERT4RecConfig",
    "CooccurrenceConfig",
    "EASEConfig",
    "FitConfig",
    "GRU4RecConfig",
    "GSASRecConfig",
    "HSTUConfig",
    "LSC4RecConfig",
    "PopularityConfig",
    "Recommender",
    "SASRecBCEConfig",
    "TransformerConfig",
    "Watch",
    "catalogue_ranks",
]
