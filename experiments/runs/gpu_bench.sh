#!/usr/bin/env bash
# Test and measure on one NVIDIA GPU of a fresh Linux machine that has a driver for CUDA 12, from a checkout, within 10 minutes after what
# has to be installed:
#   [BUDGET_S=600] experiments/runs/gpu_bench.sh OUT
# OUT is the folder for the results: a JSON file of each benchmark (kernels-gpu.json has times beside torch, shares of the measured copy and
# matmul rates, memory, hardware and versions; train-gpu-256.json and train-gpu-1024.json the training step), written as far as it got, and
# for each part a log of what it printed. Every part has a time limit, and what those before it left over besides. Every part runs, whatever
# became of those before it; which failed, had no time, or ran out of it is told at the end.
set -euo pipefail
out=${1:?usage: [BUDGET_S=600] gpu_bench.sh OUT}
budget=${BUDGET_S:-600}
root=$(cd "$(dirname "$0")/../.." && pwd)
bin=$root/.venv/bin
mkdir -p "$out"
out=$(cd "$out" && pwd)
problems=()

# torch and JAX bring libraries of CUDA, so that one call of pip must find versions that fit both.
python3 -m venv "$root/.venv"
if ! "$bin/python" -m pip install --quiet --editable "$root[test,bench]" "jax[cuda12]"; then
    problems+=("installing the extra bench: torch and other peers are missing")
    "$bin/python" -m pip install --quiet --editable "$root[test]" "jax[cuda12]"
fi
if [ "$("$bin/python" -c "import jax; print(jax.default_backend())")" != gpu ]; then
    echo "gpu_bench.sh: JAX sees no GPU. Does nvidia-smi list one, and a driver for CUDA 12?" >&2
    exit 1
fi
echo "gpu_bench.sh: installed after $SECONDS s; measuring begins"
SECONDS=0
promised=0

# part NAME SECONDS COMMAND...: within its own seconds (of 600) and those that earlier parts have left over.
part() {
    local name=$1 limit status=0
    promised=$((promised + $2))
    limit=$((budget * promised / 600 - SECONDS))
    shift 2
    if [ "$limit" -le 0 ]; then
        problems+=("$name: no time was left for it")
        return
    fi
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$out/$name.log" || status=$?
    case $status in
        0) ;;
        124 | 137) problems+=("$name: out of time after $limit s; the folder has what it had written") ;;
        *) problems+=("$name: failed, see $name.log") ;;
    esac
}

cd "$root"
# The loss comes second, since those are the two that have aims on a GPU.
part kernels 180 "$bin/cda4rec" bench kernels --only topk_dot linear_cross_entropy segment_attention rank_candidates \
    --rounds 5 --turn-ms 50 --out "$out"
part train-gpu-256 40 "$bin/cda4rec" bench train --preset gpu-256 --rounds 5 --out "$out"
part train-gpu-1024 70 "$bin/cda4rec" bench train --preset gpu-1024 --rounds 5 --out "$out"
part crossover 70 "$bin/cda4rec" bench retrieval --items --no-exact --sizes --crossover 17000 100000 1000000 --rounds 5 --out "$out"
part retrieval 70 "$bin/cda4rec" bench retrieval --items 100000 --no-exact --sizes --rounds 5 --out "$out"
part rank 30 "$bin/cda4rec" bench rank --rounds 5 --out "$out"
part plan 30 "$bin/cda4rec" bench plan --rounds 5 --out "$out"
JAX_PLATFORMS=cuda,cpu part tests 110 "$bin/python" -m pytest -q tests/kernels
echo "gpu_bench.sh: measured for $SECONDS s; results are in $out"
if [ "${#problems[@]}" -gt 0 ]; then
    printf 'gpu_bench.sh: not done: %s\n' "${problems[@]}" >&2
    exit 1
fi
