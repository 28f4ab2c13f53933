#!/usr/bin/env bash
# Train on all chips of a Cloud TPU, from a checkout on each of its hosts:
#   [HOSTS=n] experiments/runs/tpu.sh DATA [RUN_DIRECTORY] [FURTHER FLAGS OF cda4rec train ...]
# DATA, the split of a batch and further flags are as for gpu.sh. On a slice of several hosts, set HOSTS to their number and start this on
# all of them at once (gcloud compute tpus tpu-vm ssh NAME --worker=all --command=...), with DATA and RUN_DIRECTORY on a file system that
# they share; JAX finds the hosts by itself. A run that was stopped goes on, on any number of chips:
#   [HOSTS=n] experiments/runs/tpu.sh DATA RUN_DIRECTORY --resume
set -euo pipefail
data=${1:?usage: [HOSTS=n] tpu.sh DATA [RUN_DIRECTORY] [FLAGS OF cda4rec train ...]}
run=${2:-runs/$(basename "$data")-tpu}
hosts=${HOSTS:-1}
shift $(($# < 2 ? $# : 2))
root=$(cd "$(dirname "$0")/../.." && pwd)
bin=$root/.venv/bin

python3 -m venv "$root/.venv"
"$bin/python" -m pip install --quiet --editable "$root" "jax[tpu]"
join="pass" several=()
if [ "$hosts" -gt 1 ]; then
    join="jax.distributed.initialize()" several=(--distributed)
fi
devices=$("$bin/python" -c "import jax; $join; print(jax.device_count() if jax.default_backend() == 'tpu' else 0)")
if [ "$devices" -eq 0 ]; then
    echo "tpu.sh: JAX sees no TPU. Is this a TPU VM, and does no other process hold its chips?" >&2
    exit 1
fi

rows=(--rows-per-batch "$((16 * devices))")
case " $* " in *" --resume "*) rows=() ;; esac # goes on with the rows it began with
"$bin/cda4rec" train --data "$data" --out "$run" --mesh "data=$devices" "${several[@]}" "${rows[@]}" "$@"
if [ "$hosts" -gt 1 ]; then
    echo "tpu.sh: trained. Evaluate on any one machine: cda4rec evaluate --run $run"
    exit 0
fi
"$bin/cda4rec" evaluate --run "$run"
"$bin/cda4rec" bench train
