#!/usr/bin/env bash
# From a fresh machine to a trained network: set up if needed, pack shards/demo, train AlexNet on two ranks.
# Options after the script's name go to job.train, for example: bash job/demo.sh --epochs 2
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash slurm/install.sh
# install.sh uses the active environment, else the project's own.
source slurm/activate.sh

# A new run directory each time: a second demo does not continue the first.
out=runs/demo-$(date +%Y%m%d-%H%M%S)
python -m shards.pack shards/demo runs/demo-data --resize 70
horovodrun -np 2 python -m job.train --recipe demo --data runs/demo-data --out "$out" "$@"
