"""BERT (Devlin et al., arXiv 1810.04805) as an encoder of tokens, with weights in the format of Hugging Face.

Post-norm blocks, learned positions, exact GELU. No dropout and no pooling layer: the weights are frozen and only the states of the
tokens are read.
"""

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Int

from cda4rec_jax.data.encoders.folder import CONFIG, WEIGHTS, read_json, read_weights
from cda4rec_jax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    """Sizes of one encoder."""

    vocabulary: int
    max_positions: int
    num_types: int  # kinds of segments; a single text is all of kind 0
    width: int
    num_layers: int
    num_heads: int
    mlp_hidden: int
    norm_epsilon: float


_CONFIG_KEYS = {
    "vocab_size": "vocabulary",
    "max_position_embeddings": "max_positions",
    "type_vocab_size": "num_types",
    "hidden_size": "width",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "mlp_hidden",
    "layer_norm_eps": "norm_epsilon",
}
# What this file implements; a model that says otherwise would run, and give other numbers.
_REQUIRED = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
_DEFAULTS = {"position_embedding_type": "absolute", "layer_norm_eps": 1e-12}  # of Hugging Face, where old files say nothing


def read_bert_config(folder: Path) -> BertConfig:
    """The sizes in ``config.json``.

    Raises:
        UserError: with everything that is missing, is no positive number, or that another architecture says.
    """
    stated = _DEFAULTS | read_json(folder / CONFIG)
    problems = [
        f"{key} is {stated.get(key)!r}, expected {value!r}" for key, value in _REQUIRED.items() if stated.get(key) != value
    ]
    for key in _CONFIG_KEYS:
        kind = float if key == "layer_norm_eps" else int
        value = stated.get(key)
        if type(value) is not kind or value <= 0:
            problems.append(f"{key} is {value!r}, expected {'a number' if kind is float else 'a whole number'} above 0")
    if not problems and stated["hidden_size"] % stated["num_attention_heads"]:
        problems.append(f"{stated['num_attention_heads']} heads do not divide a hidden_size of {stated['hidden_size']}")
    if problems:
        raise UserError(f"{folder / CONFIG} describes no BERT that can be read: {'; '.join(problems)}. Use another model.")
    return BertConfig(**{name: stated[key] for key, name in _CONFIG_KEYS.items()})


class BertBlock(nnx.Module):
    """Bidirectional self-attention and a feed-forward layer, each followed by the residual sum and a normalisation."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        width, hidden = config.width, config.mlp_hidden
        self.num_heads = config.num_heads
        self.query = nnx.Linear(width, width, rngs=rngs)
        self.key = nnx.Linear(width, width, rngs=rngs)
        self.value = nnx.Linear(width, width, rngs=rngs)
        self.attention_out = nnx.Linear(width, width, rngs=rngs)
        self.attention_norm = _norm(config, rngs)
        self.mlp_in = nnx.Linear(width, hidden, rngs=rngs)
        self.mlp_out = nnx.Linear(hidden, width, rngs=rngs)
        self.mlp_norm = _norm(config, rngs)

    def __call__(self, x: Float[Array, "b l d"], real: Bool[Array, "b l"]) -> Float[Array, "b l d"]:
        x = self.attention_norm(x + self._attend(x, real))
        return self.mlp_norm(x + self.mlp_out(jax.nn.gelu(self.mlp_in(x), approximate=False)))

    def _attend(self, x: Float[Array, "b l d"], real: Bool[Array, "b l"]) -> Float[Array, "b l d"]:
        heads = (*x.shape[:2], self.num_heads, x.shape[2] // self.num_heads)
        query, key, value = (project(x).reshape(heads) for project in (self.query, self.key, self.value))
        scores = jnp.einsum("blnh,bmnh->bnlm", query, key) * heads[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(real[:, None, None, :], scores, -jnp.inf), axis=-1)
        return self.attention_out(jnp.einsum("bnlm,bmnh->blnh", weights, value).reshape(x.shape))


class Bert(nnx.Module):
    """The encoder: token ids to one state per token."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        self.tokens = nnx.Embed(config.vocabulary, config.width, rngs=rngs)
        self.positions = nnx.Embed(config.max_positions, config.width, rngs=rngs)
        self.types = nnx.Embed(config.num_types, config.width, rngs=rngs)
        self.norm = _norm(config, rngs)
        self.blocks = nnx.List([BertBlock(config, rngs=rngs) for _ in range(config.num_layers)])

    def __call__(self, tokens: Int[Array, "b l"], real: Bool[Array, "b l"]) -> Float[Array, "b l d"]:
        """States of the tokens of single texts; where ``real`` is False is padding, which no token attends to.

        Every row needs a real token. Positions count from 0 at the left.
        """
        places = self.positions(jnp.arange(tokens.shape[1])) + self.types(jnp.zeros((1,), jnp.int32))
        x = self.norm(self.tokens(tokens) + places[None])
        for block in self.blocks:
            x = block(x, real)
        return x


