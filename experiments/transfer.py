"""Does a model of item text carry over from one domain to another?

    python experiments/transfer.py --data DATA/amazon-beauty --target DATA/ml-latest-small

The cloud agent with item vectors made of text alone, ``e_i = W z_i`` without any id embedding, is trained on ``--data`` and ranks the whole
catalogue of ``--target``, of which it has seen no interaction. Beside it on the target: popularity, the similarity of text to the user's
history without any training, and what the target's own training data makes of the same model and of SASRec on ids.

The text vectors of both catalogues come from one TF-IDF + SVD that is fitted on both, or from two files that ``cda4rec encode`` wrote
with one model (``--texts SOURCE.npz TARGET.npz``). Writes ``transfer-<source>-to-<target>.json``, ``.md``, ``.png``.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from harness import (
    SASREC_CE,
    Arrays,
    Options,
    Study,
    error_bars,
    estimates,
    markdown_page,
    markdown_table,
    run_script,
    sequence_sizes,
    values,
    with_interval,
    write_results,
)
from jaxtyping import Float, PRNGKeyArray

from cda4rec_jax.agents.cloud import CloudAgent
from cda4rec_jax.agents.device.features import LONG_DECAY
from cda4rec_jax.array_typing import Array, ItemText, ItemVectors
from cda4rec_jax.baselines import Recommender, catalogue_ranks
from cda4rec_jax.baselines.fit import SequenceRecommender, fit_sequences
from cda4rec_jax.baselines.sequences import (
    TransformerConfig,
    decoder_model,
    full_cross_entropy,
    next_item_scores,
    packing,
    without_profiles,
)
from cda4rec_jax.data import Interactions, Split
from cda4rec_jax.data.splits import train_histories
from cda4rec_jax.data.text import TfidfSvd, item_texts
from cda4rec_jax.data.text_vectors import load_text_vectors
from cda4rec_jax.errors import UserError
from cda4rec_jax.evaluation.accuracy import popularity_ranks
from cda4rec_jax.messages import HistoryBatch
from cda4rec_jax.nn import dropout
from cda4rec_jax.nn.item_table import Frozen
from cda4rec_jax.pipeline.corpus import Corpus, corpus_with_text
from cda4rec_jax.training import Progress, RunConfig

QUESTION = "Does a model of item text that was trained on one domain recommend in another?"
TEXT_DIMENSIONS = 128
TRANSFERRED, IN_DOMAIN = "text only, trained on the source", "text only, trained on the target"
SIMILARITY, POPULARITY = "text similarity, untrained", "popularity"
COLOURS = {
    TRANSFERRED: "tab:blue",
    IN_DOMAIN: "tab:cyan",
    SASREC_CE: "tab:gray",
    SIMILARITY: "tab:orange",
    POPULARITY: "lightgray",
}


class TextItems(nnx.Module):
    """Item vectors ``W z_i`` of text alone; row 0 is padding and zero."""

    def __init__(self, text: ItemText, width: int, scale: float, dropout_rate: float, *, rngs: nnx.Rngs):
        self.text, self.dropout_rate = Frozen(text), dropout_rate
        start = nnx.initializers.normal(scale * width**-0.5)(rngs.params(), (text.shape[1], width))
        self.projection = nnx.Param(start)

    def vectors(self, key: PRNGKeyArray | None = None) -> ItemVectors:
        """All item vectors; a ``key`` turns dropout of text features on."""
        return dropout(self.text[...], self.dropout_rate, key) @ self.projection[...]


@dataclass(frozen=True, kw_only=True)
class TextSimilarity:
    """Inner product of an item's text with the text of the history, which decays by ``LONG_DECAY`` an event."""

    text: Float[np.ndarray, "i z"]
    history_length: int
    num_parameters: int = 0

    def score(self, history: HistoryBatch) -> Float[Array, "b i"]:
        """Score of every item."""
        age = history.lengths[:, None] - 1 - np.arange(history.items.shape[1])[None, :]
        weights = np.where(age >= 0, LONG_DECAY ** np.maximum(age, 0), 0.0)
        return jnp.asarray(np.einsum("bl,blz->bz", weights, self.text[history.items]) @ self.text.T)


