"""The processor of this machine: its name, and the instructions that compiled code and measured times depend on."""

import functools
import platform
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_FEATURES = "flags", "Features"  # x86, Arm


def cpu_model() -> str:
    """The vendor's name of the processor, or what the system calls its kind."""
    return _first("model name") or platform.processor() or platform.machine()


def cpu_features() -> str:
    """Instruction sets and other features, as Linux lists them; empty where that cannot be read."""
    return _first(*_FEATURES)


def vector_instructions() -> str:
    """``AVX-512`` where a processor multiplies bytes in 512 bits (VNNI), ``AVX2``, or the kind of machine where it has neither."""
    features = cpu_features().split()
    if "avx512_vnni" in features:
        return "AVX-512"
    return "AVX2" if "avx2" in features else platform.machine()


def has_matrix_unit() -> bool:
    """Whether the processor multiplies matrices of bfloat16 in a unit of its own (Intel's AMX)."""
    return "amx_bf16" in cpu_features().split()


@functools.cache
def _first(*names: str) -> str:
    lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines() if _CPUINFO.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(names)), "")
