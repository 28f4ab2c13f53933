"""What is set once for the whole process, before the first computation."""

import hashlib
import logging
import os
import platform
import warnings
from pathlib import Path

from cda4rec_jax.allocator import keep_freed_memory


def set_up_process() -> None:
    """JAX for small models on a CPU, compiled programs kept between commands, and no chatter of libraries."""
    import jax

    keep_freed_memory()
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # small programs are faster, and repeat bit for bit
    if getattr(jax.config, "jax_compilation_cache_dir", None) is None:
        jax.config.update("jax_compilation_cache_dir", str(_cache_folder()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # Another process may be writing the entry, or the folder may not be writable; then the program is compiled as ever.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
    for name in ("absl", "orbax", "jax._src.xla_bridge"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _cache_folder() -> Path:
    """One folder per kind of processor: compiled programs use its instructions, and a home may be shared by machines."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if Path(base).is_absolute() else Path.home() / ".cache"
    return root / "cda4rec_jax" / f"{platform.machine()}-{hashlib.sha256(_processor().encode()).hexdigest()[:8]}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.is_file() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
