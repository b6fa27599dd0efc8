#!/usr/bin/env bash
# Compares the replay store with other projects' data paths: TransferQueue, TorchRL, plain Ray (benchmarks.bench_store).
#   bash launch/peers.sh [arguments of the benchmark], e.g. --rounds 3 --out store.json
#   BASE_PYTHON=/path/to/python bash launch/peers.sh     on top of another environment than .venv
# Makes .venv-peers (launch/extra_environment.sh) and leaves .venv as it is.
set -euo pipefail

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
python=$(bash launch/extra_environment.sh peers)
export RAY_USAGE_STATS_ENABLED=0
exec "$python" -m benchmarks.bench_store "$@"
