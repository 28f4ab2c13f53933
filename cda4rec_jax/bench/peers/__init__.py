"""Systems of others, to be timed against: which there are, and which are installed here.

Nothing in this package needs them; a module in this folder imports its peer's package at once.
"""

import importlib.util
from collections.abc import Mapping

from cda4rec_jax.errors import UserError

# Packages of each peer, in training, in planning, in ranking, in calls of compiled code and in retrieval.
PEERS = {
    "jax": ("jax",),
    "torch": ("torch",),
    "torch-compile": ("torch",),
    "rectools": ("rectools", "pytorch_lightning", "torch"),
}
PLAN_PEERS = {"onnxruntime": ("onnxruntime", "onnx"), "torch": ("torch",), "numpy": ("numpy",)}
RANK_PEERS = {"onnxruntime": ("onnxruntime", "onnx"), "torch": ("torch",), "jax": ("jax",), "numpy": ("numpy",)}
DISPATCH_PEERS = {"onnxruntime": ("onnxruntime", "onnx"), "torch": ("torch",), "numpy": ("numpy",)}
RETRIEVAL_PEERS = {
    "faiss": ("faiss",),
    "hnswlib": ("hnswlib",),
    "usearch": ("usearch",),
    "pynndescent": ("pynndescent",),
    "torch": ("torch",),
    "numpy": ("numpy",),
}


def installed(peer: str) -> bool:
    """True where all packages of a peer are installed."""
    packages = (PEERS | PLAN_PEERS | RANK_PEERS | DISPATCH_PEERS | RETRIEVAL_PEERS)[peer]
    return all(importlib.util.find_spec(package) is not None for package in packages)


def chosen_peers(
    names: tuple[str, ...] | None, group: Mapping[str, tuple[str, ...]] = PEERS
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Peers to measure, and peers that are left out since they are not installed: all there are where none is asked for.

    Raises:
        UserError: a peer that is asked for by name is unknown or not installed.
    """
    if names is None:
        return tuple(peer for peer in group if installed(peer)), tuple(peer for peer in group if not installed(peer))
    unknown = [name for name in names if name not in group]
    if unknown:
        raise UserError(f"unknown peer {', '.join(unknown)}: choose from {', '.join(group)}")
    missing = [name for name in names if not installed(name)]
    if missing:
        packages = sorted({package for name in missing for package in group[name] if importlib.util.find_spec(package) is None})
        raise UserError(
            f"peer {', '.join(missing)} needs {', '.join(packages)}, which is not installed: pip install 'cda4rec_jax[bench]'"
            + (RECTOOLS_HINT if "rectools" in packages else "")
        )
    return tuple(dict.fromkeys(names)), ()


RECTOOLS_HINT = (
    " (RecTools 0.19 asks for numpy<2 on Python below 3.13, where the extra leaves it out. It works with numpy 2 all the same:"
    " pip install --no-deps rectools pm-implicit, then pip install 'pandas<3' 'pytorch-lightning<=2.5.2' pydantic typeguard)"
)
