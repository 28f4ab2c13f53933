"""The C++ custom call: compiled when it is first wanted, where there is a compiler, and kept for later processes."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, Int8

_SOURCE = Path(__file__).with_name("native.cc")
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread")
_COMPILE_SECONDS = 120
_TARGET, _INT8_TARGET = "cda4rec_jax_topk_dot", "cda4rec_jax_topk_dot_int8"
_logger = logging.getLogger(__name__)


def topk_dot_native(
    items: Float[Array, "i d"],
    queries: Float[Array, "b d"],
    k: int,
    allowed: Bool[Array, "i"],
    excluded: Int[Array, "b s"],
) -> tuple[Int[Array, "b k"], Float[Array, "b k"]]:
    """As the reference, of float32 on a CPU; row 0 must not be allowed. ``native_problem`` must have returned None."""
    call = jax.ffi.ffi_call(_TARGET, _results(queries, k), vmap_method="sequential")
    found, scores = call(queries, items, allowed, excluded.astype(jnp.int32))
    return found, scores


def topk_dot_int8_native(
    items: Float[Array, "i d"],
    codes: Int8[Array, "blocks d block"],
    scales: Float[Array, "codes"],
    residuals: Float[Array, "codes"],
    norms: Float[Array, "codes"],
    queries: Float[Array, "b d"],
    k: int,
    allowed: Bool[Array, "i"],
    excluded: Int[Array, "b s"],
) -> tuple[Int[Array, "b k"], Float[Array, "b k"]]:
    """What ``topk_dot_native`` finds, bit for bit, by way of the codes; see ``cda4rec_jax.kernels.topk_dot.quantised``."""
    call = jax.ffi.ffi_call(_INT8_TARGET, _results(queries, k), vmap_method="sequential")
    found, scores = call(queries, items, codes, scales, residuals, norms, allowed, excluded.astype(jnp.int32))
    return found, scores


def _results(queries: Array, k: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    shape = (queries.shape[0], k)
    return jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32)


@functools.cache
def native_problem() -> str | None:
    """Makes the custom call available; None, or what stands in the way. Compiles for some seconds once for each machine and version."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if compiler is None:
        return "there is no C++ compiler (looked for $CXX, g++, c++ and clang++)"
    try:
        library = _library(compiler)
        if not library.is_file():
            _compile(compiler, library)
        loaded = ctypes.cdll.LoadLibrary(str(library))
        symbols = {_TARGET: loaded.TopkDot, _INT8_TARGET: loaded.TopkDotInt8}
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None)
        return f"{_SOURCE.name} cannot be compiled or loaded ({error}{': ' + output.strip()[-300:] if output else ''})"
    for target, symbol in symbols.items():
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(symbol), platform="cpu")
    return None


def _library(compiler: str) -> Path:
    """Where the compiled library is or belongs: its name tells source, compiler, JAX and processor apart."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=_COMPILE_SECONDS).stdout
    facts = (_SOURCE.read_text(encoding="utf-8"), compiler, version, metadata.version("jaxlib"), *_FLAGS, _processor())
    name = hashlib.sha256("\0".join(facts).encode()).hexdigest()[:24]
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(base) if Path(base).is_absolute() else Path.home() / ".cache"
    return folder / "cda4rec_jax" / "native" / f"{_TARGET}-{name}.so"


def _processor() -> str:
    """What ``-march=native`` depends on; a home folder may be shared by machines."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="ascii", errors="replace").splitlines() if file.is_file() else []
    features = [line for line in lines if line.startswith(("flags", "Features", "model name"))]
    return "\n".join([platform.machine(), platform.processor(), *sorted(set(features))])


def _compile(compiler: str, library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    _logger.info("compiling %s with %s; this happens once", _SOURCE.name, compiler)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        command = [compiler, *_FLAGS, "-w", f"-I{jax.ffi.include_dir()}", str(_SOURCE), "-o", str(built)]
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=_COMPILE_SECONDS)
        built.replace(library)  # whole or not at all, also where two processes compile
