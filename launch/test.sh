#!/usr/bin/env bash
# Checks everything that needs no GPU: style, types, unit tests, integration tests on real engines.
#   bash launch/test.sh                              what to run after an install or a change
#   bash launch/test.sh --all                        with the tests that take long (marked `slow`)
#   bash launch/test.sh tests/unit -k gate           only these tests: other arguments go to pytest
set -euo pipefail

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
bash launch/environment.sh
bash launch/extra_environment.sh isolated >/dev/null
bash launch/system_packages.sh
# DeepSpeed and Ray look for helper programs (ninja, ray) on the PATH.
export PATH=$PWD/.venv/bin:$PATH
# Tests reach for no network and report to nobody.
export HF_HUB_OFFLINE=1 WANDB_MODE=offline RAY_USAGE_STATS_ENABLED=0 VLLM_NO_USAGE_STATS=1

chosen="not gpu and not slow"
arguments=()
for argument in "$@"; do
  if [[ $argument == --all ]]; then chosen="not gpu"; else arguments+=("$argument"); fi
done
if ((${#arguments[@]} > 0)); then
  exec python -m pytest "${arguments[@]}"
fi

# The long queue first: engines start on one worker, and the other one takes everything else (tests/conftest.py).
tests=()
for folder in tests/integration tests/style tests/browser tests/unit; do
  if [[ -d $folder ]]; then tests+=("$folder"); fi
done
exec python -m pytest -m "$chosen" -n logical --maxprocesses=4 --no-loadscope-reorder --durations=20 "${tests[@]}"
