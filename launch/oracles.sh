#!/usr/bin/env bash
# Compares the objective with other projects' code: TRL, verl, Liger-Kernel and SciPy (tests/oracles).
#   bash launch/oracles.sh [pytest arguments], e.g. -k jsd
#   BASE_PYTHON=/path/to/python bash launch/oracles.sh     on top of another environment than .venv
# Makes .venv-oracles (launch/extra_environment.sh) and leaves .venv as it is.
set -euo pipefail

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
python=$(bash launch/extra_environment.sh oracles)
# A package that is missing fails the tests instead of skipping them.
export OPD_RAY_ORACLES=required
# Tests reach for no network and report to nobody.
export HF_HUB_OFFLINE=1 WANDB_MODE=offline RAY_USAGE_STATS_ENABLED=0 VLLM_NO_USAGE_STATS=1
exec "$python" -m pytest tests/oracles "$@"
