#!/usr/bin/env bash
# Train on all NVIDIA GPUs of a fresh Linux machine that has a driver for CUDA 12, from a checkout:
#   experiments/runs/gpu.sh DATA [RUN_DIRECTORY] [FURTHER FLAGS OF cda4rec train ...]
# DATA is a RecBole, MovieLens or prepared folder, or "synthetic", which needs none. A batch is split over all GPUs, 16 packed rows for
# each unless --rows-per-batch says otherwise (a multiple of their number). To split a large item table too, give another mesh, such as
# --mesh data=4,items=2: of a flag that is given twice the last one counts. A run that was stopped goes on, on any number of GPUs:
#   experiments/runs/gpu.sh DATA RUN_DIRECTORY --resume
set -euo pipefail
data=${1:?usage: gpu.sh DATA [RUN_DIRECTORY] [FLAGS OF cda4rec train ...]}
run=${2:-runs/$(basename "$data")-gpu}
shift $(($# < 2 ? $# : 2))
root=$(cd "$(dirname "$0")/../.." && pwd)
bin=$root/.venv/bin

python3 -m venv "$root/.venv"
"$bin/python" -m pip install --quiet --editable "$root" "jax[cuda12]"
devices=$("$bin/python" -c "import jax; print(jax.device_count() if jax.default_backend() == 'gpu' else 0)")
if [ "$devices" -eq 0 ]; then
    echo "gpu.sh: JAX sees no GPU. Does nvidia-smi list one, and a driver for CUDA 12?" >&2
    exit 1
fi

rows=(--rows-per-batch "$((16 * devices))")
case " $* " in *" --resume "*) rows=() ;; esac # goes on with the rows it began with
"$bin/cda4rec" train --data "$data" --out "$run" --mesh "data=$devices" "${rows[@]}" "$@"
"$bin/cda4rec" evaluate --run "$run"
"$bin/cda4rec" bench train --preset gpu-256
