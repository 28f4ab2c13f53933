"""What is read of the processor, from files as Linux writes them."""

import platform
from pathlib import Path

import pytest

from cda4rec_jax import processor

X86 = "processor\t: 0\nmodel name\t: Some Processor\nflags\t\t: fpu sse2 avx2{more}\n\nprocessor\t: 1\nmodel name\t: Some Processor\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd\n"


@pytest.mark.parametrize(
    ("cpuinfo", "model", "instructions"),
    [
        (X86.format(more=" avx512f avx512_vnni"), "Some Processor", "AVX-512"),
        (X86.format(more=" avx512f"), "Some Processor", "AVX2"),
        (X86.format(more=""), "Some Processor", "AVX2"),
        (ARM, None, platform.machine()),
        (None, None, platform.machine()),
    ],
)
def test_name_and_vector_instructions(
    cpuinfo: str | None, model: str | None, instructions: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        file.write_text(cpuinfo)
    monkeypatch.setattr(processor, "_CPUINFO", file)
    monkeypatch.setattr(processor, "_first", processor._first.__wrapped__)
    assert processor.cpu_model() == (model or platform.processor() or platform.machine())
    assert processor.vector_instructions() == instructions
    assert bool(processor.cpu_features()) == (cpuinfo is not None)