def main(options: Options, target: str, texts: tuple[Path, Path] | None = None) -> dict[str, Any]:
    """Accuracy on the target of a model that was trained on the source.

    Args:
        options: of every experiment; ``data`` is the source, ``users`` samples those of the target.
        target: data source to recommend in.
        texts: text vectors of source and target, of one model; without them, TF-IDF + SVD fitted on both.
    """
    if options.run is not None:
        raise UserError("this experiment trains models of text alone: name --data instead of --run")
    if options.text is not None:
        raise UserError(f"got --text {options.text}, vectors of one catalogue: name those of both, --texts SOURCE.npz TARGET.npz")
    studies = [Study(options), Study(replace(options, data=target))]
    source, own = studies
    names = f"{source.name}-to-{own.name}"
    provider, corpora = _corpora(source.interactions, own.interactions, texts)
    # What a text-only model is trained with; its cells are found again under this name only.
    settings = json.dumps(
        [provider, *(asdict(study.config) for study in studies), *(study.interactions.fingerprint for study in studies)]
    )
    mark = hashlib.sha256(settings.encode()).hexdigest()[:12]
    ranks: dict[str, list[np.ndarray]] = {}
    for name, trained_on in ((TRANSFERRED, 0), (IN_DOMAIN, 1)):
        ranks[name] = [
            own.cell(
                f"transfer-{mark}-{('source', 'target')[trained_on]}-{seed}",
                partial(_text_only, studies[trained_on], corpora[trained_on], own, corpora[1], seed),
            )["ranks"]
            for seed in own.seeds
        ]
    users, positions = own.of_split(Split.TEST)
    ranks[SASREC_CE] = [own.cloud_ranks(SASREC_CE, seed, own.sasrec) for seed in own.seeds]
    similarity = TextSimilarity(text=_unit(corpora[1].text), history_length=own.config.system.history_length)
    ranks[SIMILARITY] = [catalogue_ranks(similarity, corpora[1], users, positions)] * len(own.seeds)
    counts = np.bincount(train_histories(own.interactions)[1], minlength=own.interactions.num_items + 1)
    ranks[POPULARITY] = [popularity_ranks(counts, own.interactions, users, positions)] * len(own.seeds)
    result = own.result(QUESTION, source=source.name, text=provider, **_accuracy(ranks))
    write_results(options.out, f"transfer-{names}", result, page(result), partial(_draw, result), own.console)
    return result


def _corpora(source: Interactions, target: Interactions, files: tuple[Path, Path] | None) -> tuple[str, tuple[Corpus, Corpus]]:
    """Name of what made the text vectors, and both corpora with vectors that compare."""
    if files is None:
        provider = TfidfSvd(dimensions=TEXT_DIMENSIONS)
        texts = [item_texts(data.titles, data.categories) for data in (source, target)]
        rows = provider.encode((*texts[0], *texts[1]))
        parts = np.split(rows, [len(texts[0])])
        return f"{provider.name}, fitted on both", (corpus_with_text(source, parts[0]), corpus_with_text(target, parts[1]))
    vectors = [load_text_vectors(file.expanduser()) for file in files]
    models = {(one.provider, one.model_fingerprint, one.vectors.shape[1]) for one in vectors}
    if len(models) > 1:
        made = " and ".join(f"{file} by {one.provider}" for file, one in zip(files, vectors, strict=True))
        raise UserError(f"{made}: vectors of two models do not compare; encode both catalogues with one model")
    return vectors[0].provider, (
        corpus_with_text(source, vectors[0].rows(source)),
        corpus_with_text(target, vectors[1].rows(target)),
    )


def _text_only(study: Study, corpus: Corpus, own: Study, target: Corpus, seed: int) -> Arrays:
    """Test ranks on the target by the model of text alone that is trained on ``corpus``."""
    config = text_only_config(study.config, seed)
    model = text_only_model(corpus, config, study.config)

    def watch(progress: Progress) -> None:
        if progress.validation is not None:
            quality = progress.validation["ndcg@10"]
            study.console.print(f"text only on {study.name}: step {progress.step:,}, validation ndcg@10 {quality:.4f}")

    score = partial(next_item_scores, history_length=config.history_length)
    fitted = fit_sequences(
        without_profiles(corpus, text=True), model, full_cross_entropy, score, packing(config), config.fit, watch
    )
    users, positions = own.of_split(Split.TEST)
    return {"ranks": catalogue_ranks(on_catalogue(fitted, target, config, study.config), target, users, positions)}


