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

# Of the arguments, the folders that are there.
present() {
  local folder
  for folder in "$@"; do
    if [[ -d $folder ]]; then printf '%s\n' "$folder"; fi
  done
}

check() {
  local title=$1 start=$SECONDS
  shift
  "$@" || {
    printf 'error: %s failed\n' "$title" >&2
    exit 1
  }
  printf '%s: passed in %d s\n' "$title" $((SECONDS - start))
}

arguments=()
for argument in "$@"; do
  if [[ $argument != --all ]]; then arguments+=("$argument"); fi
done
if ((${#arguments[@]} > 0)); then
  exec python -m pytest "${arguments[@]}"
fi

mapfile -t typed < <(present opd_ray tests benchmarks)
check "ruff check" python -m ruff check --quiet .
check "ruff format --check" python -m ruff format --check --quiet .
check "mypy" python -m mypy --no-error-summary "${typed[@]}"

# One session, unit tests first: a mistake shows before the engines start.
mapfile -t tests < <(present tests/unit tests/browser tests/integration)
exec python -m pytest "${tests[@]}"
