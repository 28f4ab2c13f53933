"""The policy's network in PyTorch, to be timed against. Needs the extra ``bench``."""

from collections.abc import Callable

import numpy as np
import torch  # pyright: ignore[reportMissingImports]

from cda4rec_jax.bench.peers.numpy_planning import Network


def torch_network(network: Network, *, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """NumPy features in, NumPy qualities out."""
    torch.set_num_threads(threads)
    layers: list[torch.nn.Module] = []
    for kernel, bias in network.layers:
        linear = torch.nn.Linear(*kernel.shape)
        linear.weight.data, linear.bias.data = torch.from_numpy(kernel.T.copy()), torch.from_numpy(bias.copy())
        layers += [linear, torch.nn.GELU(approximate="tanh")]
    model = torch.nn.Sequential(*layers[:-1]).eval()

    def run(features: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(features)).numpy()

    return run
