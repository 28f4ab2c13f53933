#!/usr/bin/env bash
# Test and measure the kernels on one NVIDIA GPU of a fresh Linux machine that has a driver for CUDA 12, from a checkout, in 10 minutes:
#   experiments/runs/gpu_bench.sh OUT
# OUT is the folder for the results: kernels-gpu.json holds times, shares of the measured copy and matmul rates, memory, hardware and
# versions, train-gpu-256.json the training step, and kernels.log what the tests of the kernels said. Every part runs, whatever became of
# those before it; which failed is told at the end.
set -euo pipefail
out=${1:?usage: gpu_bench.sh OUT}
root=$(cd "$(dirname "$0")/../.." && pwd)
bin=$root/.venv/bin
mkdir -p "$out"
out=$(cd "$out" && pwd)

python3 -m venv "$root/.venv"
"$bin/python" -m pip install --quiet --editable "$root[test]" "jax[cuda12]"
if [ "$("$bin/python" -c "import jax; print(jax.default_backend())")" != gpu ]; then
    echo "gpu_bench.sh: JAX sees no GPU. Does nvidia-smi list one, and a driver for CUDA 12?" >&2
    exit 1
fi

cd "$root"
failed=()
JAX_PLATFORMS=cuda,cpu timeout 240 "$bin/python" -m pytest -q tests/kernels 2>&1 | tee "$out/kernels.log" || failed+=("tests (kernels.log)")
timeout 240 "$bin/cda4rec" bench kernels --rounds 5 --turn-ms 50 --out "$out" || failed+=("bench kernels")
timeout 90 "$bin/cda4rec" bench train --preset gpu-256 --rounds 5 --out "$out" || failed+=("bench train")
if [ "${#failed[@]}" -gt 0 ]; then
    printf 'gpu_bench.sh: failed or out of time: %s\n' "${failed[@]}" >&2
    exit 1
fi
