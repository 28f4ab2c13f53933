"""The smallest call in PyTorch, to be timed against. Needs the extra ``bench``."""

from collections.abc import Callable

import numpy as np
import torch  # pyright: ignore[reportMissingImports]


def torch_call(*, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """One added to a vector, NumPy in and out."""
    torch.set_num_threads(threads)

    def run(x: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return (torch.from_numpy(x) + 1.0).numpy()

    return run