def _norm(config: BertConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # The fast variance E[x^2] - E[x]^2 cancels, and was never what the weights were trained with.
    return nnx.LayerNorm(config.width, epsilon=config.norm_epsilon, use_fast_variance=False, rngs=rngs)


_EMBEDDING_TABLE = {
    "embeddings.word_embeddings.weight": "tokens/embedding",
    "embeddings.position_embeddings.weight": "positions/embedding",
    "embeddings.token_type_embeddings.weight": "types/embedding",
    "embeddings.LayerNorm.weight": "norm/scale",
    "embeddings.LayerNorm.bias": "norm/bias",
}
_BLOCK_TABLE = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "attention_out",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "mlp_in",
    "output.dense": "mlp_out",
    "output.LayerNorm": "mlp_norm",
}
# Positions are counted, and the pooling layer serves tasks that read the state of the first token.
IGNORED = frozenset({"embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"})


def key_table(num_layers: int) -> dict[str, str]:
    """Name of each tensor of the file -> path of the parameter it fills, such as ``blocks/0/query/kernel``.

    A ``kernel`` is [in, out] here and [out, in] in the file.
    """
    table = dict(_EMBEDDING_TABLE)
    for layer in range(num_layers):
        for name, path in _BLOCK_TABLE.items():
            weight = "scale" if path.endswith("norm") else "kernel"
            table[f"encoder.layer.{layer}.{name}.weight"] = f"blocks/{layer}/{path}/{weight}"
            table[f"encoder.layer.{layer}.{name}.bias"] = f"blocks/{layer}/{path}/bias"
    return table


def load_bert(folder: Path, config: BertConfig) -> Bert:
    """The encoder with the weights of ``model.safetensors``, in float32.

    Raises:
        UserError: tensors are missing, are not expected, or have another shape than ``config`` says (all are named).
    """
    tensors = read_weights(folder)
    graph, abstract = nnx.split(nnx.eval_shape(lambda: Bert(config, rngs=nnx.Rngs(0))))
    leaves, structure = jax.tree_util.tree_flatten_with_path(abstract)
    names = {path: name for name, path in key_table(config.num_layers).items()}
    problems = [f"{name} is not expected" for name in sorted(tensors.keys() - set(names.values()) - IGNORED)]
    arrays = []
    for key_path, wanted in leaves:
        path = jax.tree_util.keystr(key_path, simple=True, separator="/").removesuffix("/value")
        name = names[path]
        if name not in tensors:
            problems.append(f"{name} is missing")
            continue
        array = tensors[name].T if path.endswith("/kernel") else tensors[name]
        if array.shape != wanted.shape:
            shape = wanted.shape[::-1] if path.endswith("/kernel") else wanted.shape
            problems.append(f"{name} is {list(tensors[name].shape)}, expected {list(shape)}")
        arrays.append(jnp.asarray(np.asarray(array, np.float32)))
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise UserError(
            f"{folder / WEIGHTS} does not fit the {config.num_layers} layers of {CONFIG} beside it: "
            f"{'; '.join(problems[:8])}{more}. Copy both files of one BertModel."
        )
    return nnx.merge(graph, jax.tree.unflatten(structure, arrays))
