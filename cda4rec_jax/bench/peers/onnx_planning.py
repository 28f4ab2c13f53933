"""The policy's network in onnxruntime, to be timed against. Needs the extra ``bench``."""

from collections.abc import Callable

import numpy as np
import onnx  # pyright: ignore[reportMissingImports]
import onnxruntime  # pyright: ignore[reportMissingImports]
from onnx import TensorProto, helper, numpy_helper  # pyright: ignore[reportMissingImports]

from cda4rec_jax.bench.peers.numpy_planning import Network

OPSET, IR_VERSION = 20, 9  # the first with Gelu, and the format of its time


def onnx_network(network: Network, *, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """NumPy features in, NumPy qualities out."""
    nodes, constants, value = [], [], "features"
    for layer, (kernel, bias) in enumerate(network.layers):
        constants += [numpy_helper.from_array(kernel, f"kernel{layer}"), numpy_helper.from_array(bias, f"bias{layer}")]
        nodes.append(helper.make_node("Gemm", [value, f"kernel{layer}", f"bias{layer}"], [f"dense{layer}"]))
        value = f"dense{layer}"
        if layer + 1 < len(network.layers):
            nodes.append(helper.make_node("Gelu", [value], [f"gelu{layer}"], approximate="tanh"))
            value = f"gelu{layer}"
    inputs, outputs = network.layers[0][0].shape[0], network.layers[-1][0].shape[1]
    graph = helper.make_graph(
        nodes,
        "policy",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", inputs])],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, ["n", outputs])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda features: session.run(None, {"features": features})[0]
