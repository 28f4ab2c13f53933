"""C++ custom calls: compiled when they are first wanted, where there is a compiler, and kept for later processes."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from cda4rec_jax.errors import UserError
from cda4rec_jax.processor import cpu_features, cpu_model
from cda4rec_jax.user_cache import cache_folder

_FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread")
_COMPILE_SECONDS = 120
_logger = logging.getLogger(__name__)


def provide(source: Path, targets: Mapping[str, str]) -> str | None:
    """Make the custom calls of one source available on the CPU. Compiles for some seconds once for each machine and version.

    Logs what stands in the way, once a process: who leaves the choice to an operation hears of it nowhere else.

    Args:
        source: a C++ file; it may include the headers beside it and those of ``kernels``.
        targets: names for ``jax.ffi.ffi_call``, and the handler's symbol in the source for each.

    Returns:
        None, or what stands in the way.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if compiler is None:
        return _told("there is no C++ compiler (looked for $CXX, g++, c++ and clang++)")
    try:
        library = _library(source, compiler)
        if not library.is_file():
            _compile(source, compiler, library)
        loaded = ctypes.cdll.LoadLibrary(str(library))
        symbols = {target: getattr(loaded, symbol) for target, symbol in targets.items()}
    except (OSError, AttributeError, UserError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None)
        return _told(
            f"{source.name} of {source.parent.name} cannot be compiled or loaded "
            f"({error}{': ' + output.strip()[-300:] if output else ''})"
        )
    for target, symbol in symbols.items():
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(symbol), platform="cpu")
    return None


@functools.cache
def _told(problem: str) -> str:
    """The problem, logged when it is first met."""
    _logger.warning("no native code: %s; what may choose its implementation computes by XLA, which can be slower", problem)
    return problem


def _library(source: Path, compiler: str) -> Path:
    """Where the compiled library is or belongs: its name tells source, compiler, JAX and processor apart, as a home may be shared."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=_COMPILE_SECONDS).stdout
    headers = [header for folder in (source.parent, Path(__file__).parent) for header in sorted(folder.glob("*.h"))]
    texts = [file.read_text(encoding="utf-8") for file in (source, *headers)]
    facts = (*texts, compiler, version, metadata.version("jaxlib"), *_FLAGS, platform.machine(), cpu_model(), cpu_features())
    name = hashlib.sha256("\0".join(facts).encode()).hexdigest()[:24]
    return cache_folder() / "native" / f"cda4rec_jax_{source.parent.name}_{source.stem}-{name}.so"


def _compile(source: Path, compiler: str, library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    _logger.info("compiling %s of %s with %s; this happens once", source.name, source.parent.name, compiler)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        command = [compiler, *_FLAGS, "-w", f"-I{jax.ffi.include_dir()}", str(source), "-o", str(built)]
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=_COMPILE_SECONDS)
        built.replace(library)  # whole or not at all, also where two processes compile


def suits_native(dtype: Any, wide: Any) -> bool:
    """Whether the kernels in C++ that compute in float32 on a CPU are for these dtypes and this backend."""
    return jax.default_backend() == "cpu" and dtype == wide == jnp.float32


def check_native(dtype: Any, wide: Any, problem: str | None) -> None:
    """Raises UserError where ``implementation="native"`` of such a kernel cannot be had; ``problem`` is what ``provide`` returned."""
    if jax.default_backend() != "cpu":
        raise UserError(f"implementation 'native' runs on a CPU, and JAX is on {jax.default_backend()}: choose another, or None.")
    if not suits_native(dtype, wide):
        raise UserError(f"implementation 'native' computes in float32, and the inputs want {dtype} and {wide}: choose 'xla'.")
    if problem is not None:
        raise UserError(f"implementation 'native' cannot be had: {problem}. Choose 'xla', which computes the same.")