def text_only_config(config: RunConfig, seed: int) -> TransformerConfig:
    """Sizes and optimisation of the cloud agent of a preset."""
    decoder = config.system.cloud.decoder
    sizes = sequence_sizes(config, seed, config.train.learning_rate)
    return TransformerConfig(**sizes, num_layers=decoder.num_layers, num_heads=decoder.num_heads, mlp_hidden=decoder.mlp_hidden)


def text_only_model(corpus: Corpus, config: TransformerConfig, preset: RunConfig) -> CloudAgent:
    """The cloud agent without profiles, whose item vectors are made of text alone."""
    model = decoder_model(corpus, config)
    table = preset.system.cloud.item_table
    # Rows of text have unit norm; alone, they start at the size that text and ids would have had together.
    scale = float(np.hypot(table.text_scale, table.id_scale))
    rngs = nnx.Rngs(config.fit.seed + 1)
    model.items = TextItems(jnp.asarray(corpus.text), config.width, scale, table.text_dropout_rate, rngs=rngs)  # pyright: ignore[reportAttributeAccessIssue]
    return model


def on_catalogue(fitted: SequenceRecommender, corpus: Corpus, config: TransformerConfig, preset: RunConfig) -> Recommender:
    """The fitted model over the text of another catalogue."""
    frozen = nnx.split(text_only_model(corpus, config, preset), nnx.Param, ...)[2]
    return replace(fitted, weights=(fitted.weights[0], frozen))


def _unit(text: Float[np.ndarray, "i z"]) -> Float[np.ndarray, "i z"]:
    return text / np.maximum(np.linalg.norm(text, axis=1, keepdims=True), 1e-6)


def _accuracy(ranks: dict[str, list[np.ndarray]]) -> dict[str, Any]:
    """Each system, and the transferred model minus each other."""
    found = {}
    for metric in ("ndcg@10", "hit_rate@10"):
        columns = {name: values(of_seed, metric) for name, of_seed in ranks.items()}
        compared = {name: columns[TRANSFERRED] - column for name, column in columns.items() if name != TRANSFERRED}
        found[metric] = {"systems": estimates(columns), "transferred_minus": estimates(compared)}
    return found


def page(result: dict[str, Any]) -> str:
    """The result for people."""
    columns = ["", "hit_rate@10", "ndcg@10, 95%", "transferred minus this, ndcg@10, 95%"]
    rows = []
    for name in COLOURS:
        found = result["ndcg@10"]
        gain = found["transferred_minus"].get(name)
        hit_rate = result["hit_rate@10"]["systems"][name]["mean"]
        gained = "" if gain is None else with_interval(gain, signed=True)
        rows.append([name, f"{hit_rate:.4f}", with_interval(found["systems"][name]), gained])
    note = f"Trained on {result['source']}, tested on {result['dataset']}; text vectors by {result['text']}."
    return markdown_page(result, f"Transfer from {result['source']}", [*markdown_table(columns, rows), note, ""])


def _draw(result: dict[str, Any], pyplot: Any) -> Any:
    figure, (accuracy, gains) = pyplot.subplots(1, 2, figsize=(13, 3.8))
    found, names = result["ndcg@10"], list(COLOURS)
    means, _ = error_bars([found["systems"][name] for name in names])
    accuracy.barh(names, means, color=[COLOURS[name] for name in names])
    accuracy.set_xlabel("test ndcg@10 on the target")
    accuracy.set_title(f"{result['source']} to {result['dataset']}")
    others = list(found["transferred_minus"])
    means, bars = error_bars([found["transferred_minus"][name] for name in others])
    gains.errorbar(means, others, xerr=bars, fmt="o", capsize=3, color=COLOURS[TRANSFERRED])
    gains.locator_params(axis="x", nbins=5)
    gains.margins(y=0.2)
    gains.axvline(0.0, color="black", linewidth=0.8)
    gains.set_xlabel("difference in ndcg@10, 95% paired by user")
    gains.set_title(f"{TRANSFERRED}, minus ...")
    for axes in (accuracy, gains):
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
    return figure


if __name__ == "__main__":
    run_script(main, page)
