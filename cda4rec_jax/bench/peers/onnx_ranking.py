"""The device's ranking in onnxruntime, to be timed against. Needs the extra ``bench``."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime  # pyright: ignore[reportMissingImports]
from onnx import TensorProto, helper, numpy_helper  # pyright: ignore[reportMissingImports]
from onnxruntime.quantization import QuantType, quantize_dynamic  # pyright: ignore[reportMissingImports]

from cda4rec_jax.bench.peers.numpy_ranking import Ranking, rotary_tables
from cda4rec_jax.kernels.rank_candidates import RankerWeights
from cda4rec_jax.kernels.rank_candidates.reference import EPSILON, LARGEST

OPSET, IR_VERSION = 20, 9
CONTRIB = "com.microsoft"  # operators that onnxruntime's own tools put in the place of several


class _Graph:
    """Nodes and constants of a graph that grows by calls."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, values: Any, dtype: Any = np.float32) -> str:
        name = f"constant{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(values, dtype), name))
        return name

    def __call__(self, operator: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        names = [f"value{len(self.nodes)}_{place}" for place in range(outputs)]
        self.nodes.append(helper.make_node(operator, list(inputs), names, **attributes))
        return names[0] if outputs == 1 else names


def onnx_ranking(weights: RankerWeights, num_tokens: int, num_candidates: int, *, quantised: bool, threads: int) -> Ranking:
    """Scores of candidates after a full pass; the last layer computes its last token alone, as ours does.

    ``quantised``: weights of the large products in 8 bits, inputs by onnxruntime's dynamic quantisation.
    """
    model = _model(weights, num_tokens, num_candidates)
    content = _quantised(model) if quantised else model.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def run(tokens: np.ndarray, vectors: np.ndarray, vector_scales: np.ndarray, features: np.ndarray) -> np.ndarray:
        given = {"tokens": tokens, "vectors": vectors, "vector_scales": vector_scales, "features": features}
        return session.run(None, given)[0]

    return run


def _model(weights: RankerWeights, num_tokens: int, num_candidates: int) -> Any:
    add = _Graph()
    state = _decoder(add, weights, num_tokens)
    scores = _head(add, weights, state, num_candidates)
    width, features = weights.width, weights.linear.shape[0]
    inputs = [
        helper.make_tensor_value_info("tokens", TensorProto.FLOAT, [num_tokens, width]),
        helper.make_tensor_value_info("vectors", TensorProto.INT8, [num_candidates, width]),
        helper.make_tensor_value_info("vector_scales", TensorProto.FLOAT, [num_candidates]),
        helper.make_tensor_value_info("features", TensorProto.FLOAT, [num_candidates, features]),
    ]
    outputs = [helper.make_tensor_value_info(scores, TensorProto.FLOAT, [num_candidates])]
    graph = helper.make_graph(add.nodes, "ranker", inputs, outputs, add.constants)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)


def _decoder(add: _Graph, weights: RankerWeights, num_tokens: int) -> str:
    heads, kv_heads, size = weights.num_heads, weights.num_kv_heads, weights.head_size
    tables = [add.constant(table) for table in rotary_tables(num_tokens, size)]
    first, last = add.constant([0], np.int64), add.constant([num_tokens - 1], np.int64)

    def rotated(x: str, count: int, position: str) -> str:
        # [1, tokens, count * size], turned by the positions from `position` on.
        return add("RotaryEmbedding", x, position, *tables, domain=CONTRIB, num_heads=count)

    x = add("Unsqueeze", "tokens", first)
    for layer in range(weights.num_layers):
        normed, newest = _normed(add, x, weights.attention_norm[layer]), layer == weights.num_layers - 1
        kernel, queries = np.asarray(weights.qkv[layer]), heads * size
        if newest:
            pairs = add("MatMul", normed, add.constant(kernel[:, queries:]))
            key, value = add("Split", pairs, outputs=2, axis=2, num_outputs=2)
            row = add("Gather", normed, last, axis=1)
            query = add("MatMul", row, add.constant(kernel[:, :queries]))
            x = add("Gather", x, last, axis=1)
        else:
            sizes = add.constant([queries, kv_heads * size, kv_heads * size], np.int64)
            query, key, value = add("Split", add("MatMul", normed, add.constant(kernel)), sizes, outputs=3, axis=2)
        query = rotated(query, heads, add.constant([num_tokens - 1 if newest else 0], np.int64))
        key = rotated(key, kv_heads, first)
        if kv_heads != heads:
            key, value = (_repeated(add, each, weights, num_tokens) for each in (key, value))
        mixed = add("MultiHeadAttention", query, key, value, domain=CONTRIB, num_heads=heads, unidirectional=int(not newest))
        x = add("Add", x, add("MatMul", mixed, add.constant(weights.out[layer])))
        wide = add("MatMul", _normed(add, x, weights.mlp_norm[layer]), add.constant(weights.gate_up[layer]))
        gate, up = add("Split", wide, outputs=2, axis=2, num_outputs=2)
        x = add("Add", x, add("MatMul", add("Mul", _silu(add, gate), up), add.constant(weights.down[layer])))
    return add("Reshape", _normed(add, x, weights.final_norm), add.constant([weights.width, 1], np.int64))


