#!/usr/bin/env bash
# The main result of one dataset: train the system, then SASRec for at most as long, and evaluate both.
#   experiments/runs/main_result.sh path/to/ml-1m [RUN_DIRECTORY]
set -euo pipefail
data=${1:?usage: main_result.sh DATA_FOLDER [RUN_DIRECTORY]}
run=${2:-runs/$(basename "$data")}
here=$(cd "$(dirname "$0")/.." && pwd)

cda4rec train --data "$data" --out "$run"
minutes=$(python -c "import json, sys; print(json.load(open(sys.argv[1]))['seconds'] / 60)" "$run/training.json")
cda4rec train --preset sasrec --data "$data" --out "$run/sasrec" --max-minutes "$minutes"
python "$here/main_result.py" --run "$run"
