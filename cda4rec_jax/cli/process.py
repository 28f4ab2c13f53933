"""What is set once for the whole process, before the first computation."""

import gc
import hashlib
import logging
import platform
import sys
import warnings
from pathlib import Path

from cda4rec_jax.allocator import keep_freed_memory
from cda4rec_jax.errors import UserError
from cda4rec_jax.processor import cpu_features
from cda4rec_jax.user_cache import cache_folder


def set_up_process() -> None:
    """JAX for small models on a CPU, compiled programs kept between commands, no chatter of libraries, and a user's own modules."""
    import jax

    # A planner of a user's own may stand in the folder where the command is given; the script that started it stands elsewhere.
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)

    keep_freed_memory()
    # Tracing makes objects by the million, nearly all of which stay: looking for cycles after every 700 took a tenth of a small training.
    gc.set_threshold(10_000)
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # small programs are faster, and repeat bit for bit
    if getattr(jax.config, "jax_compilation_cache_dir", None) is None:
        jax.config.update("jax_compilation_cache_dir", str(_cache_folder()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # Another process may be writing the entry, or the folder may not be writable; then the program is compiled as ever.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
    for name in ("absl", "orbax", "jax._src.xla_bridge"):
        logging.getLogger(name).setLevel(logging.ERROR)


def join_processes(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Become one process of a job of several; before the first computation. None for all lets JAX ask the cluster.

    Raises:
        UserError: the others are not there in time, or JAX knows no such cluster.
    """
    import jax

    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"this process cannot join the others ({error}): start all of them with the same --coordinator HOST:PORT and "
            "--num-processes, and --process-id 0, 1, ..., where the first runs on HOST; --distributed is for clusters that JAX knows"
        ) from error


def _cache_folder() -> Path:
    """One folder per kind of processor: compiled programs use its instructions, and a home may be shared by machines."""
    features = cpu_features() or platform.processor()
    return cache_folder() / f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"