def _head(add: _Graph, weights: RankerWeights, state: str, num_candidates: int) -> str:
    num_features, place = weights.linear.shape[0], weights.score_feature
    column, flat = add.constant([num_candidates, 1], np.int64), add.constant([num_candidates], np.int64)
    products = add("MatMul", add("Cast", "vectors", to=TensorProto.FLOAT), state)
    products = add("Mul", products, add("Reshape", "vector_scales", column))
    best = add("Gather", products, add.constant([0], np.int64), axis=0)
    difference = add("Mul", add("Sub", products, best), add.constant(weights.score_scale))
    sizes = add.constant([size for size in (place, 1, num_features - place - 1) if size], np.int64)
    parts = add("Split", "features", sizes, outputs=1 + (place > 0) + (place < num_features - 1), axis=1)
    parts = [parts] if isinstance(parts, str) else parts
    parts[int(place > 0)] = difference
    features = add("Concat", *parts, add.constant(np.ones((num_candidates, 1))), axis=1)
    raw = add("Gather", features, add.constant(np.arange(num_features), np.int64), axis=1)
    gates = add("Gather", features, add.constant(weights.gates, np.int64), axis=1)
    standard = add("Mul", add("Sub", raw, add.constant(weights.mean)), add.constant(1.0 / np.asarray(weights.deviation)))
    standard = add("Mul", add("Clip", standard, add.constant(-LARGEST), add.constant(LARGEST)), gates)
    linear = add("MatMul", standard, add.constant(np.asarray(weights.linear)[:, None]))
    moderating = add("Gather", standard, add.constant(weights.moderating, np.int64), axis=1)
    moderators = add("MatMul", standard, add.constant(np.asarray(weights.moderators).T))
    moderated = add("ReduceSum", add("Mul", moderating, moderators), add.constant([1], np.int64), keepdims=1)
    linear = add("Add", linear, moderated)
    hidden = _silu(add, add("Gemm", standard, add.constant(weights.hidden), add.constant(weights.bias)))
    return add("Reshape", add("Add", linear, add("MatMul", hidden, add.constant(np.asarray(weights.out_units)[:, None]))), flat)


def _normed(add: _Graph, x: str, scale: Any) -> str:
    return add("SimplifiedLayerNormalization", x, add.constant(scale), axis=-1, epsilon=EPSILON)


def _silu(add: _Graph, x: str) -> str:
    return add("QuickGelu", x, domain=CONTRIB, alpha=1.0)


def _repeated(add: _Graph, x: str, weights: RankerWeights, num_tokens: int) -> str:
    """Each key-value head for every query head that shares it."""
    shape = add.constant([1, num_tokens, weights.num_kv_heads, 1, weights.head_size], np.int64)
    wide = [1, num_tokens, weights.num_kv_heads, weights.num_heads // weights.num_kv_heads, weights.head_size]
    grown = add("Expand", add("Reshape", x, shape), add.constant(wide, np.int64))
    return add("Reshape", grown, add.constant([1, num_tokens, weights.num_heads * weights.head_size], np.int64))


def _quantised(model: Any) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        # What follows an operator of onnxruntime's own has no type that its tool knows.
        options = {"DefaultTensorType": TensorProto.FLOAT}
        quantize_dynamic(
            model, path, weight_type=QuantType.QInt8, per_channel=True, op_types_to_quantize=["MatMul"], extra_options=options
        )
        return path.read_bytes()
